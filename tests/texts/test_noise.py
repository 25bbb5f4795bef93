"""The noise of sampled texts: a pure function of four integers, uniform, and independent where it has to be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge.texts.noise import GumbelNoise, bits, gumbel, key_of

IDS = 1 << 16


def bits_of(seed: int, stream: int, position: int, token: int) -> int:
    """The documented recipe on Python's integers: SplitMix64 for the key, a 32-bit hash of the token id under it."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = mixed(mixed(mixed(seed) ^ stream % 2**64) ^ position)
    x = token ^ key % 2**32
    x = ((x ^ x >> 17) * 0xED5AD4BB + (key >> 32)) % 2**32
    x = (x ^ x >> 11) * 0xAC4C1B51 % 2**32
    x = (x ^ x >> 15) * 0x31848BAB % 2**32
    return (x ^ x >> 14) % 2**31


def chi_square(counts: np.ndarray) -> float:
    """Standard deviations by which the counts are more uneven than equally likely bins make them."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**63), st.integers(-(2**31), 2**63), st.integers(0, 2**20), st.integers(0, 2**20))
def test_bits_are_a_function_of_seed_stream_position_and_token(seed, stream, position, token):
    row = bits([key_of(1, 2, 3), key_of(seed, stream, position)], token + 1)[1]
    assert row[token].item() == bits_of(seed, stream, position, token)


@pytest.mark.parametrize("shift", [0, 8, 15, 23], ids=lambda shift: f"bits {shift} to {shift + 7}")
def test_all_bits_are_uniform(shift):
    for seed in range(4):
        rows = bits([key_of(seed, stream, 0) for stream in range(32)], IDS).numpy()
        assert chi_square(np.bincount((rows >> shift & 255).ravel(), minlength=256)) < 5


@pytest.mark.parametrize(
    ("one", "other"),
    [((0, 0, 0), (0, 1, 0)), ((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (1, 0, 0)), ((0, 1, 0), (0, 0, 1)),
     ((0, 7, 2), (0, 2, 7)), ((3, 5, 1), (5, 3, 1)), ((0, 0, 0), (0, 2**31, 0)), ((0, -1, 0), (0, 1, 0))],
)  # fmt: skip
def test_streams_positions_and_seeds_are_independent(one, other):
    for place in range(24):
        first, second = (bits([key_of(seed, stream, position + place)], IDS)[0].numpy() for seed, stream, position in (one, other))
        for shift in (0, 27):
            together = (first >> shift & 15) * 16 + (second >> shift & 15)
            assert chi_square(np.bincount(together, minlength=256)) < 6


def test_neighbouring_tokens_are_independent():
    rows = bits([key_of(0, stream, 0) for stream in range(64)], IDS).numpy()
    for apart in (1, 2, 3, *(1 << power for power in range(2, 16))):
        for shift in (0, 27):
            together = (rows[:, apart:] >> shift & 15) * 16 + (rows[:, :-apart] >> shift & 15)
            assert chi_square(np.bincount(together.ravel(), minlength=256)) < 5


def test_gumbel_values_are_those_of_the_formula_to_the_last_places():
    words = torch.cat([
        bits([key_of(0, 0, 0)], IDS)[0], torch.arange(4096, dtype=torch.int32), 2**31 - 1 - torch.arange(4096, dtype=torch.int32),
    ])  # fmt: skip
    uniform = (words.double() + 0.5) / 2**31
    truth = -torch.log(-torch.log1p(-uniform))
    values = gumbel(words)
    assert torch.isfinite(values).all()
    # Near u = 1 float32 has few numbers; noise that is so small is not in any maximum.
    assert (values.double() - truth).abs().max() < 0.3
    high = truth > -1
    assert ((values.double() - truth).abs()[high] <= 1e-6 * truth.abs()[high].clamp(min=1)).all()
    assert values.max().item() == pytest.approx(32 * math.log(2), abs=1e-5)


def test_samples_have_the_distribution_of_the_logits():
    logits = torch.cat([torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2, torch.full((3000,), -6.0)])
    counts = torch.zeros(len(logits))
    for position in range(8):
        noise = GumbelNoise(range(4000), seed=position)
        counts += torch.bincount(noise(torch.zeros(4000, 1), logits.expand(4000, -1)).argmax(-1), minlength=len(logits))
    expected = torch.softmax(logits.double(), -1) * counts.sum()
    rare = torch.arange(len(logits)) >= 300  # many tokens that are seldom drawn count together
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    common = expected > 5
    chi = ((counts - expected) ** 2 / expected)[common].sum().item()
    freedom = int(common.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * freedom)
    assert abs(counts[-1] - expected[-1]) < 5 * math.sqrt(expected[-1])


def test_a_row_gets_the_same_noise_in_any_batch_and_the_next_position_another():
    scores = torch.zeros(3, 50)
    step, longer = torch.zeros(3, 7), torch.zeros(3, 8)
    together = GumbelNoise([4, 9, 4], seed=1)
    first, second = together(step, scores), together(longer, scores)
    alone = GumbelNoise([9], seed=1)
    assert torch.equal(alone(torch.zeros(1, 3), scores[:1])[0], first[1])  # its prompt is shorter: position 0 all the same
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(together(longer, scores), second)


def test_rows_of_the_vocabulary_beyond_the_common_ones_are_never_drawn():
    noisy = GumbelNoise([0], vocab_size=10)(torch.zeros(1, 1), torch.zeros(1, 12))
    assert torch.isneginf(noisy[0, 10:]).all()
    assert torch.equal(noisy[0, :10], GumbelNoise([0])(torch.zeros(1, 1), torch.zeros(1, 10))[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_makes_the_same_bits():
    keys = [key_of(0, stream, 3) for stream in range(32)]
    words = bits(keys, 128_256)
    assert torch.equal(bits(keys, 128_256, "cuda").cpu(), words)
    torch.testing.assert_close(gumbel(words.cuda()).cpu(), gumbel(words), rtol=2e-6, atol=2e-6)
