"""Rows of prompt files as they exist: text lines, JSON in its layouts, CSV, parquet, data sets of the Hub.

What a file is, is told by its first bytes, and by its name where bytes do not say. Lines of text are prompts only where
neither promises anything else.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DeraError
from .forms import KNOWN

Rows = Iterable[tuple[str, Any]]  # where in the file, as an error says it; and the row

JSON_NAMES = (".json", ".jsonl", ".ndjson")
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # the likelier first
STRANGERS = (".yaml", ".yml", ".toml", ".xml", ".html", ".arrow", ".xlsx")  # some would pass for lines of text
ARRAY = re.compile(r"\s*\[\s*[\[\]{\"]")  # "[INST] …" is a line of text
PLACE = re.compile(r"(?:hf://datasets/)?(?P<place>.+?)(?::(?P<split>\w[\w.+-]*(?:\[[^\]]*\])?))?")
HUB = re.compile(r"(?P<id>[\w-][\w.-]*(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
FORMS = "a file (text lines, JSON, JSON Lines, CSV, TSV, parquet), a directory, or a data set of the Hub as ID:SPLIT"
EXTRA = "pip install 'datasets>=4.0.0' 'pyarrow>=21.0.0'"


def rows(source: str | os.PathLike[str], limit: int | None = None) -> list[tuple[str, Any]]:
    """The rows of a prompt file, or of a data set.

    Args:
        source: a file, gzipped or not; a directory that `datasets` can load, maybe with `:SPLIT`; or a data set of the
            Hub, `ID[/CONFIG][@REVISION]:SPLIT`, maybe behind `hf://datasets/`. SPLIT may be a slice, `test[:100]`.
        limit: how many to read; default all.

    Returns:
        Where each row stands, for errors, and the row.

    Raises:
        DeraError: it cannot be read, or is none of these.
    """
    if not os.fspath(source):
        raise DeraError(f"prompts: no name is given; give {FORMS}")
    path = Path(source)
    found = _of_file(path) if path.exists() and not path.is_dir() else _of_data_set(os.fspath(source))
    return list(itertools.islice(found, limit))


def _of_file(path: Path) -> Rows:
    try:
        content = path.read_bytes()  # whole, as it may be a pipe
        name = path
        if content[:2] == b"\x1f\x8b":
            content, name = gzip.decompress(content), path.with_suffix("")
        if content[:4] == b"PAR1":
            return _of_parquet(path, content)
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DeraError(f"prompts {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        packed = "what it holds packed is no text, or " if name != path else ""
        raise DeraError(f"prompts {path} cannot be read as UTF-8 text: {packed}{error}") from error
    if "\0" in text:
        raise DeraError(f"prompts {path} cannot be read as UTF-8 text: it holds zero bytes; is it UTF-16?")
    kind = name.suffix.lower()
    if kind in STRANGERS:
        raise DeraError(f"prompts {path}: {kind} is no form that is known; give {FORMS}")
    if kind in DELIMITERS:
        return _of_table(path, text, DELIMITERS[kind])
    if kind in JSON_NAMES or ARRAY.match(text):
        return _of_json(path, text)
    return _of_lines(path, text)


def _of_table(path: Path, text: str, delimiters: str) -> Rows:
    """Rows of CSV or TSV, whose first line names the columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # by default a long text is an error
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=True, delimiter=max(delimiters, key=text.partition("\n")[0].count)
    )
    try:
        names = next(reader, [])
        if not set(names) & set(KNOWN):
            raise DeraError(f"{path} begins with {', '.join(names)[:80]!r}; give a first line that names the columns, "
                            f"one of them {', '.join(KNOWN)}")  # fmt: skip
        for cells in reader:
            if len(cells) == len(names):
                yield f"line {reader.line_num}", dict(zip(names, cells, strict=True))
            elif cells:
                raise DeraError(f"{path}, line {reader.line_num}: {len(cells)} cells for {len(names)} columns; a text "
                                "that holds the delimiter needs quotes")  # fmt: skip
    except csv.Error as error:
        raise DeraError(f"{path}, line {reader.line_num}: {error}") from error


def _of_json(path: Path, text: str) -> Rows:
    """Rows of JSON Lines, of one array or object of arrays, or of objects one after the other, however indented."""
    values = list(_values(path, text))
    content = values[0][1] if len(values) == 1 else None
    if isinstance(content, dict) and not content.keys() & set(KNOWN):
        tables = [part for part in content.values() if isinstance(part, list) and isinstance(next(iter(part), 0), dict)]
        content = tables[0] if len(tables) == 1 else None
    if not isinstance(content, list):
        return values
    return [
        (f"entry {number}", {"prompt": row} if isinstance(row, str) else row) for number, row in enumerate(content, 1)
    ]


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The JSON values of a text, one after the other, and the line on which each begins."""
    decoder, place, line = json.JSONDecoder(), 0, 1
    while match := re.compile(r"\s*(?=\S)").match(text, place):
        line += text.count("\n", place, match.end())
        try:
            value, end = decoder.raw_decode(text, match.end())
        except (ValueError, RecursionError) as error:
            # A broken line is the one on which its value begins; a broken array is broken where the parser stops.
            at = getattr(error, "lineno", line) if ARRAY.match(text) else line
            raise DeraError(f"{path}, line {at}: {getattr(error, 'msg', error)}") from error
        yield f"line {line}", value
        line += text.count("\n", match.end(), end)
        place = end


def _of_lines(path: Path, text: str) -> Rows:
    """Lines of text, among them maybe lines of JSON; or JSON objects that are indented."""
    if text.lstrip().startswith("{"):
        try:
            yield from list(_of_json(path, text))
            return
        except DeraError:
            pass
    # Not splitlines: U+2028 and its kind may stand inside a JSON text or a prompt.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.lstrip().startswith("{"):
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DeraError(f"{path}, line {number}: {error}") from error
        elif line.strip():
            yield f"line {number}", {"prompt": line}


def _of_parquet(path: Path, content: bytes) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DeraError(f"parquet files need pyarrow: {EXTRA}") from error
    try:
        batches = parquet.ParquetFile(io.BytesIO(content)).iter_batches(1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise DeraError(f"{path} is no parquet file that can be read: {error}") from error


def _of_data_set(source: str) -> Rows:
    """Rows of a directory, or of a data set of the Hub, by `datasets`; it runs no code of theirs."""
    place, split = PLACE.fullmatch(source).group("place", "split")
    hub = HUB.fullmatch(place)
    is_folder = Path(place).is_dir()
    if not is_folder and not (hub and (split or source.startswith("hf://"))):
        raise DeraError(f"prompts {source} cannot be read: there is no such file or directory; give {FORMS}")
    try:
        import datasets
    except ImportError as error:
        raise DeraError(f"data sets need the library datasets: {EXTRA}") from error
    datasets.disable_progress_bars()
    try:
        if is_folder and any((Path(place) / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(place)
        elif is_folder:
            found = datasets.load_dataset(place, split=split)
        else:
            found = datasets.load_dataset(hub["id"], hub["config"], revision=hub["revision"], split=split)
    except Exception as error:  # of the network, of files, of columns that differ
        raise DeraError(f"the data set {source} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(found, dict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            first, *_ = found
            raise DeraError(f"the data set {place} has the splits {', '.join(found)}; give {place}:{first}, say")
        found = found[split]
    for number, row in enumerate(found, 1):
        yield f"row {number}", row
