"""Write one safetensors file from front to back, hashed on the way, and visible only when it is whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .atomic import open_new, write_all
from .buffers import as_bytes
from .checkpoint import DTYPE_NAMES

_WORTH_A_THREAD = 1 << 16  # bytes; fewer are hashed and written by the caller
_FLUSH = 1 << 28  # bytes written before the disk is set to work on them


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
        write_all(self._stream, view)
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
        """Flush to disk, give the file its name, and return its SHA-256. Raises RuntimeError where rows are missing."""
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
