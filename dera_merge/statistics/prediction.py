"""Predict how far a merge is from exact DeRa over the whole range of λ, from few probes.

Along the line θ_τ = θ_ref + τΔ the gap is h_λ - h(θ_λ) = ∫ ΔᵀH(θ_τ)Δ·w(τ)dτ, with the kernel of Model soups (Wortsman
et al., 2022, §4): w = min{(1-λ)τ, λ(1-τ)} on [0,1] for λ in it. For constant H that is ½λ(1-λ)·ΔᵀHΔ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

PROBES = (0.25, 0.75)  # and the largest λ, where that is above 1
ROUGH = 10.0  # neighbouring probes whose scaled kl differs by more say that the law does not hold between them
RESOLVED = 100.0  # times the resolution: below, kl is not measured well enough to be predicted


def predict(probes: dict[float, float], lams: Sequence[float], resolution: float) -> list[dict[str, Any]]:
    """kl of the merge at each λ from its kl at a few, each measured on texts of its own λ.

    To leading order kl(λ) = λ²(1-λ)²·r with r = ⅛·Var_{p_λ}[ΔᵀHΔ]. What r depends on, p_λ, the texts and where on the
    line H is taken, changes slowly with λ, so that log r is interpolated linearly between probes, and continued along
    the nearest stretch within [0, 1].

    Args:
        probes: λ → kl in nats per token; two or more, not 0 or 1.
        lams: where to predict.
        resolution: nats below which kl is noise.

    Returns:
        For each λ `lambda`, `kl`, and `holds`: whether the law can be trusted there: not beyond the probes outside of
        [0, 1], not between probes whose r differ by more than a factor of 10, not where kl is within 100 times the
        resolution.
    """
    points = sorted((lam, math.log(max(kl, resolution) / scale(lam))) for lam, kl in probes.items())
    knots, values = zip(*points, strict=True)
    predictions = []
    for lam in lams:
        right = min(max(int(np.searchsorted(knots, lam)), 1), len(knots) - 1)
        step = values[right] - values[right - 1]
        place = (lam - knots[right - 1]) / (knots[right] - knots[right - 1])
        kl = scale(lam) * math.exp(min(values[right - 1] + place * step, 700.0))
        inside = knots[0] <= lam <= knots[-1] or 0 <= lam <= 1
        holds = inside and abs(step) <= math.log(ROUGH) and kl >= RESOLVED * resolution
        predictions.append({"lambda": lam, "kl": kl, "holds": bool(holds)})
    return predictions


def scale(lam: float) -> float:
    """λ²(1-λ)²: how kl grows with λ to leading order."""
    return (lam * (1 - lam)) ** 2
