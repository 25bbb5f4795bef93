"""A checkpoint on disk: which tensors it holds and where, and sliced reads.

This file knows the safetensors format and the names that transformers gives its files, and nothing about models. It
reads with plain reads (not mmap, whose pages count as this process's memory) and trusts no header: every offset is
checked against the file before the first tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import DeraError
from .atomic import load_json
from .buffers import as_bytes
from .places import instead

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
CHUNK = 1 << 20  # elements of a tensor that are handed from thread to thread at a time
SLICE = 1 << 19  # elements that are computed at a time: as many as stay in a core's cache
_INSTEAD = {  # how files begin that are often found under this name
    b"version ": "a pointer of Git LFS: git lfs pull fetches the file",
    b"<": "a web page: fetch the file again",
    b"PK\x03\x04": "a pickled file of torch: name it .bin and pass --allow-pickle",
    b"GGUF": "a GGUF file, which is for llama.cpp: give the model that it was made of",
}
_SAMPLE = 4096  # bytes that are looked at in three places of a tensor


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
        """Shape of one row: the last axis, or () for the elements of a vector."""
        return self.shape[-1:] if len(self.shape) > 1 else ()


def slices(
    info: TensorInfo, elements: int = CHUNK, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a tensor's rows [start, stop) in pieces of about `elements` elements."""
    stop = info.rows if stop is None else stop
    step = max(1, elements // max(1, math.prod(info.row_shape)))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes of all these tensors together."""
    return sum(info.nbytes for info in infos)


def sampled(info: TensorInfo) -> bytes:
    """Some bytes of a stored tensor: 4 KiB each from the beginning, the middle and the end."""
    found = b""
    with info.file.open("rb") as stream:
        for start in sorted({0, max(0, info.nbytes // 2 - _SAMPLE // 2), max(0, info.nbytes - _SAMPLE)}):
            stream.seek(info.offset + start)
            found += stream.read(min(_SAMPLE, info.nbytes - start))
    return found


def alike(one: Mapping[str, TensorInfo], other: Mapping[str, TensorInfo]) -> bool:
    """Whether two sets of tensors have the same names, dtypes, shapes, and the same bytes wherever `sampled` looks."""
    return one.keys() == other.keys() and all(
        (info.dtype, info.shape) == (other[name].dtype, other[name].shape) and sampled(info) == sampled(other[name])
        for name, info in one.items()
    )


class PickledOnly(DeraError):
    """Weights are there, but reading them may run code, which was not allowed."""


class Checkpoint:
    """The tensors of one directory, read slice by slice.

    Args:
        folder: a local directory.
        stem: `"model"` for a model's weights, `"adapter_model"` for a PEFT adapter's.
        allow_pickle: read `.bin` files (`torch.load(weights_only=True)`) where there is no safetensors file.

    Attributes:
        files: the weight files that it is read from.

    Raises:
        DeraError: there are no weights, or a file is not what it says it is.
    """

    def __init__(self, folder: Path, stem: str = "model", allow_pickle: bool = False) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self._open: dict[Path, BinaryIO] = {}
        self._held: dict[str, tuple[torch.Tensor, int]] = {}  # in memory, and how many hold it there
        self._lock = threading.Lock()  # of what is held
        self._stem, self._pickled_stem = stem, "pytorch_model" if stem == "model" else stem
        files = _shards(folder, f"{stem}.safetensors")
        if files:
            for file, expected in files.items():
                header = read_header(file)
                self._add(header, file, expected)
        elif pickles := _shards(folder, f"{self._pickled_stem}.bin"):
            if not allow_pickle:
                raise PickledOnly(
                    f"{folder} has only pickled weights ({next(iter(pickles)).name}), which can run code when read; "
                    "convert them to safetensors, or pass --allow-pickle to read them with weights_only=True"
                )
            for file, expected in pickles.items():
                self._add(self._unpickle(file), file, expected)
        else:
            missing = f"neither {stem}.safetensors nor {stem}.safetensors.index.json"
            raise DeraError(f"{folder} holds no weights: {missing}{instead(folder)}")
        self.files = tuple(files or pickles)

    def unread(self) -> list[Path]:
        """Weight files of the directory that are not read, since others come first or no index names them.

        Not `consolidated.safetensors`, which Mistral's own programs read.
        """
        safe = "*" if self._stem == "model" else f"{self._stem}*"  # beside an adapter a model may lie
        beside = [*self.folder.glob(f"{safe}.safetensors"), *self.folder.glob(f"{self._pickled_stem}*.bin")]
        return sorted(file for file in beside if file not in self.files and not file.match("consolidated*"))

    def is_copy_of(self, other: Checkpoint) -> bool:
        """Whether both hold the same tensors, bit for bit; it reads them whole only where samples do not differ."""
        if self is other:
            return True
        return alike(self.tensors, other.tensors) and all(
            torch.equal(self.read(name, *rows).view(torch.uint8), other.read(name, *rows).view(torch.uint8))
            for name, info in self.tensors.items()
            for rows in slices(info)
        )

    def _add(self, tensors: dict[str, TensorInfo], file: Path, expected: set[str] | None) -> None:
        if expected is not None and (lost := expected - tensors.keys()):
            raise DeraError(f"{file} lacks tensor {min(lost)}, which its index says it holds; fetch the file again")
        if twice := tensors.keys() & self.tensors.keys():
            raise DeraError(f"{file} holds tensor {min(twice)}, which another shard of {self.folder} holds too")
        self.tensors |= tensors

    def _unpickle(self, file: Path) -> dict[str, TensorInfo]:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises a dozen kinds here, all of which mean the same
            raise DeraError(f"{file} is not a state dict that weights_only=True can read: {error}") from error
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise DeraError(f"{file} is not a state dict of tensors")
        self._pickled |= state
        return {name: TensorInfo(t.dtype, tuple(t.shape), file) for name, t in state.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its stored dtype; shape (stop-start, last axis), or (stop-start,).

        `out` is memory to read into: contiguous, of that shape and dtype.
        """
        info = self.tensors[name]
        stop = info.rows if stop is None else stop
        if out is None:
            out = torch.empty((stop - start, *info.row_shape), dtype=info.dtype)
        held = self._held.get(name)
        whole = self._pickled.get(name) if held is None else held[0]
        if whole is not None:
            return out.copy_(whole.reshape(info.rows, *info.row_shape)[start:stop])
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

    def hold(self, name: str) -> None:
        """Keep a tensor in memory, from which `read` then takes it, until `let_go` is called as often as this."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._held[name] = held[0], held[1] + 1
                return
        whole = self.read(name)
        with self._lock:  # another thread may have read it meanwhile
            first, count = self._held.get(name, (whole, 0))
            self._held[name] = first, count + 1

    def let_go(self, name: str) -> None:
        """Undo one `hold`."""
        with self._lock:
            whole, count = self._held.pop(name)
            if count > 1:
                self._held[name] = whole, count - 1


def _read_at(file: BinaryIO, into: memoryview, position: int) -> int:
    """Read at a position; several threads may read one file. Returns the number of bytes, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [into], position)
    with open(file.name, "rb", buffering=0) as stream:
        stream.seek(position)
        return stream.readinto(into)


def _shards(folder: Path, single: str) -> dict[Path, set[str] | None]:
    """The weight files of a folder and what the index says each holds (None: there is no index).

    Where there are both a single file and shards, transformers reads the single file.

    Raises:
        DeraError: the index is broken, or there are both and they are not the same weights.
    """
    index = folder / f"{single}.index.json"
    if (folder / single).is_file():
        if index.is_file() and (shards := stale_shards(index)):
            raise DeraError(
                f"{folder} holds two sets of weights that differ: {single}, which transformers reads, and the "
                f"{len(shards)} shards of {index.name}; remove the one that is stale"
            )
        return {folder / single: None}
    return indexed(index) if index.is_file() else {}


def stale_shards(index: Path) -> list[Path]:
    """The shards of an index that are all there and hold other weights than the single file beside them."""
    single = index.with_name(index.name.removesuffix(".index.json"))
    try:
        shards = list(indexed(index))
    except DeraError:  # what is left of an index, or of its shards, misleads nobody: transformers does not read it
        return []
    if shards == [single]:
        return []
    if single.suffix != ".safetensors":
        return shards
    held = {name: info for shard in shards for name, info in read_header(shard).items()}
    return [] if alike(held, read_header(single)) else shards


def indexed(index: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, and the tensors that it says each holds.

    Raises:
        DeraError: it is no index, points outside of its directory, or a shard is not there.
    """
    folder = index.parent
    content = load_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
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
        if odd := next((what for start, what in _INSTEAD.items() if head.startswith(start)), None):
            raise DeraError(f"{file} is not a safetensors file, but {odd}")
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
        raise DeraError(
            f"{file} has {size} bytes, its header says {data + position}; it is truncated or was tampered with"
        )
    return tensors
