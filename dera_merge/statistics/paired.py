"""Scores of many settings on the same items: paired bootstrap intervals, and what is more than noise.

All settings share the items of each resample, so that what they have in common cancels in their differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

DRAWS = 2000  # resamples
SLOW_DRAWS = 200  # of a score that is no ratio of sums
AT_ONCE = 100  # resamples that are counted at a time

Form = Callable[[np.ndarray], np.ndarray]


def resampled_ratios(values: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """Σ values / Σ weights over resampled items.

    Args:
        values: of each item under each setting, (items, settings).
        weights: of each item, (items,).

    Returns:
        (DRAWS, settings).
    """
    items = len(values)
    columns = np.column_stack([values, weights])
    draw, sums = np.random.default_rng(seed), np.empty((DRAWS, columns.shape[1]))
    for first in range(0, DRAWS, AT_ONCE):
        picks = draw.integers(items, size=(min(AT_ONCE, DRAWS - first), items))
        counts = np.stack([np.bincount(row, minlength=items) for row in picks]).astype(float)
        sums[first : first + len(picks)] = counts @ columns
    return sums[:, :-1] / sums[:, -1:]


def resampled(items: int, score: Callable[[np.ndarray], Sequence[float]], seed: int = 0) -> np.ndarray:
    """Any score of resampled items, (SLOW_DRAWS, settings); `score` takes indices of items, (items,)."""
    draw = np.random.default_rng(seed)
    return np.array([score(draw.integers(items, size=items)) for _ in range(SLOW_DRAWS)], dtype=float)


def surely_above(gains: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Which settings gain more than nothing against every rival, all of them at once at 95 %.

    The best of many settings is lucky in part. So the bound is one that all of them keep together: the 95 % quantile
    of the largest studentised error of any of them (max-t; Romano and Wolf, 2005).

    Args:
        gains: (settings, rivals), above 0 where the setting is better.
        draws: the same of each resample, (draws, settings, rivals).

    Returns:
        (settings,), bool.
    """
    spread = draws.std(0)
    varies = spread > 1e-12
    if not varies.any():
        return np.zeros(len(gains), dtype=bool)
    errors = (draws[:, varies] - gains[varies]) / spread[varies]
    bound = np.quantile(errors.max(1), 0.95)
    lower = np.where(varies, gains - bound * spread, -np.inf)
    return (lower > 0).all(1)


def unbeaten(scores: np.ndarray) -> np.ndarray:
    """Which settings no other is at least as good as in every score and better in one; (settings, scores), more is
    better. Returns (settings,), bool."""
    at_least = (scores[:, None] >= scores[None]).all(-1)
    better = (scores[:, None] > scores[None]).any(-1)
    return ~(at_least & better).any(0)
