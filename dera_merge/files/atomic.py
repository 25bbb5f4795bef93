"""Small files: written so that they are absent or whole, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DeraError

MAX_JSON = 100_000_000  # bytes of a config, an index, an adapter's settings


def open_new(file: Path) -> BinaryIO:
    """Open a new file for writing, with the permissions of the umask; a symlink of that name is not followed."""
    file.unlink(missing_ok=True)
    return open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0)


def write_all(stream: BinaryIO, view: memoryview) -> None:
    """Write every byte; one call of an unbuffered `write` may take fewer."""
    while view:
        view = view[stream.write(view) :]


def write_atomically(file: Path, content: bytes) -> str:
    """Write a small file so that it is either absent or whole, and return its SHA-256."""
    # Several processes may write the same file, so each has a temporary name of its own.
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with open_new(temporary) as stream:
            write_all(stream, memoryview(content))
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)  # of a disk that is full, or of an interruption
    return hashlib.sha256(content).hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON as dera-merge writes it: indented, keys in the order given, never NaN or Infinity."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def load_json(path: Path) -> Any:
    """Read JSON from a file.

    Raises:
        DeraError: it is larger than `MAX_JSON`, is not JSON, is nested too deep, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise DeraError(f"{path} has the key {max(keys, key=keys.count)!r} twice")
        return result

    if path.stat().st_size > MAX_JSON:
        raise DeraError(f"{path} has {path.stat().st_size} bytes, too many for a JSON file of settings")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DeraError(f"{path} is not valid JSON: {error}") from error


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
