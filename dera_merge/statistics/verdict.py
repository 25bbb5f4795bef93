"""What one λ's figures say to someone who wants to ship the merge, and on a scale that people know."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

Verdict = Literal["safe", "usable", "not DeRa any more"]
VERDICTS: tuple[Verdict, ...] = ("safe", "usable", "not DeRa any more")
SAFE_CAPTURED, USABLE_CAPTURED = 0.9, 0.5
USABLE_FLOORS = 10  # times what bfloat16 alone costs


def bits_like(kl: float, rungs: dict[int, float]) -> float | None:
    """How many bits of quantisation cost as much as `kl`, between rungs on a logarithmic scale; None outside."""
    known = sorted((math.log(value), bits) for bits, value in rungs.items() if value > 0)
    if kl <= 0 or len(known) < 2 or not known[0][0] <= math.log(kl) <= known[-1][0]:
        return None
    return float(np.interp(math.log(kl), *zip(*known, strict=True)))


def in_bits(kl: float, rungs: dict[int, float]) -> str:
    """`kl` in words, on the scale of `bits_like`."""
    bits = bits_like(kl, rungs)
    if bits is not None:
        return f"about as far as {bits:.0f}-bit quantisation"
    return "nearer than 8-bit quantisation" if kl <= min(rungs.values()) else "further than 3-bit quantisation"


def verdict(result: dict[str, Any], floor: float | None, resolution: float) -> tuple[Verdict, str]:
    """What one λ's figures say to someone who wants to ship the merge, and why.

    `safe`: kl, at the upper end of its interval, is below what bfloat16 alone costs exact DeRa, or at least 90 % of the
    shift is captured. `usable`: at least half is captured, or kl is below ten times that cost. Else `not DeRa any
    more`.

    Args:
        result: from `summarise`.
        floor: what bfloat16 alone costs, nats per token; None where it was not measured.
        resolution: nats below which kl is noise; it stands in for a floor that is unknown or smaller.
    """
    kl = result["kl_ci"][1] if result["kl_ci"] else result["kl"]
    surely = "at least " if result["kl_ci"] else ""
    known = floor is not None and floor >= resolution
    yardstick = "what bfloat16 alone costs exact DeRa" if known else "the resolution of the measurement"
    floor = floor if known else resolution
    if kl is None or not math.isfinite(kl):
        return "not DeRa any more", "kl is not finite"
    if kl <= floor:
        return "safe", f"kl is below {yardstick}"
    bound = min(result["kl_ref"], result["kl_aligned"])
    captured = 1 - kl / bound if bound > resolution else None
    if captured is not None and captured >= USABLE_CAPTURED:
        word: Verdict = "safe" if captured >= SAFE_CAPTURED else "usable"
        return word, f"{surely}{captured:.0%} of the shift is captured"
    if kl <= USABLE_FLOORS * floor:
        return "usable", f"kl is {kl / floor:.1f} times {yardstick}"
    if captured is None:
        return "not DeRa any more", "exact DeRa is at one of the two models, and the merge is not"
    nearer = "reference" if result["kl_ref"] <= result["kl_aligned"] else "aligned model"
    if captured < 0:
        return "not DeRa any more", f"the {nearer}, which you have already, may be nearer to exact DeRa"
    return "not DeRa any more", f"no more than {captured:.0%} of the shift is surely captured"
