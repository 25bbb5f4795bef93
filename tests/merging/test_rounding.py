"""Rounding: between the two neighbours, unbiased, reproducible from (seed, name, index) alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge.merging.rounding import random_bits, round_to

NARROW = [torch.bfloat16, torch.float16]
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded(values, dtype, rounding, seed=0, name="w"):
    return round_to(values, dtype, random_bits(seed, name, 0, values.numel()) if rounding == "stochastic" else None)


def neighbours(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The representable numbers at or below and at or above a value, by walking from the nearest one."""
    near = torch.tensor(value, dtype=torch.float64).to(dtype)
    if near.isinf():
        near = torch.copysign(torch.tensor(torch.finfo(dtype).max, dtype=dtype), near)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    low = near if near.double() <= value else torch.nextafter(near, -infinity)
    high = near if near.double() >= value else torch.nextafter(near, infinity)
    return low.item(), high.item()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@settings(max_examples=200, deadline=None)
@given(values=st.lists(floats, min_size=1, max_size=20), seed=st.integers(0, 3))
def test_a_value_goes_to_one_of_its_two_neighbours(dtype, rounding, values, seed):
    stored = rounded(torch.tensor(values, dtype=torch.float32), dtype, rounding, seed).double().tolist()
    limit = torch.finfo(dtype).max
    for value, result in zip(values, stored, strict=True):
        assert np.isfinite(result)
        assert result in [max(-limit, min(limit, x)) for x in neighbours(value, dtype)]


@pytest.mark.parametrize("dtype", NARROW)
@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_what_the_dtype_holds_exactly_keeps_its_bits(dtype, bits):
    stored = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype)
    stored = stored[~stored.isnan()]
    again = rounded(stored.float(), dtype, "stochastic", 3)
    assert torch.equal(again.view(torch.int16), stored.view(torch.int16))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_stochastic_rounding_goes_up_as_often_as_the_value_lies_up(dtype, share):
    low = torch.tensor(1.0, dtype=dtype)
    high = torch.nextafter(low, torch.tensor(2.0, dtype=dtype))
    value = low.double() + share * (high.double() - low.double())
    n = 100_000
    up = (rounded(value.float().expand(n).contiguous(), dtype, "stochastic") == high).double().mean().item()
    assert abs(up - share) < 5 * (share * (1 - share) / n) ** 0.5  # five standard deviations


def test_nearest_rounding_would_fail_the_test_of_unbiasedness():
    value = torch.full((1000,), 1 + 0.05 * 2**-7)
    assert (rounded(value, torch.bfloat16, "nearest") == 1).all()


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 1000), count=st.integers(1, 200))
def test_random_bits_depend_on_the_element_not_on_the_slice(start, count):
    whole = random_bits(5, "model.w", 0, start + count)
    assert torch.equal(random_bits(5, "model.w", start, count), whole[start:])


def test_random_bits_differ_between_seeds_and_names():
    streams = [random_bits(seed, name, 0, 64).tolist() for seed in (0, 1) for name in ("a", "b")]
    assert len({tuple(stream) for stream in streams}) == 4


def test_random_bits_are_uniform():
    counts = torch.bincount(random_bits(0, "w", 0, 160_000) >> 12, minlength=16).double()
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum().item()
    assert chi_square < 44.3  # the 99.99 % quantile with 15 degrees of freedom


def test_rounding_is_monotone_in_the_value():
    """The noise is the same at every λ, so a weight that moves up with λ is never stored lower."""
    values = torch.linspace(1, 1.1, 1000).float()
    stored = torch.stack([rounded(v.repeat(64), torch.bfloat16, "stochastic").float() for v in values])
    assert (stored.diff(dim=0) >= 0).all()
