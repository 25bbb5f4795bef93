"""θ(λ): the curve through the reference and the aligned model, one slice of one tensor at a time.

This is the whole of the merge. `blend` is the formula, `Slice.at` the one place where a value is rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .checkpoint import REAL, TensorInfo
from .errors import DeraError
from .pair import ModelPair
from .rounding import Rounding, round_to


def output_dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor of θ(λ) is stored as; None keeps REF's dtype, as do tensors that are not real numbers."""
    return info.dtype if dtype is None or info.dtype not in REAL else dtype


def blend(ref: torch.Tensor, aligned: torch.Tensor, lam: float) -> torch.Tensor:
    """(1-λ)·θ_ref + λ·θ_aligned, which is θ_ref + λΔ, but exact at both ends and where Δ = 0."""
    if lam == 0.0:
        return ref
    if lam == 1.0:
        return aligned
    return torch.where(ref == aligned, ref, (1.0 - lam) * ref + lam * aligned)


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of one tensor of a pair, read once and blended at as many λ as wanted.

    Attributes:
        ref: θ_ref in the compute dtype, or as stored where the two sides are the same tensor.
        aligned: θ_aligned in the compute dtype, or None where the two sides are the same tensor.
    """

    name: str
    start: int  # flat index of the first element
    dtype: torch.dtype  # of the output
    ref: torch.Tensor
    aligned: torch.Tensor | None

    @classmethod
    def read(cls, pair: ModelPair, name: str, start: int, stop: int, dtype: torch.dtype) -> Slice:
        """Read both sides. 16-bit outputs are computed in float32, wider ones in float64."""
        ref_info, aligned_info = pair.ref.info(name), pair.aligned.info(name)
        first = start * math.prod(ref_info.row_shape)
        touched = name in pair.ref.pieces or name in pair.aligned.pieces
        if ref_info.dtype not in REAL or (ref_info is aligned_info and not touched):
            return cls(name, first, dtype, pair.ref.stored_rows(name, start, stop), None)
        compute = torch.float32 if dtype.itemsize == 2 else torch.float64
        ref = pair.ref.rows(name, start, stop, compute)
        common = max(start, min(stop, aligned_info.rows))
        aligned = pair.aligned.rows(name, start, common, compute)
        if common < stop:  # padding rows of the vocabulary that only REF has
            aligned = torch.cat([aligned, ref[common - start :]])
        return cls(name, first, dtype, ref, aligned)

    def value(self, lam: float) -> torch.Tensor:
        """θ(λ) before rounding."""
        return self.ref if self.aligned is None else blend(self.ref, self.aligned, lam)

    def rounded(self, value: torch.Tensor, rounding: Rounding, seed: int) -> torch.Tensor:
        """A value of `self.value` as stored, same shape.

        What came from the output dtype is held by it exactly, so every rounding returns its bits: at λ=0 and λ=1, and
        wherever Δ = 0, the inputs' own bits come out.

        Raises:
            DeraError: a value is NaN or infinite, other than an infinity that both inputs hold.
        """
        if self.aligned is not None and (odd := ~torch.isfinite(value) & (self.ref != self.aligned)).any():
            raise DeraError(f"tensor {self.name}: {int(odd.sum())} merged values are NaN or infinite; is an input broken?")
        if value.dtype == self.dtype:
            return value
        return round_to(value, self.dtype, rounding, seed, self.name, self.start)


def layer_kind(name: str) -> str:
    """What kind of layer a tensor belongs to: `self_attn.q_proj` for `model.layers.7.self_attn.q_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    inner = parts[numbers[-1] + 1 :] if numbers else parts[-1:]
    return ".".join(inner) or name
