"""What people see: results on stdout, everything else on stderr; tables, lines, a progress bar."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import endings

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)
_OF_PYDANTIC = {
    r"Input should be greater than or equal to (\S+)": r"must be \1 or more",
    r"Input should be less than or equal to (\S+)": r"must be \1 or less",
    r"Input should be a valid integer\b.*": "must be a whole number",
    r"Input should be a valid number\b.*": "must be a number",
    r"Value error, ": "",
}  # what typer has checks say
_for_json: TextIO | None = None  # stdout, once nothing else may write there
LOG_SECONDS = 60  # between two lines of progress where there is no terminal for a bar
PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 0, 0, 1), "pad_edge": False}  # fits 80 columns


class Tell(Protocol):
    """Says how far the work is; without `what`, under the title of the bar."""

    def __call__(self, what: str | None, done: int, total: int, /) -> None: ...


def say(text: object) -> None:
    """A line, or several, on stdout."""
    out.print(text, markup=False, highlight=False)


def note(text: object) -> None:
    """A line on stderr."""
    err.print(text, markup=False, highlight=False)


def say_figures(table: Table) -> None:
    """A table of figures on stdout, as for 80 columns in a terminal that is narrower: no figure is cut then."""
    wide = Console(width=80)
    whole = Measurement.get(wide, wide.options, table).maximum
    Console(width=max(out.width, whole), soft_wrap=True).print(table)


class Notes(logging.Handler):
    """Shows what the package logs as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(one_line(record.getMessage()))


def take_any_encoding() -> None:
    """What a terminal or a file has no letter for, λ in ASCII, is written as its number: `\\u03bb`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def json_alone(wanted: bool) -> bool:
    """With --json, keep stdout for the JSON alone: what rewards, libraries and their programs print goes to stderr.

    On the level of file descriptors, and for good, because programs and what runs at exit print too.
    """
    global _for_json
    if wanted and _for_json is None and sys.stdout is not None:
        sys.stdout.flush()
        _for_json = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        os.dup2(2, 1)
    return wanted


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    stream = _for_json or sys.stdout
    in_letters = (stream.encoding or "").lower().replace("-", "") == "utf8"
    stream.write(json.dumps(value, ensure_ascii=not in_letters, allow_nan=False) + "\n")
    stream.flush()


@contextmanager
def progress(title: str) -> Iterator[Tell]:
    """A progress bar on stderr with the time left, or a line a minute in a log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    logged = time.monotonic()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def tell(what: str | None, done: int, total: int) -> None:
            nonlocal logged
            endings.check()
            bar.update(task, description=what or title, completed=done, total=total)
            if not err.is_terminal and time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                note(f"{what or title}: {done} of {total}")

        yield tell


def fidelity_table(
    results: list[dict[str, Any]], columns: Sequence[str] | None = None, extra: dict[str, list[str]] | None = None
) -> Table:
    """A table of `compare`'s results; `extra`: further columns by title, a text for each result."""
    from ..pages.fidelity import COLUMNS, cells

    left_out = ("tokens", "kl_rounding", "verdict")  # so that it fits 80 columns; the report has all
    fits = [column for column in COLUMNS if column not in left_out]
    wanted, extra = columns or fits, extra or {}
    table = Table(title="Merged against exact DeRa", **PLAIN)
    for column in (*wanted, *extra):
        table.add_column("λ" if column == "lambda" else column, justify="right", overflow="fold")
    for result, *extra_cells in zip(results, *extra.values(), strict=True):
        row = dict(zip(COLUMNS, cells(result), strict=True))
        table.add_row(*(row[column] for column in wanted), *extra_cells)
    return table


def in_plain_words(message: str) -> str:
    """What is wrong with an option, without the words of the library that checks them."""
    for theirs, ours in _OF_PYDANTIC.items():
        message = re.sub(theirs, ours, message)
    return message


def one_line(error: BaseException | str) -> str:
    """An error's message as one line, control characters escaped."""
    text = " ".join(part.strip() for part in str(error).splitlines() if part.strip()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
