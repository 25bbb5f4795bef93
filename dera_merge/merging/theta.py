"""θ(λ): the curve through the reference and the aligned model, one slice of one tensor at a time.

This is the whole of the merge: `Slice.read` brings both sides of a few rows into memory, `Slice.at` is the formula and
the one place where a weight of θ(λ) is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..errors import DeraError
from ..files.buffers import Buffers
from ..files.checkpoint import SLICE, slices
from ..lambdas import Lam, Vector, is_end
from ..models.names import Names
from . import kernels
from .path import Bend, Course
from .rounding import in_range, noise_for, round_to
from .storage import Storage


def step_back(ref: torch.Tensor, aligned: torch.Tensor, lam: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """-λΔ, and +0 where Δ = 0. θ(λ) is θ_ref minus this: x - 0 is x for both zeros x."""
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
        name: the tensor's name in θ(λ).
        start: flat index of the first element.
        dtype: what θ(λ) is stored as.
        storage: how it is rounded to that.
        ref: θ_ref in the compute dtype; as stored where the two sides are the same tensor, or nothing is lost by it.
        aligned: θ_aligned likewise, or None where the two sides are the same tensor.
        buffers: where all of it lies.
    """

    name: str
    start: int
    dtype: torch.dtype
    storage: Storage
    ref: torch.Tensor
    aligned: torch.Tensor | None
    buffers: Buffers

    @classmethod
    def read(
        cls, names: Names, name: str, start: int, stop: int, storage: Storage, buffers: Buffers | None = None
    ) -> list[Slice]:
        """Read all sides: a slice of the reference and each aligned model. The reference is read once for all.

        16-bit outputs are computed in float32, wider ones in float64.
        """
        buffers = buffers or Buffers()
        ref, *aligned = names.weights
        info, dtype = names.tensors[name], storage.dtype_of(names, name)

        def within(height: int) -> int:  # how many of these rows a tensor has
            return max(0, min(stop, height) - start)

        shape = (stop - start, *info.row_shape)
        fields = (name, start * math.prod(info.row_shape), dtype, storage)
        if names.is_same(name):
            stored = buffers.take("ref", shape, info.dtype)
            ref.base_rows(name, start, stop, stored, buffers)
            return [cls(*fields, stored, None, buffers)] * len(aligned)
        if len(aligned) == 1 and dtype == torch.bfloat16 and all(s.is_stored_as(name, dtype) for s in names.weights):
            compute = torch.bfloat16  # the compiled kernel widens on the way
        else:
            compute = torch.float32 if dtype.itemsize == 2 else torch.float64
        rows, base = buffers.take("ref", shape, compute), ref.info(name)
        ref.base_rows(name, start, start + within(base.rows), rows[: within(base.rows)], buffers)
        aligned_rows: list[torch.Tensor | None] = []
        for number, side in enumerate(aligned, 1):
            side_rows = buffers.take(f"aligned {number}", shape, compute) if names.differs(name, number) else None
            aligned_rows.append(side_rows)
            if side_rows is None:
                continue
            if (side_info := side.info(name)) is base:
                side_rows.copy_(rows)
            else:
                common = within(side_info.rows)
                side.base_rows(name, start, start + common, side_rows[:common], buffers)
            side.adapt(name, start, stop, side_rows)
        ref.adapt(name, start, stop, rows)
        # Rows of the vocabulary that one side alone has are that side's at every λ.
        known = within(ref.rows(name))
        for side, side_rows in zip(aligned, aligned_rows, strict=True):
            if side_rows is not None:
                side_rows[within(side.rows(name)) :] = rows[within(side.rows(name)) :]
                rows[known:] = side_rows[known:]
        return [cls(*fields, rows, side_rows, buffers) for side_rows in aligned_rows]

    def at(
        self, lam: float, out: torch.Tensor | None = None, sums: Sums | None = None, bend: Bend | None = None
    ) -> torch.Tensor:
        """θ(λ) as stored, in `self.dtype`.

        What came from the output dtype is held by it exactly, so every rounding returns its bits: at λ=0 and λ=1, and
        wherever Δ = 0, the inputs' own bits come out.

        Args:
            lam: λ, or the gain that stands in its place.
            out: memory for the result.
            sums: where to add what became of λΔ.
            bend: how a learned path leaves the straight line here.

        Raises:
            DeraError: a value is NaN or infinite, other than an infinity that both inputs hold.
        """
        if self.aligned is None:
            return round_to(self.ref, self.dtype, self._noise, out)
        take, shape, compute = self.buffers.take, tuple(self.ref.shape), self.ref.dtype
        curved = bend is not None and bend.left is not None
        compiled = not curved and not is_end(lam) and self.dtype == torch.bfloat16 and compute != torch.float64
        if compiled and kernels.available():
            stored = torch.empty(shape, dtype=self.dtype) if out is None else out
            figures = kernels.store_bfloat16(self.ref, self.aligned, lam, self._noise, stored)
            if figures is not None:  # else something is not finite, or too large: the long way says what
                if sums is not None:
                    square, cross, lost, moved = figures
                    sums.add(Sums(square - cross, square, lost, stored.numel(), moved=moved))
                return stored
        if compute == torch.bfloat16:
            return self._widened().at(lam, out, sums, bend)
        step = step_back(self.ref, self.aligned, lam, out=take("step and error", (2, *shape), compute)[0])
        if is_end(lam):
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
            if nonfinite and not self.storage.allow_nonfinite:
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
        """What became of Δ in `stored`, weights that claim to be the aligned model's, in the shape of this slice."""
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
        differing = [(piece, lam_k) for piece, lam_k in zip(pieces, lam, strict=True) if piece.aligned is not None]
        if not differing:
            return pieces[0]
        first = differing[0][0]
        compute = torch.float32 if first.dtype.itemsize == 2 else torch.float64
        ref = first.ref.to(compute)
        moving = [(piece.aligned.to(compute), lam_k) for piece, lam_k in differing if lam_k]
        total = blend(ref, *moving[0]) if moving else ref  # one alone is blended as in a merge of it alone
        for aligned, lam_k in moving[1:]:
            total = torch.where(ref == aligned, total, total - step_back(ref, aligned, lam_k))
        return replace(first, ref=ref, aligned=total)

    def _curved(self, value: torch.Tensor, bend: Bend) -> torch.Tensor:
        """`value` and the path's low-rank part, in memory of its own."""
        result = self.buffers.take("curved", tuple(value.shape), value.dtype).copy_(value)
        bend.add_to(result, self.start // math.prod(value.shape[1:]))
        return result

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
        rounding, seed, shape = self.storage.rounding, self.storage.seed, tuple(self.ref.shape)
        return noise_for(rounding, self.dtype, seed, self.name, self.start, shape)


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
    names: Names, name: str, start: int, stop: int, lams: Sequence[Lam], storage: Storage, scratch: Buffers,
    kept: Buffers,
    course: Course | None = None, summed: bool = True,
) -> list[tuple[torch.Tensor, Sums | None]]:  # fmt: skip
    """Rows [start, stop) of θ(λ) as stored for each λ, and what became of λΔ (None: all sides are one tensor).

    Args:
        names, name: where the sides have their tensors, and which tensor.
        start, stop: its rows.
        lams: λ, one or several.
        storage: how the values are stored.
        scratch, kept: memory. The result lies in `kept`; everything else goes through `scratch`, a cache-sized slice at
            a time.
        course: what is followed in the place of the straight line with one λ.
        summed: whether it is asked what became of λΔ, which takes longer than the weights; else None.
    """
    info, dtype = names.tensors[name], storage.dtype_of(names, name)
    changes = not names.is_same(name)
    bends = [course.at(name, lam) if course and changes else None for lam in lams]
    gains = [lam if bend is None else bend.gain for lam, bend in zip(lams, bends, strict=True)]
    results = [
        (kept.take(f"stored {number}", (stop - start, *info.row_shape), dtype), Sums() if changes and summed else None)
        for number in range(len(lams))
    ]
    for first, last in slices(info, SLICE, start, stop):
        pieces = Slice.read(names, name, first, last, storage, scratch)
        for gain, bend, (out, sums) in zip(gains, bends, results, strict=True):
            piece, along = (Slice.towards(pieces, gain), 1.0) if isinstance(gain, Vector) else (pieces[0], gain)
            piece.at(along, out[first - start : last - start], sums, bend)
    return results
