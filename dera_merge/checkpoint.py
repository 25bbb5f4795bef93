"""A checkpoint on disk: which tensors it holds and where, sliced reads, streamed writes.

This file knows the safetensors format and the names that transformers gives its files, and nothing about models. It
reads with plain reads (not mmap, whose pages count as this process's memory) and trusts no header: every offset is
checked against the file before the first tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import DeraError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):  # the scales of MX formats; torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # the dtypes that θ_ref + λΔ is defined on

MAX_HEADER = 100_000_000  # bytes; the same limit as the safetensors library
_WORTH_A_THREAD = 1 << 16  # bytes
_FLUSH = 1 << 28  # bytes written before the disk is set to work on them
MAX_JSON = 100_000_000  # bytes of a config, an index, an adapter's settings
CHUNK = 1 << 20  # elements of a tensor that are handed from thread to thread at a time
SLICE = 1 << 19  # elements that are computed at a time: as many as stay in a core's cache


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies: `nbytes` bytes from byte `offset` of `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: all axes but the last, or the elements of a vector."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.numel

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[-1:] if len(self.shape) > 1 else ()


def slices(
    info: TensorInfo, elements: int = CHUNK, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a tensor's rows [start, stop) in pieces of about `elements` elements."""
    stop = info.rows if stop is None else stop
    step = max(1, elements // max(1, math.prod(info.row_shape)))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


class Checkpoint:
    """The tensors of one directory, read slice by slice.

    Args:
        folder: a local directory.
        stem: `"model"` for a model's weights, `"adapter_model"` for a PEFT adapter's.
        allow_pickle: read `.bin` files (`torch.load(weights_only=True)`) where there is no safetensors file.

    Raises:
        DeraError: there are no weights, or a file is not what it says it is.
    """

    def __init__(self, folder: Path, stem: str = "model", allow_pickle: bool = False) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._open: dict[Path, BinaryIO] = {}
        files = _shards(folder, f"{stem}.safetensors")
        if files:
            for file, expected in files.items():
                header = read_header(file)
                self._add(header, file, expected)
        elif pickles := _shards(folder, f"{'pytorch_model' if stem == 'model' else stem}.bin"):
            if not allow_pickle:
                raise DeraError(
                    f"{folder} has only pickled weights ({next(iter(pickles)).name}), which can run code when read; "
                    "convert them to safetensors, or pass --allow-pickle to read them with weights_only=True"
                )
            for file, expected in pickles.items():
                self._add(self._unpickle(file), file, expected)
        else:
            raise DeraError(f"{folder} holds no weights: neither {stem}.safetensors nor {stem}.safetensors.index.json")

    def _add(self, found: dict[str, TensorInfo], file: Path, expected: set[str] | None) -> None:
        if expected is not None and (lost := expected - found.keys()):
            raise DeraError(f"{file} lacks tensor {min(lost)}, which its index says it holds; fetch the file again")
        if twice := found.keys() & self.tensors.keys():
            raise DeraError(f"{file} holds tensor {min(twice)}, which another shard of {self.folder} holds too")
        self.tensors |= found

    def _unpickle(self, file: Path) -> dict[str, TensorInfo]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises a dozen kinds here, all of which mean the same
            raise DeraError(f"{file} is not a state dict that weights_only=True can read: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise DeraError(f"{file} is not a state dict of tensors")
        self._pickled |= state
        return {name: TensorInfo(t.dtype, tuple(t.shape), file) for name, t in state.items()}

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its stored dtype; shape (stop-start, last axis), or (stop-start,).

        `out` is memory to read into: contiguous, of that shape and dtype.
        """
        info = self.tensors[name]
        stop = info.rows if stop is None else stop
        if out is None:
            out = torch.empty((stop - start, *info.row_shape), dtype=info.dtype)
        if name in self._pickled:
            return out.copy_(self._pickled[name].reshape(info.rows, *info.row_shape)[start:stop])
        position = info.offset + start * math.prod(info.row_shape) * info.dtype.itemsize
        view = memoryview(as_bytes(out))
        if info.file not in self._open:
            self._open[info.file] = info.file.open("rb", buffering=0)
        while view:
            count = _read_at(self._open[info.file], view, position)
            if not count:
                raise DeraError(f"{info.file} ended while tensor {name} was read; the file is truncated")
            view, position = view[count:], position + count
        return out

    def read_whole(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored dtype and shape."""
        return self.read(name).reshape(self.tensors[name].shape)


def _read_at(file: BinaryIO, into: memoryview, position: int) -> int:
    """Read at a position; several threads may read one file. Returns the number of bytes, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [into], position)
    with open(file.name, "rb", buffering=0) as own:
        own.seek(position)
        return own.readinto(into)


class Buffers:
    """Memory that one worker uses again and again: fresh pages cost more than the arithmetic that is done in them."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}  # a view costs some microseconds
        self._parts: dict[int, Buffers] = {}

    def part(self, number: int) -> Buffers:
        """Memory of its own, which is used again just so."""
        return self._parts.setdefault(number, Buffers())

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor; the next `take` for the same `use` overwrites it."""
        view = self._views.get((use, shape, dtype))
        if view is None:
            size = math.prod(shape) * dtype.itemsize
            if use not in self._memory or self._memory[use].numel() < size:
                self._memory[use] = torch.empty(size, dtype=torch.uint8)
                self._views = {key: kept for key, kept in self._views.items() if key[0] != use}
            view = self._views[use, shape, dtype] = self._memory[use][:size].view(dtype).view(shape)
        return view


def as_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous CPU tensor as a numpy array that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def load_json(path: Path) -> Any:
    """JSON from a file; refuses duplicate keys and nesting deep enough to exhaust the stack, in one line."""

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


def _shards(folder: Path, single: str) -> dict[Path, set[str] | None]:
    """The weight files of a folder and what the index says each holds (None: there is no index)."""
    if (folder / single).is_file():
        return {folder / single: None}
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return {}
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DeraError(f"{index} has no weight_map of tensor names to file names")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise DeraError(f"{index} points outside its directory: {file!r}")
        if not (folder / file).is_file():
            raise DeraError(f"{folder} lacks the shard {file} that its index names; fetch it again")
        held = shards.setdefault(folder / file, set())
        assert held is not None
        held.add(name)
    return shards


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, every claim of its header checked against the file's size.

    Raises:
        DeraError: the header is longer than the file or than 100 MB, is not JSON, names an unknown dtype, or its
            offsets overlap, leave holes, or do not match shapes.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or length > min(MAX_HEADER, size - 8):
            raise DeraError(f"{file} is not a safetensors file: its header does not fit in it ({size} bytes)")
        raw = stream.read(length)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise DeraError(f"{file} names a tensor or a field twice in its header")
        return dict(pairs)

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise DeraError(f"{file} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise DeraError(f"{file} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)

    data = 8 + length
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise DeraError(f"{file}: tensor {name!r} has no proper dtype, shape and data_offsets")
        if dtype not in DTYPES:
            raise DeraError(f"{file}: tensor {name!r} has dtype {dtype}, which is not supported")
        info = TensorInfo(DTYPES[dtype], tuple(shape), file, data + begin)
        if end - begin != info.nbytes:
            raise DeraError(f"{file}: tensor {name!r} has {end - begin} bytes, but {dtype} {shape} takes {info.nbytes}")
        tensors[name] = info
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise DeraError(f"{file}: tensor {name!r} starts at byte {begin} of the data, expected {position}")
        position = end
    if data + position != size:
        raise DeraError(f"{file} has {size} bytes, its header says {data + position}; it is truncated or was tampered with")
    return tensors


class ShardWriter:
    """Writes one safetensors file front to back under a temporary name; `close` makes it visible.

    Args:
        file: the final name. Bytes go to `<name>.partial` until `close`.
        layout: name → (dtype, shape), in any order; the file's own order (wide dtypes first, so that all are aligned)
            is `self.order`, in which the tensors must be written.
    """

    def __init__(self, file: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.file = file
        self.order = file_order(layout)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name in self.order:
            dtype, shape = layout[name]
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._stream: BinaryIO = open_new(self._partial)
        self._hash = hashlib.sha256()
        self._left = position
        self._unflushed = 0
        self._threads = ThreadPoolExecutor(3)  # write, hash, and set the disk to work on what is written
        self._under_way: list[Future[Any]] = []
        self._flushing: Future[None] | None = None
        self._put(struct.pack("<Q", len(text)) + text)

    @property
    def _partial(self) -> Path:
        return self.file.with_name(self.file.name + ".partial")

    def _put(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        if len(view) < _WORTH_A_THREAD:
            self._hash.update(view)
            self._append(view)
        else:
            self._under_way += [self._threads.submit(self._hash.update, view), self._threads.submit(self._append, view)]

    def _append(self, view: memoryview) -> None:
        self._unflushed += len(view)
        _write_all(self._stream, view)
        if self._unflushed >= _FLUSH and (self._flushing is None or self._flushing.done()):
            if self._flushing:
                self._flushing.result()  # raises what the disk said
            self._unflushed = 0
            self._flushing = self._threads.submit(os.fsync, self._stream.fileno())

    def begin(self, rows: torch.Tensor) -> None:
        """Begin to append the next rows of the tensor whose turn it is; they must stay as they are until `settle`."""
        self.settle()
        self._left -= rows.numel() * rows.dtype.itemsize
        self._put(as_bytes(rows.contiguous()))

    def settle(self) -> None:
        """Wait until all that was begun is written. Raises OSError."""
        while self._under_way:
            self._under_way.pop().result()

    def write(self, rows: torch.Tensor) -> None:
        """Append the next rows of the tensor whose turn it is."""
        self.begin(rows)
        self.settle()

    def close(self) -> str:
        """Flush to disk, give the file its name, and return its SHA-256."""
        self.settle()
        if self._left:
            raise RuntimeError(f"{self._left} bytes of {self.file} were not written")
        self._threads.shutdown()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self.file)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close without a result; the `.partial` file stays."""
        self._threads.shutdown()
        self._stream.close()


def file_order(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The order of tensors within one file: wide dtypes first, then by name."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def open_new(file: Path) -> BinaryIO:
    """Open for writing a file that is made anew, with the modes of the umask; a symlink of that name is not followed."""
    file.unlink(missing_ok=True)
    return open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0)


def _write_all(stream: BinaryIO, view: memoryview) -> None:
    """Write every byte; one call of an unbuffered `write` may take fewer."""
    while view:
        view = view[stream.write(view) :]


def write_atomically(file: Path, content: bytes) -> str:
    """Write a small file so that it is either absent or whole, and return its SHA-256."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.partial")  # several processes may write the same file
    with open_new(temporary) as stream:
        _write_all(stream, memoryview(content))
        os.fsync(stream.fileno())
    temporary.replace(file)
    return hashlib.sha256(content).hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON as dera-merge writes it: indented, keys in the order given, never NaN or Infinity."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_of(file: Path) -> str:
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


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)
