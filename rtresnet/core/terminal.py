"""Text from files, made safe for a terminal.

Class names, file names and messages of libraries may hold control sequences that move the cursor,
change the window's title or reverse the reading direction. They are shown as `\\x1b`.
"""

from __future__ import annotations

_UNSAFE = (
    *range(0x20),  # C0: ESC, which starts a control sequence, and CR, which overwrites the line
    *range(0x7F, 0xA0),  # DEL and C1: CSI and OSC as one character
    0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),  # reading direction
    0x2028, 0x2029,  # line and paragraph separators
    *range(0xD800, 0xE000),  # bytes of a file name that are not UTF-8
)  # fmt: skip
_CELL = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNSAFE}
_LINES = {code: shown for code, shown in _CELL.items() if chr(code) not in "\n\t"}


def escape(text: str) -> str:
    """The text with control characters as escapes; keeps line ends and tabs."""
    return text.translate(_LINES)


def escape_cell(text: str) -> str:
    """The text with control characters as escapes, line ends and tabs included."""
    return text.translate(_CELL)
