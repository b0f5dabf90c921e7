"""Tables of predictions: a journal during the run, a table at the end.

`OUT.part` has one line of JSON with the settings, then one line for each image, in
order. It is flushed batch by batch, so that a killed process loses one batch. At the end it becomes
OUT in one step. Independent of how predictions are computed. The columns of every format: image,
class_1, probability_1, ... to K, error.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rtresnet.core import atomic_io, hardware, serialization
from rtresnet.core.errors import InputError, UnavailableError
from rtresnet.core.preprocess import Preprocess
from rtresnet.core.serialization import to_builtins
from rtresnet.workflows.predictor import Prediction

FORMS = (".parquet", ".csv", ".jsonl")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
VERSION = 1
Row = dict[str, object]
"""Column to value."""
CHUNK_ROWS, GROUP_CHUNKS = 1024, 16  # rows as Python objects, which are large; chunks a row group


def check_table_path(out: Path) -> None:
    """Reject a table that cannot be written, before anything is computed.

    Raises:
        InputError: The suffix is none of FORMS, or there is a folder of that name.
        UnavailableError: Parquet without pyarrow.
    """
    if out.suffix.lower() not in FORMS:
        raise InputError(
            f"--out {out}: {out.suffix or 'no suffix'} is not a table format",
            fix=f"name it *{', *'.join(FORMS)}",
        )
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder", fix="choose another --out")
    if out.suffix.lower() == ".parquet" and not hardware.installed("pyarrow"):
        raise UnavailableError(
            "Parquet needs the package pyarrow, which is not installed",
            fix="pip install 'rtresnet[bulk]', or use another format for --out",
        )


@dataclass(frozen=True, kw_only=True)
class TableHead:
    """Settings that determine the rows of a table, and its images.

    Attributes:
        journal: Version of the journal's format.
        model: sha256 of the artifact.
        provider: What runs it.
        preprocess: How an image becomes input.
        top: Classes for each image.
        batch: Images at a time.
        images: Number of images.
        list_of_images: sha256 of the images' names, sizes and times.
    """

    journal: int = VERSION
    model: str
    provider: str
    preprocess: Preprocess
    top: int
    batch: int
    images: int
    list_of_images: str


class Journal:
    """`OUT.part`. The caller holds the lock on OUT (`core.locks.hold_file`).

    Args:
        out: The table that it becomes.
        head: Settings of the table; compared on resuming. Rows are stored in complete batches: one
            that was truncated is computed again.
        resume: Whether an existing journal is continued.

    Attributes:
        done: Number of rows that exist.
        broken: Number of rows with an error among them.

    Raises:
        InputError: There is a journal and `resume` is false; or it was made with a different model,
            other options or other images; or `resume` is true and the table is complete.
    """

    def __init__(self, out: Path, head: TableHead, *, resume: bool) -> None:
        self.out, self.path, self.top = out, Path(f"{out}.part"), head.top
        self.head: Row = to_builtins(head)
        self.done = self.broken = 0
        exists = self.path.exists() and self.path.stat().st_size > 0
        if exists and not resume:
            raise InputError(
                f"{self.path}: contains predictions of an interrupted run",
                fix=f"continue it with --resume, or remove {self.path}",
            )
        if resume and not exists and out.exists():
            raise InputError(
                f"{out}: is complete, so there is nothing to resume",
                fix="leave out --resume to replace it, or choose another --out",
            )
        self._file: TextIO = open(  # noqa: SIM115
            self.path, "a+", encoding="utf-8", errors="surrogateescape", newline="\n"
        )
        try:
            if exists:
                self._continue(head.batch)
            if self.done == 0:
                self._file.truncate(0)
                self._write([self.head])
        except BaseException:
            self._file.close()
            raise

    def _continue(self, batch: int) -> None:
        self._file.seek(0)
        # readline and not iteration, which forbids tell()
        head = _parsed(self._file.readline())
        if head is None:
            return  # killed before the first line was written
        changed = [key for key in {**head, **self.head} if head.get(key) != self.head.get(key)]
        if changed:
            key = changed[0]
            raise InputError(
                f"{self.path}: made with a different {key.replace('_', ' ')} "
                f"({_short(head.get(key))} then, now {_short(self.head.get(key))})",
                fix=f"use the earlier one, or remove {self.path} to start again",
            )
        end, read, broken = self._file.tell(), 0, 0
        while (row := self._row(self._file.readline())) is not None:
            read += 1
            broken += row["error"] is not None
            if read % batch == 0 or read == self.head["images"]:
                self.done, self.broken, end = read, broken, self._file.tell()
        self._file.seek(end)
        self._file.truncate()

    def _row(self, line: str) -> Row | None:
        """Parse a line with the columns of the table; None as in `_parsed`."""
        row = _parsed(line)
        if row is None or list(row) != columns(self.top):
            return None
        kinds = (float if name.startswith("probability") else str for name in row)
        valid = all(
            value is None or isinstance(value, kind)
            for value, kind in zip(row.values(), kinds, strict=True)
        )
        return row if valid and row["image"] is not None else None

    def add(self, rows: Sequence[Prediction]) -> None:
        """Append a batch."""
        self._write([_flat(row, self.top) for row in rows])
        self.done += len(rows)
        self.broken += sum(row.error is not None for row in rows)

    def _write(self, lines: Sequence[Row]) -> None:
        try:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)  # write() does not set it
            raise

    def rows(self) -> Iterator[Row]:
        """Read every row, with the columns of the table."""
        with open(self.path, encoding="utf-8") as file:
            next(file)
            for line in file:
                yield json.loads(line)

    def finish(self, *, excel_safe: bool = False) -> None:
        """Make the table of the journal and remove the journal.

        Args:
            excel_safe: In a CSV file, text that a spreadsheet would run as a formula starts with
                an apostrophe.
        """
        form = self.out.suffix.lower()
        with atomic_io.atomic_path(self.out) as temporary:
            if form == ".csv":
                _csv(temporary, self, excel_safe=excel_safe)
            else:
                {".parquet": _parquet, ".jsonl": _jsonl}[form](temporary, self)
        self.discard()

    def discard(self) -> None:
        """Remove the journal."""
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def columns(top: int) -> list[str]:
    """Return the columns of a table with the `top` best classes."""
    best = [f"{name}_{n}" for n in range(1, top + 1) for name in ("class", "probability")]
    return ["image", *best, "error"]


def _flat(row: Prediction, top: int) -> Row:
    best: list[object] = [value for entry in row.top for value in (entry.name, entry.probability)]
    best = best or [None] * (2 * top)
    return dict(zip(columns(top), [row.image, *best, row.error], strict=True))


def _parsed(line: str) -> Row | None:
    """Parse a complete line; None at the end of the file, and for a truncated line."""
    with contextlib.suppress(InputError):
        data = line.encode("utf-8", "surrogateescape")
        record = serialization.parse(data, where="") if line.endswith("\n") else None
        return record if isinstance(record, dict) else None
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 40 else text[:12] + "..."


def _jsonl(path: Path, journal: Journal) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in journal.rows())


def _csv(path: Path, journal: Journal, *, excel_safe: bool) -> None:
    rows = journal.rows()
    if excel_safe:
        rows = ({name: _no_formula(value) for name, value in row.items()} for row in rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(_LineFeeds(file), columns(journal.top))
        writer.writeheader()
        writer.writerows(rows)


class _LineFeeds:
    """A file whose rows end in LF. With LF as its terminator, csv would leave CR unquoted."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")


def _no_formula(value: Any) -> Any:
    """Escape text so that a spreadsheet does not run it; see OWASP on CSV injection."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _parquet(path: Path, journal: Journal) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            (name, pa.float32() if name.startswith("probability") else pa.string())
            for name in columns(journal.top)
        ],
        metadata={"rtresnet": json.dumps(journal.head)},
    )
    rows, group = journal.rows(), []
    with parquet.ParquetWriter(os.fspath(path), schema) as writer:
        while chunk := list(islice(rows, CHUNK_ROWS)):
            group.append(pa.RecordBatch.from_pylist(chunk, schema))
            if len(group) == GROUP_CHUNKS:
                writer.write_table(pa.Table.from_batches(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group, schema))
