"""The console of the command line: rich, with everything that is printed made safe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import console
from rich.segment import Segment
from rich.text import Text

from rtresnet.terminal import escape


class Console(console.Console):
    """Prints text as it is: no markup, no emoji codes, no control characters of a file."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, *arguments: Any, **options: Any) -> Text:
        """As rich's, which would drop some control characters without a trace."""
        return super().render_str(escape(text), *arguments, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        """As rich's; every renderable passes here on its way to the terminal."""
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else Segment(escape(segment.text), segment.style)
