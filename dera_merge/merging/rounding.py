"""float32 → bfloat16 or float16, to nearest or stochastically.

An alignment run moves most weights by less than one unit in the last place (ulp) of bfloat16. Rounded to nearest, such
a weight is the reference's below λ = ½ and the aligned model's above, so the dial becomes a step. Stochastic rounding
goes up with probability (x - lower) / ulp: it is right on average at every λ (Gupta et al., 2015).

The random bits of an element depend on the seed, the tensor's name and the element's index, and on nothing else: not
on slices, threads, shards, or λ. So a merge is reproducible, and θ(λ) moves monotonically with λ.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
import torch

Rounding = Literal["stochastic", "nearest"]
NARROW = (torch.bfloat16, torch.float16)  # what stochastic rounding is for; wider dtypes round to nearest


def random_bits(seed: int, name: str, start: int, count: int) -> torch.Tensor:
    """Uniform 16-bit integers for elements [start, start + count) of a tensor.

    Args:
        seed: the user's seed.
        name: the tensor's name in the checkpoint.
        start: index of the first element in the flattened tensor.
        count: how many.

    Returns:
        int32 tensor of shape (count,), values in [0, 65535].
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "little")
    words = np.random.PCG64(key)
    words.advance(start // 4)  # one 64-bit output serves four elements
    skip = start % 4
    raw = words.random_raw((skip + count + 3) // 4).astype("<u8", copy=False).view("<u2")
    return torch.from_numpy(raw[skip : skip + count]).to(torch.int32)


def noise_for(
    rounding: Rounding, dtype: torch.dtype, seed: int, name: str, start: int, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """The `random_bits` that `round_to` wants for this rounding to this dtype; None rounds to nearest."""
    if rounding == "nearest" or dtype not in NARROW:
        return None
    return random_bits(seed, name, start, math.prod(shape)).view(shape)


def round_to(
    values: torch.Tensor,
    dtype: torch.dtype,
    noise: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    ordinary: bool | None = None,
) -> torch.Tensor:
    """Round float32 (or float64) values to a storage dtype.

    Args:
        values: any shape, contiguous.
        dtype: the output dtype.
        noise: `random_bits` of the same shape for stochastic rounding to bfloat16 or float16; None rounds to nearest
            (ties to even).
        out: memory for the result; default: new.
        ordinary: what `in_range` says of the values, where it is known.

    Returns:
        Tensor of `dtype`, same shape. Values that `dtype` holds exactly stay as they are, finite values stay finite.
    """
    out = torch.empty(values.shape, dtype=dtype) if out is None else out
    if values.dtype == dtype:
        return out.copy_(values)
    ordinary = in_range(values, dtype) if ordinary is None else ordinary
    if noise is None:
        out.copy_(values)
    elif dtype == torch.bfloat16:
        # A bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper half
        # with probability lower/65536, which is (x - lower neighbour)/ulp; in sign-magnitude that holds for both signs.
        bits = noise + values.float().view(torch.int32)
        out.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
    else:
        out.copy_(_to_eleven_bits(values.float(), noise))
    if not ordinary:
        limit = torch.finfo(dtype).max
        held = torch.where(values.isfinite(), values.clamp(-limit, limit), values).to(dtype)
        out.copy_(torch.where((values.abs() <= limit) & out.isfinite(), out, held))
    return out


def in_range(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite and no larger than the largest number of `dtype`."""
    if not values.numel() or not dtype.is_floating_point:
        return True
    low, high = values.aminmax()
    limit = torch.finfo(dtype).max
    return low.item() >= -limit and high.item() <= limit  # NaN compares as false


def _to_eleven_bits(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Round float32 to what float16 holds, stochastically; the result is still float32."""
    # |x| = mantissa·2^exponent with mantissa in [½, 1): float16 has 11 bits of it, fewer below 2^-14.
    exponent = torch.frexp(values).exponent.clamp_(min=-13)
    ulp = torch.ldexp(torch.ones_like(values), exponent - 11)
    scaled = values.abs() / ulp  # exact: a division by a power of two
    floor = scaled.floor()
    up = noise < (scaled - floor) * 65536
    return torch.copysign((floor + up) * ulp, values)
