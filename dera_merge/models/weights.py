"""A side's effective weights, a few rows at a time: what both forms of the paper read.

`Stored` gives a base checkpoint's tensors by the names that they are stored under, `Weights` a side's effective ones by
the names of θ(λ): the base's rows, and then what the adapter does to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..files.ahead import Source
from ..files.buffers import Buffers
from ..files.checkpoint import Checkpoint, TensorInfo
from .layout import Assembled, Key
from .pieces import Piece
from .quantized import Requantised


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors of a base checkpoint, as its adapters knew them in training.

    Attributes:
        checkpoint: the files.
        requantised: the weights that were in 4 bits then (QLoRA); None where all are taken as they are stored.
    """

    checkpoint: Checkpoint
    requantised: Requantised | None = None

    def info(self, key: Key) -> TensorInfo:
        """A tensor's shape and dtype, and where it lies."""
        return key.info if isinstance(key, Assembled) else self.checkpoint.tensors[key]

    def is_requantised(self, key: Key) -> bool:
        tensors = key.tensors if isinstance(key, Assembled) else (key,)
        return self.requantised is not None and any(name in self.requantised for name in tensors)

    def rows(self, key: Key, start: int, stop: int, out: torch.Tensor, buffers: Buffers) -> None:
        """Rows [start, stop) of a tensor into `out`, in the dtype of `out`."""
        if isinstance(key, Assembled):
            return self._assemble(key, start, stop, out, buffers)
        info = self.checkpoint.tensors[key]
        if self.requantised is not None and key in self.requantised:
            out.copy_(self.requantised.rows(key, start, stop))
        elif info.dtype == out.dtype:
            self.checkpoint.read(key, start, stop, out)
        else:
            out.copy_(self.checkpoint.read(key, start, stop, buffers.take("stored", tuple(out.shape), info.dtype)))
        return None

    def _assemble(self, key: Assembled, start: int, stop: int, out: torch.Tensor, buffers: Buffers) -> None:
        """Rows [start, stop) of a tensor that is stored in other shapes."""
        if not key.transposed:
            return self._lines(key, start, stop, out, buffers)
        height, width = key.info.shape[-2:]
        for block in range(start // height, -(-stop // height)):
            whole = buffers.take("transposed", (width, height), out.dtype)
            self._lines(key, block * width, (block + 1) * width, whole, buffers)
            first, last = max(start, block * height), min(stop, (block + 1) * height)
            out[first - start : last - start] = whole[:, first - block * height : last - block * height].T
        return None

    def _lines(self, key: Assembled, start: int, stop: int, out: torch.Tensor, buffers: Buffers) -> None:
        """Lines [start, stop) of what `key.runs` numbers: rows, or columns."""
        for first, last, which, line in key.runs.within(start, stop):
            read = self._columns if key.columns[which] else self.rows
            read(key.tensors[which], line, line + last - first, out[first - start : last - start], buffers)

    def _columns(self, key: str, start: int, stop: int, out: torch.Tensor, buffers: Buffers) -> None:
        """Columns [start, stop) of a stored tensor's matrices, numbered one after another, as the rows of `out`."""
        height, width = self.info(key).shape[-2:]
        for block in range(start // width, -(-stop // width)):
            whole = buffers.take("columns", (height, width), out.dtype)
            self.rows(key, block * height, (block + 1) * height, whole, buffers)
            first, last = max(start, block * width), min(stop, (block + 1) * width)
            out[first - start : last - start] = whole[:, first - block * width : last - block * width].T

    def height(self, key: Key, pieces: Sequence[Piece]) -> int:
        """Rows of a tensor once adapters have done this to it, which may bring more of the vocabulary."""
        return max(self.info(key).rows, *(piece.rows for piece in pieces), 0)

    def changed(
        self, key: Key, pieces: Sequence[Piece], start: int, stop: int, out: torch.Tensor, buffers: Buffers
    ) -> None:
        """Rows [start, stop) of a tensor with what adapters do to it; those that the base lacks begin as zeros."""
        common = max(start, min(stop, self.info(key).rows))
        self.rows(key, start, common, out[: common - start], buffers)
        out[common - start :] = 0.0
        for piece in pieces:
            piece.apply(out, start, stop)

    def whole(self, key: Key, pieces: Sequence[Piece] = ()) -> torch.Tensor:
        """A tensor with what adapters do to it, float32; in its own shape, but for rows that they bring."""
        info, height = self.info(key), self.height(key, pieces)
        out = torch.empty((height, *info.row_shape), dtype=torch.float32)
        self.changed(key, pieces, 0, height, out, Buffers())
        return out.view(info.shape) if height == info.rows else out


@dataclass(frozen=True, eq=False)
class Weights:
    """The effective weights of one side, by the names of θ(λ).

    Attributes:
        stored: the base's tensors.
        keys: name → the name that the base stores it under, or what it is put together from there.
        pieces: name → what the adapter does to it, in this order; names that it leaves alone are not there.
    """

    stored: Stored
    keys: Mapping[str, Key]
    pieces: Mapping[str, Sequence[Piece]]

    def info(self, name: str) -> TensorInfo:
        """Where the base's tensor lies, and its shape and dtype there."""
        return self.stored.info(self.keys[name])

    def sources(self, name: str) -> Iterator[Source]:
        """The stored tensors that it is made of, the adapter's included."""
        key = self.keys[name]
        yield from ((self.stored.checkpoint, each) for each in (key.tensors if isinstance(key, Assembled) else (key,)))
        for piece in self.pieces.get(name, ()):
            yield from piece.sources

    def rows(self, name: str) -> int:
        """Rows of the effective tensor: an adapter may bring more of the vocabulary than its base has."""
        return self.stored.height(self.keys[name], self.pieces.get(name, ()))

    def effective(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Effective rows [start, stop), float32."""
        rows = torch.empty((stop - start, *self.info(name).row_shape))
        self.stored.changed(self.keys[name], self.pieces.get(name, ()), start, stop, rows, Buffers())
        return rows

    def base_rows(self, name: str, start: int, stop: int, out: torch.Tensor, buffers: Buffers) -> None:
        """Rows [start, stop) of the base's tensor, any adapter left out, into `out`, in its dtype."""
        self.stored.rows(self.keys[name], start, stop, out, buffers)

    def adapt(self, name: str, start: int, stop: int, rows: torch.Tensor) -> None:
        """Make of the base's rows [start, stop) this side's effective ones, in place."""
        for piece in self.pieces.get(name, ()):
            piece.apply(rows, start, stop)

    def is_stored_as(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the effective weights are just the stored ones, in this dtype."""
        plain = name not in self.pieces and not self.stored.is_requantised(self.keys[name])
        return plain and self.info(name).dtype == dtype
