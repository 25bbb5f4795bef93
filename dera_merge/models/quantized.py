"""The base that a QLoRA adapter was trained on: the weights as 4-bit quantisation and back leave them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from threading import Lock
from typing import Literal, get_args

import torch

from ..errors import DeraError
from ..files.checkpoint import REAL, Checkpoint, TensorInfo

BaseQuantisation = Literal["nf4", "nf4-double", "fp4", "fp4-double"]
# What formats of quantised weights call the tensors that they add.
_OF_QUANTISED = re.compile(
    r"quant_(state|map)|absmax|\.(qweight|qzeros|scales|g_idx|SCB|codes|codebooks|W_q)$"
    r"|_(scale|scale_inv|scales|packed|zero_point|blocks)$"
)


def quantised_tensor(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first sign of quantised weights among a checkpoint's tensors; None where its config alone may say so."""
    return next(
        (
            name for name, info in tensors.items()
            if _OF_QUANTISED.search(name) or (name.endswith("weight") and info.dtype not in REAL)
        ),
        None,
    )  # fmt: skip


class Requantised:
    """dequant(quant(W)) of some tensors of a checkpoint, one tensor in memory at a time.

    As transformers does with `BitsAndBytesConfig(load_in_4bit=True)`: blocks of 64 weights, each tensor from and to the
    dtype that it is stored in; `-double` quantises the blocks' scales too (`bnb_4bit_use_double_quant`), as QLoRA does
    (Dettmers et al., 2023).

    Args:
        checkpoint: the dense base.
        keys: the tensors that quantisation touches: the weights of linear layers, the head left out.
        kind: `nf4`, `nf4-double`, `fp4`, `fp4-double`.

    Raises:
        DeraError: the kind is unknown, or bitsandbytes is not installed.
    """

    def __init__(self, checkpoint: Checkpoint, keys: Collection[str], kind: str) -> None:
        if kind not in get_args(BaseQuantisation):
            raise DeraError(f"{kind!r} is no --base-quantization; use {', '.join(get_args(BaseQuantisation))}")
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise DeraError("--base-quantization needs bitsandbytes: pip install 'bitsandbytes>=0.47.0'") from None
        self.kind = kind
        self._checkpoint = checkpoint
        self.keys = frozenset(keys)
        self._lock = Lock()
        self._latest: tuple[str, torch.Tensor] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self.keys

    def rows(self, key: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows [start, stop) of the tensor, in its stored dtype."""
        with self._lock:  # the slices of one tensor are asked for by several threads, one after another
            if self._latest is None or self._latest[0] != key:
                self._latest = None
                self._latest = (key, self._dequantised(key))
            return self._latest[1][start:stop]

    def _dequantised(self, key: str) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        name, _, double = self.kind.partition("-")
        packed, state = quantize_4bit(
            self._checkpoint.read_whole(key), quant_type=name, compress_statistics=bool(double)
        )
        return dequantize_4bit(packed, state)
