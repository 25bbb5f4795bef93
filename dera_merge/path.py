"""θ(λ): the curve through the reference and the aligned model, one slice of one tensor at a time.

This is the whole of the merge: `Slice.read` brings both sides of a few rows into memory, `Slice.at` is the formula and
the one place where a value is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from . import kernels
from .checkpoint import REAL, SLICE, Buffers, TensorInfo, slices
from .curve import Bend, Curve
from .errors import DeraError
from .lambdas import Lam, Vector
from .pair import ModelPair
from .rounding import Rounding, in_range, noise_for, round_to


def output_dtype(info: TensorInfo, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor of θ(λ) is stored as; None keeps REF's dtype, as do tensors that are not real numbers."""
    return info.dtype if dtype is None or info.dtype not in REAL else dtype


def step_back(ref: torch.Tensor, aligned: torch.Tensor, lam: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """-λΔ, never -0 where Δ = 0: what θ(λ) is, is θ_ref minus this, and x - 0 is x for both zeros."""
    first, second = (ref, aligned) if lam >= 0 else (aligned, ref)
    return torch.sub(first, second, out=out).mul_(abs(lam))


def blend(ref: torch.Tensor, aligned: torch.Tensor, lam: float) -> torch.Tensor:
    """θ_ref + λΔ, exact at both ends and where Δ = 0. Each operation rounds once, so slices do not change the bits."""
    if lam == 0.0:
        return ref
    if lam == 1.0:
        return aligned
    return torch.where(ref == aligned, ref, ref - step_back(ref, aligned, lam))  # ∞ - ∞ is NaN, though Δ = 0 there


@dataclass
class Sums:
    """What rounding made of λΔ, summed over weights; the sums in float64.

    Attributes:
        cross: ⟨stored - θ_ref, λΔ⟩.
        square: ‖λΔ‖².
        error: ‖stored - θ(λ)‖².
        weights: how many.
        saturated: weights whose θ(λ) is beyond the largest number of the output dtype, stored as that number.
        nonfinite: weights whose θ(λ) is NaN or infinite; they are left out of the sums above.
        moved: whether any stored weight differs from the reference's.
    """

    cross: float = 0.0
    square: float = 0.0
    error: float = 0.0
    weights: int = 0
    saturated: int = 0
    nonfinite: int = 0
    moved: bool = False

    def add(self, other: Sums) -> None:
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) or value if key == "moved" else getattr(self, key) + value)


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of one tensor of a pair, read once and blended at as many λ as wanted.

    Attributes:
        start: flat index of the first element.
        dtype, rounding, seed: how θ(λ) is stored; see `round_to`.
        ref: θ_ref in the compute dtype; as stored where the two sides are the same tensor, or nothing is lost by it.
        aligned: θ_aligned likewise, or None where the two sides are the same tensor.
        buffers: where all of it lies.
    """

    name: str
    start: int
    dtype: torch.dtype
    rounding: Rounding
    seed: int
    ref: torch.Tensor
    aligned: torch.Tensor | None
    buffers: Buffers

    @classmethod
    def read(
        cls, pair: ModelPair, name: str, start: int, stop: int, dtype: torch.dtype,
        rounding: Rounding = "nearest", seed: int = 0, buffers: Buffers | None = None,
    ) -> Slice:  # fmt: skip
        """Read both sides. 16-bit outputs are computed in float32, wider ones in float64."""
        buffers = buffers or Buffers()
        ref, aligned = pair.ref, pair.aligned
        info, other = ref.info(name), aligned.info(name)
        shape = (stop - start, *info.row_shape)
        how = (name, start * math.prod(info.row_shape), dtype, rounding, seed)
        if pair.is_same(name):
            stored = buffers.take("ref", shape, info.dtype)
            ref.base_rows(name, start, stop, stored, buffers)
            return cls(*how, stored, None, buffers)
        if dtype == torch.bfloat16 and ref.is_stored_as(name, dtype) and aligned.is_stored_as(name, dtype):
            compute = torch.bfloat16  # the compiled kernel widens on the way
        else:
            compute = torch.float32 if dtype.itemsize == 2 else torch.float64
        rows, theirs = (buffers.take(use, shape, compute) for use in ("ref", "aligned"))
        ref.base_rows(name, start, stop, rows, buffers)
        if other is info:
            theirs.copy_(rows)
        else:
            common = max(start, min(stop, other.rows))
            aligned.base_rows(name, start, common, theirs[: common - start], buffers)
            theirs[common - start :] = rows[common - start :]  # padding rows of the vocabulary that only REF has
        ref.adapt(name, start, stop, rows)
        aligned.adapt(name, start, stop, theirs)
        return cls(*how, rows, theirs, buffers)

    def at(
        self, lam: float, out: torch.Tensor | None = None, sums: Sums | None = None, allow_nonfinite: bool = False,
        bend: Bend | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """θ(λ) as stored, in `self.dtype`.

        What came from the output dtype is held by it exactly, so every rounding returns its bits: at λ=0 and λ=1, and
        wherever Δ = 0, the inputs' own bits come out.

        Args:
            lam: λ.
            out: memory for the result.
            sums: where to add what became of λΔ.
            allow_nonfinite: store NaN and infinity where θ(λ) is that.
            bend: how a learned path leaves the straight line here.

        Raises:
            DeraError: a value is NaN or infinite, other than an infinity that both inputs hold.
        """
        if self.aligned is None:
            return round_to(self.ref, self.dtype, self._noise, out)
        take, shape, compute = self.buffers.take, tuple(self.ref.shape), self.ref.dtype
        curved = bend is not None and bend.left is not None
        lam = lam if bend is None else bend.gain
        compiled = not curved and lam not in (0.0, 1.0) and self.dtype == torch.bfloat16 and compute != torch.float64
        if compiled and kernels.available():
            stored = torch.empty(shape, dtype=self.dtype) if out is None else out
            found = kernels.store_bfloat16(self.ref, self.aligned, lam, self._noise, stored)
            if found is not None:  # else something is not finite, or too large: the long way says what
                if sums is not None:
                    square, cross, lost, moved = found
                    sums.add(Sums(square - cross, square, lost, stored.numel(), moved=moved))
                return stored
        if compute == torch.bfloat16:
            return self._widened().at(lam, out, sums, allow_nonfinite, bend)
        step = step_back(self.ref, self.aligned, lam, out=take("step and error", (2, *shape), compute)[0])
        if lam in (0.0, 1.0):
            value = self.aligned if lam else self.ref
        else:
            value = torch.sub(self.ref, step, out=take("value", shape, compute))
        if curved:
            value = self._curved(value, bend)
        saturated = nonfinite = 0
        ordinary = in_range(value, self.dtype)
        if not ordinary:
            value = blend(self.ref, self.aligned, lam)
            value = self._curved(value, bend) if curved else value
            finite = value.isfinite()
            nonfinite = int((~finite & (self.ref != self.aligned)).sum())
            saturated = int((finite & (value.abs() > torch.finfo(self.dtype).max)).sum())
            if nonfinite and not allow_nonfinite:
                raise DeraError(
                    f"tensor {self.name}: {nonfinite} merged values are NaN or infinite; is an input broken? "
                    "--allow-nonfinite stores them"
                )
        stored = round_to(value, self.dtype, self._noise, out, ordinary)
        if sums is not None:
            sums.add(self._compare(stored, value))
            sums.add(Sums(saturated=saturated, nonfinite=nonfinite))
        return stored

    def against(self, stored: torch.Tensor) -> Sums:
        """What became of Δ in weights that claim to be the aligned model's; `stored` has the shape of this slice."""
        if self.ref.dtype.itemsize == 2:
            return self._widened().against(stored)
        aligned = self.ref if self.aligned is None else self.aligned
        both = self.buffers.take("step and error", (2, *self.ref.shape), self.ref.dtype)
        step_back(self.ref, aligned, 1.0, out=both[0])
        return self._compare(stored, aligned)

    @staticmethod
    def towards(pieces: Sequence[Slice], lam: Vector) -> Slice:
        """The same rows with θ_ref + Σ λ_k·Δ_k in the place of the aligned model: λ = 1 of it is the merge of several.

        Args:
            pieces: of the reference and each aligned model.
        """
        differing = [(piece, each) for piece, each in zip(pieces, lam, strict=True) if piece.aligned is not None]
        if not differing:
            return pieces[0]
        first = differing[0][0]
        compute = torch.float32 if first.dtype.itemsize == 2 else torch.float64
        ref = first.ref.to(compute)
        moving = [(piece.aligned.to(compute), each) for piece, each in differing if each]
        total = blend(ref, *moving[0]) if moving else ref  # one alone is blended as in a merge of it alone
        for aligned, each in moving[1:]:
            total = torch.where(ref == aligned, total, total - step_back(ref, aligned, each))
        return replace(first, ref=ref, aligned=total)

    def _curved(self, value: torch.Tensor, bend: Bend) -> torch.Tensor:
        """`value` and the path's low-rank part, in memory of its own."""
        own = self.buffers.take("curved", tuple(value.shape), value.dtype).copy_(value)
        bend.add_to(own, self.start // math.prod(value.shape[1:]))
        return own

    def _widened(self) -> Slice:
        """The same with both sides in float32."""
        return replace(self, ref=self.ref.float(), aligned=None if self.aligned is None else self.aligned.float())

    def _compare(self, stored: torch.Tensor, value: torch.Tensor) -> Sums:
        """Sums over this slice; -λΔ lies in the buffer already."""
        both = self.buffers.take("step and error", (2, *self.ref.shape), self.ref.dtype)
        error = both[1].copy_(stored)
        moved = differs(error, self.ref)
        error.sub_(value)
        square, cross, lost = moments(both, self.buffers)
        if not math.isfinite(square + cross + lost):
            square, cross, lost = moments(torch.where(both.isfinite().all(0), both, 0.0), self.buffers)
        return Sums(square - cross, square, lost, value.numel(), moved=moved)

    @cached_property
    def _noise(self) -> torch.Tensor | None:
        """The bits that every λ of this slice is rounded with."""
        if self.aligned is None and self.ref.dtype == self.dtype:
            return None
        return noise_for(self.rounding, self.dtype, self.seed, self.name, self.start, tuple(self.ref.shape))


def differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors differ anywhere; looks at a few values first, where it mostly shows."""
    one, other = one.flatten(), other.flatten()
    return not (torch.equal(one[:4096], other[:4096]) and torch.equal(one, other))


def moments(both: torch.Tensor, buffers: Buffers) -> tuple[float, float, float]:
    """‖x‖², ⟨x, y⟩, ‖y‖² of `both` = (x, y): products and sums in float64."""
    wide = buffers.take("wide", (2, both[0].numel()), torch.float64)
    wide.view(both.shape).copy_(both)
    (xx, xy), (_, yy) = (wide @ wide.T).tolist()
    return xx, xy, yy


def stored_rows(
    pair: ModelPair, name: str, start: int, stop: int, lams: Sequence[Lam], dtype: torch.dtype, rounding: Rounding,
    seed: int, scratch: Buffers, kept: Buffers, allow_nonfinite: bool = False, curve: Curve | None = None,
) -> list[tuple[torch.Tensor, Sums | None]]:  # fmt: skip
    """Rows [start, stop) of θ(λ) as stored for each λ, and what became of λΔ (None: the two sides are one tensor).

    The result lies in `kept`. Everything else goes through `scratch`, a cache-sized slice at a time.
    """
    info = pair.ref.info(name)
    changes = not pair.is_same(name)
    bends = [curve.at(name, lam) if curve and changes else None for lam in lams]
    results = [
        (kept.take(f"stored {number}", (stop - start, *info.row_shape), dtype), Sums() if changes else None)
        for number in range(len(lams))
    ]
    for first, last in slices(info, SLICE, start, stop):
        how = (name, first, last, dtype, rounding, seed)
        pieces = [Slice.read(one, *how, scratch.part(number)) for number, one in enumerate(pair.pairs)]
        for lam, bend, (out, sums) in zip(lams, bends, results, strict=True):
            piece, along = (Slice.towards(pieces, lam), 1.0) if isinstance(lam, Vector) else (pieces[0], lam)
            piece.at(along, out[first - start : last - start], sums, allow_nonfinite, bend)
    return results


def layer_kind(name: str) -> str:
    """What kind of layer a tensor belongs to: `self_attn.q_proj` for `model.layers.7.self_attn.q_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    inner = parts[numbers[-1] + 1 :] if numbers else parts[-1:]
    return ".".join(inner) or name
