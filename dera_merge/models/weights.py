"""A side's effective weights, a few rows at a time: what both forms of the paper read.

`Stored` gives a base checkpoint's tensors by the names that they are stored under, `Weights` a side's effective ones by
the names of θ(λ): the base's rows, and then what the adapter does to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..files.buffers import Buffers
from ..files.checkpoint import Checkpoint, TensorInfo
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

    def is_requantised(self, key: str) -> bool:
        return self.requantised is not None and key in self.requantised

    def rows(self, key: str, start: int, stop: int, out: torch.Tensor, buffers: Buffers) -> None:
        """Rows [start, stop) of a tensor into `out`, in the dtype of `out`."""
        info = self.checkpoint.tensors[key]
        if self.requantised is not None and key in self.requantised:
            out.copy_(self.requantised.rows(key, start, stop))
        elif info.dtype == out.dtype:
            self.checkpoint.read(key, start, stop, out)
        else:
            out.copy_(self.checkpoint.read(key, start, stop, buffers.take("stored", tuple(out.shape), info.dtype)))

    def whole(self, key: str) -> torch.Tensor:
        """A tensor in its own shape, float32."""
        info = self.checkpoint.tensors[key]
        out = torch.empty((info.rows, *info.row_shape), dtype=torch.float32)
        self.rows(key, 0, info.rows, out, Buffers())
        return out.view(info.shape)


@dataclass(frozen=True, eq=False)
class Weights:
    """The effective weights of one side, by the names of θ(λ).

    Attributes:
        stored: the base's tensors.
        keys: name → the name that the base stores it under.
        pieces: name → what the adapter does to it, in this order; names that it leaves alone are not there.
    """

    stored: Stored
    keys: Mapping[str, str]
    pieces: Mapping[str, Sequence[Piece]]

    def info(self, name: str) -> TensorInfo:
        """Where the base's tensor lies, and its shape and dtype there."""
        return self.stored.checkpoint.tensors[self.keys[name]]

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
