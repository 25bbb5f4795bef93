"""log Z(λ) along a walk of many λ, against each λ summed by itself in this file, in numpy's long doubles."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge.lambdas import Vector
from dera_merge.measuring import normaliser
from dera_merge.measuring.normaliser import log_softmax, normalisers

GRIDS = st.one_of(
    st.lists(st.floats(-3, 5), min_size=1, max_size=6),
    st.tuples(st.floats(-1, 0), st.floats(0.5, 3), st.integers(3, 40)).map(lambda ends: np.linspace(*ends).round(4).tolist()),
    st.just([0.1 * n for n in range(21)]),
    st.just([2.0, 0.0, 1.0, 0.5, 1.0]),  # in any order, and twice
)  # fmt: skip


def summed(ref: np.ndarray, aligned: np.ndarray, lam: float) -> tuple[np.longdouble, np.longdouble]:
    """log Σ p_ref·exp(λr) and λ·E_λ[r] of one row of logits."""
    ref, aligned = (x.astype(np.longdouble) for x in (ref, aligned))
    ref, aligned = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (ref, aligned))
    both = np.isfinite(ref) & np.isfinite(aligned)
    if lam in (0, 1):  # log Z is 0, whatever the models rule out
        return np.longdouble(0), lam * (np.exp(aligned[both]) * (aligned - ref)[both]).sum()
    r = (aligned - ref)[both]
    log_terms = ref[both] + np.longdouble(lam) * r
    top = log_terms.max()
    z = np.exp(log_terms - top).sum()
    return top + np.log(z), lam * (np.exp(log_terms - top) * r).sum() / z


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), GRIDS, st.sampled_from([0.1, 3.0, 12.0, 60.0]), st.sampled_from([0.01, 1.0, 6.0]), st.sampled_from([7, 64, 1000]))
def test_every_lambda_of_a_walk_is_the_sum_itself(seed, lams, spread, change, walk):
    """Flat and peaked rows, near and far models; rows whose terms would leave float64's range are summed otherwise."""
    draw = np.random.default_rng(seed)
    ref = (spread * draw.standard_normal((3, 50))).astype(np.float32)
    aligned = (ref + change * draw.standard_normal((3, 50))).astype(np.float32)
    with mock.patch.object(normaliser, "WALK_VALUES", walk):
        log_z, tilt = normalisers(log_softmax(torch.tensor(ref)), [log_softmax(torch.tensor(aligned))], lams)
    for row in range(3):
        for column, lam in enumerate(lams):
            z, tilted = summed(ref[row], aligned[row], lam)
            scale = 1 + float(max(np.ptp(ref[row]), np.ptp(aligned[row]))) * (1 + 2 * abs(lam))  # of the logs of the terms
            assert float(log_z[row, column]) == pytest.approx(float(z), abs=2e-14 * scale)
            assert float(tilt[row, column]) == pytest.approx(float(tilted), abs=2e-13 * scale * (1 + abs(lam)))


@pytest.mark.parametrize("lam", [-0.5, 0.0, 0.3, 1.0, 1.7])
def test_a_token_that_a_model_rules_out_has_no_share(lam):
    """Where λ gives that model a share; the other row of the batch walks on as ever."""
    ref, aligned = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(0))
    aligned[0, 3] = -torch.inf
    grid = [-0.5, 0.0, 0.3, 1.0, 1.7]
    log_z, _ = normalisers(log_softmax(ref), [log_softmax(aligned)], grid)
    for row in range(2):
        expected, _ = summed(ref[row].numpy(), aligned[row].numpy(), lam)
        assert float(log_z[row, grid.index(lam)]) == pytest.approx(float(expected), abs=1e-13)


def test_several_aligned_models_are_summed_at_each_vector():
    ref, first, second = (log_softmax(torch.randn(2, 30, generator=torch.Generator().manual_seed(n))) for n in range(3))
    lams = [Vector([0.0, 0.0]), Vector([0.5, 0.0]), Vector([0.3, 1.5])]
    log_z, tilt = normalisers(ref, [first, second], lams)
    for column, (a, b) in enumerate(lams):
        log_terms = ref + a * (first - ref) + b * (second - ref)
        torch.testing.assert_close(log_z[:, column], log_terms.logsumexp(-1), rtol=0, atol=1e-12)
        p = log_terms.softmax(-1)
        torch.testing.assert_close(tilt[:, column], (p * (a * (first - ref) + b * (second - ref))).sum(-1), rtol=0, atol=1e-12)
