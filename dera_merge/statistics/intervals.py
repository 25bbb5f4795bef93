"""Intervals over prompts, and numbers that JSON knows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def finite(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON does not know, at any depth."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bootstrap(values: np.ndarray, prompt_of: np.ndarray, seed: int = 0, samples: int = 2000) -> list[float] | None:
    """95 % interval of the pooled mean, resampling prompts with all their tokens; None with fewer than two prompts."""
    _, index = np.unique(prompt_of, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    if len(sums) < 2 or not np.isfinite(sums).all():
        return None
    draws = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]
