"""θ_ref + λΔ, rounded and accounted for, in one pass over the weights: what `theta.Slice.at` does in several.

Needs numba (`pip install 'numba>=0.60.0'`); without it torch does the same work, three to five times slower. The
stored bits are the same. The sums agree to the last few digits of float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

_BLOCK = 2048  # weights at a time: what is computed of them stays in the innermost cache
_LARGEST = np.uint32(0x7F7F0000)  # the bits of bfloat16's largest number, as float32
_NO_NOISE = np.empty(0, np.int32)


def available() -> bool:
    """Whether numba is installed."""
    return _compiled() is not None


def store_bfloat16(
    ref: torch.Tensor, aligned: torch.Tensor, lam: float, noise: torch.Tensor | None, out: torch.Tensor
) -> tuple[float, float, float, bool] | None:
    """Write θ_ref + λΔ into `out`, rounded as `round_to` does.

    Args:
        ref, aligned: bfloat16 or float32, both the same, contiguous, on the CPU.
        lam: λ.
        noise: random bits (int32) for stochastic rounding; None rounds to nearest.
        out: bfloat16, contiguous.

    Returns:
        ‖λΔ‖², ⟨-λΔ, error⟩, ‖error‖², and whether any stored weight differs from the reference's; None, with `out`
        undefined, where a value is not finite or beyond bfloat16's largest number.
    """
    sums = np.zeros(3)
    shift = np.uint32(16 if ref.dtype == torch.bfloat16 else 0)  # a bfloat16 is the upper half of a float32
    ordinary, moved = _compiled()(
        _bits(ref), _bits(aligned), shift, np.float32(abs(lam)), lam < 0,
        _NO_NOISE if noise is None else noise.numpy().reshape(-1), noise is not None, _bits(out), sums,
    )  # fmt: skip
    square, cross, error = sums.tolist()
    return (square, cross, error, bool(moved)) if ordinary else None


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a float32 or 16-bit tensor, flat, as unsigned integers in the same memory."""
    wide = tensor.dtype == torch.float32
    return tensor.view(torch.int32 if wide else torch.int16).numpy().reshape(-1).view(np.uint32 if wide else np.uint16)


@cache
def _compiled() -> Any:
    """The kernel, or None without numba. Compiled once; numba keeps the result on disk."""
    try:
        import numba
    except ImportError:
        return None

    @numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})  # lets the sums run side by side
    def moments(step, error, count):
        square = cross = lost = 0.0
        for i in range(count):
            x, y = np.float64(step[i]), np.float64(error[i])
            square += x * x
            cross += x * y
            lost += y * y
        return square, cross, lost

    @numba.njit(nogil=True, cache=True)  # no fastmath: each operation rounds as torch's does
    def kernel(ref, aligned, shift, scale, backwards, noise, stochastic, out, sums):
        scratch = np.empty((5, _BLOCK), np.float32)
        x, y, step, value, error = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
        x_bits, y_bits = x.view(np.uint32), y.view(np.uint32)
        value_bits, error_bits = value.view(np.uint32), error.view(np.uint32)
        half, upper, one = np.uint32(0x7FFF), np.uint32(16), np.uint32(1)
        top = np.uint32(0)
        moved = False
        for start in range(0, ref.size, _BLOCK):
            count = min(_BLOCK, ref.size - start)
            first, second, stored = (
                ref[start : start + count],
                aligned[start : start + count],
                out[start : start + count],
            )
            for i in range(count):
                x_bits[i] = np.uint32(first[i]) << shift
                y_bits[i] = np.uint32(second[i]) << shift
            if backwards:
                for i in range(count):
                    step[i] = (y[i] - x[i]) * scale
            else:
                for i in range(count):
                    step[i] = (x[i] - y[i]) * scale
            for i in range(count):
                value[i] = x[i] - step[i]
            for i in range(count):
                top = max(top, value_bits[i] & np.uint32(0x7FFFFFFF))
            if stochastic:
                bits = noise[start : start + count]
                for i in range(count):
                    stored[i] = np.uint16((value_bits[i] + np.uint32(bits[i])) >> upper)
            else:  # to nearest, ties to even
                for i in range(count):
                    stored[i] = np.uint16((value_bits[i] + half + ((value_bits[i] >> upper) & one)) >> upper)
            for i in range(count):
                error_bits[i] = np.uint32(stored[i]) << upper
            if not moved:
                for i in range(count):
                    moved |= error[i] != x[i]
            for i in range(count):
                error[i] -= value[i]
            square, cross, lost = moments(step, error, count)
            sums[0] += square
            sums[1] += cross
            sums[2] += lost
        return top <= _LARGEST, moved

    return kernel
