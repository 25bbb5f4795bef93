"""The compiled kernel and the torch path store the same bits and count the same."""

import numpy as np
import pytest
import torch
from builders import LAMS, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import ModelPair
from dera_merge.merging import kernels
from dera_merge.merging.recipe import verify
from dera_merge.merging.rounding import random_bits, round_to
from dera_merge.merging.theta import blend

pytestmark = pytest.mark.skipif(not kernels.available(), reason="needs numba")

bits16 = st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)), min_size=1, max_size=60)


def as_bfloat16(bits):
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@settings(max_examples=300, deadline=None)
@given(pairs=bits16, lam=st.floats(-8, 8, width=32).filter(lambda lam: lam not in (0, 1)), stochastic=st.booleans())
def test_the_kernel_stores_what_torch_stores_or_says_that_it_cannot(pairs, lam, stochastic):
    ref, aligned = (as_bfloat16(side) for side in zip(*pairs, strict=True))
    value = blend(ref.float(), aligned.float(), lam)
    noise = random_bits(0, "w", 0, len(pairs)) if stochastic else None
    out = torch.empty_like(ref)
    found = kernels.store_bfloat16(ref, aligned, lam, noise, out)
    ordinary = bool((value.abs() <= torch.finfo(torch.bfloat16).max).all())
    plain = ref.float() - lam * 0 * aligned.float()  # NaN where either side is not finite
    if found is None:
        assert not ordinary or not plain.isfinite().all()
        return
    assert torch.equal(out.view(torch.int16), round_to(value, torch.bfloat16, noise).view(torch.int16))
    wide = torch.empty_like(ref)
    assert kernels.store_bfloat16(ref.float(), aligned.float(), lam, noise, wide) == found
    assert torch.equal(out.view(torch.int16), wide.view(torch.int16))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), count=st.sampled_from([1, 7, 2047, 2048, 2049, 10_000]), lam=st.floats(-2, 3))
def test_the_kernels_sums_are_those_of_float64(seed, count, lam):
    rng = np.random.default_rng(seed)
    ref = torch.from_numpy(rng.standard_normal(count, np.float32))
    aligned = ref + 0.01 * torch.from_numpy(rng.standard_normal(count, np.float32))
    out = torch.empty(count, dtype=torch.bfloat16)
    square, cross, error, moved = kernels.store_bfloat16(ref, aligned, lam, random_bits(0, "w", 0, count), out)
    step = np.float32(lam) * (ref - aligned).numpy()
    value = ref.numpy() - step
    lost = (out.float().numpy() - value).astype(np.float64)
    step = step.astype(np.float64)
    assert square == pytest.approx((step**2).sum(), rel=1e-9)
    assert cross == pytest.approx((step * lost).sum(), rel=1e-6, abs=1e-12)
    assert error == pytest.approx((lost**2).sum(), rel=1e-9)
    assert moved == bool((out.float() != ref).any())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_a_merge_without_numba_stores_the_same_bits(llama, lora, tmp_path, monkeypatch, rounding, kind):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base) if kind == "lora" else llama(1, near=0))
    fast = pair.merge(tmp_path / "fast", LAMS, rounding=rounding)
    monkeypatch.setattr(kernels, "available", lambda: False)
    slow = pair.merge(tmp_path / "slow", LAMS, rounding=rounding)
    for one, other in zip(fast, slow, strict=True):
        for name, tensor in weights(one).items():
            assert torch.equal(tensor.view(torch.int16), weights(other)[name].view(torch.int16))
        a, b = (verify(folder)["statistics"] for folder in (one, other))
        for key in ("kept", "error"):
            assert (a[key] is None and b[key] is None) or a[key] == pytest.approx(b[key], rel=1e-6, abs=1e-12)
