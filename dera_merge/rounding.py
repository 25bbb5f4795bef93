"""float32 → bfloat16 or float16, to nearest or stochastically.

An alignment run moves most weights by less than one unit in the last place (ulp) of bfloat16. Rounded to nearest, such
a weight is the reference's below λ = ½ and the aligned model's above, so the dial becomes a step. Stochastic rounding
goes up with probability (x - lower) / ulp: it is right on average at every λ (Gupta et al., 2015).

The random bits of an element depend on the seed, the tensor's name and the element's index, and on nothing else: not
on slices, threads, shards, or λ. So a merge is reproducible, and θ(λ) moves monotonically with λ.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch

Rounding = Literal["stochastic", "nearest"]


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
    return torch.from_numpy(raw[skip : skip + count].astype(np.int32))


def round_to(
    values: torch.Tensor, dtype: torch.dtype, rounding: Rounding, seed: int = 0, name: str = "", start: int = 0
) -> torch.Tensor:
    """Round float32 (or float64) values to a storage dtype.

    Args:
        values: any shape, contiguous.
        dtype: the output dtype. Stochastic rounding applies to bfloat16 and float16; others round to nearest.
        rounding: `"nearest"` (ties to even) or `"stochastic"`.
        seed, name, start: see `random_bits`; `start` is the flat index of the first of `values`.

    Returns:
        Tensor of `dtype`, same shape. Values that `dtype` holds exactly stay as they are, finite values stay finite.
    """
    if rounding == "stochastic" and dtype in (torch.bfloat16, torch.float16):
        values = values.float()
        noise = random_bits(seed, name, start, values.numel()).view(values.shape)
        rounded = _stochastic_bf16(values, noise) if dtype == torch.bfloat16 else _stochastic_fp16(values, noise)
    else:
        rounded = values.to(dtype)
    if (over := rounded.isinf() & values.isfinite()).any():
        limit = torch.finfo(dtype).max
        rounded = torch.where(over, torch.copysign(torch.full_like(rounded, limit), rounded), rounded)
    return rounded


def _stochastic_bf16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    # A bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper half
    # with probability lower/65536, which is (x - lower neighbour)/ulp; in sign-magnitude that holds for both signs.
    bits = values.view(torch.int32)
    carried = torch.where(values.isfinite(), bits + noise, bits)
    return (carried >> 16).to(torch.int16).view(torch.bfloat16)


def _stochastic_fp16(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    # |x| = mantissa·2^exponent with mantissa in [½, 1): float16 has 11 bits of it, fewer below 2^-14.
    exponent = torch.frexp(values).exponent.clamp_(min=-13)
    ulp = torch.ldexp(torch.ones_like(values), exponent - 11)
    scaled = values.abs() / ulp  # exact: a division by a power of two
    floor = scaled.floor()
    up = noise < (scaled - floor) * 65536
    rounded = torch.copysign((floor + up) * ulp, values)
    return torch.where(values.isfinite(), rounded, values).to(torch.float16)
