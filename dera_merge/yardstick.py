"""A scale that people know: what bfloat16, and quantisation to fewer bits, cost exact DeRa; and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .divergence import between_mixtures
from .traces import Text, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .pair import ModelPair

BITS = (8, 6, 5, 4, 3)
GROUP = 32  # weights that share a scale

Verdict = Literal["safe", "usable", "not DeRa any more"]
SAFE_CAPTURED, USABLE_CAPTURED = 0.9, 0.5
USABLE_FLOORS = 10  # times what bfloat16 alone costs


@torch.no_grad()
def quantise(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to 2^(bits-1) - 1 steps on either side of 0, in groups of 32 along the last axis, scaled by the largest of each.

    Args:
        weight: any float dtype; (…, columns), the last group of a row may be shorter.
        bits: 2 or more.

    Returns:
        A tensor of the same shape and dtype: dequant(quant(weight)).
    """
    columns = weight.shape[-1]
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % GROUP)).unflatten(-1, (-1, GROUP))
    step = padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (padded / step.clamp(min=1e-30)).round() * step
    return rounded.flatten(-2)[..., :columns].to(weight.dtype)


def noise_floor(
    pair: ModelPair, texts: list[Text], lams: Sequence[float], device: str | torch.device, tell: Callable[[], None]
) -> dict[float, np.ndarray]:
    """KL(exact in float32‖exact in bfloat16) of each scored token, for each λ; (tokens,) float64. Two passes a model."""
    traces = []
    for dtype in (torch.float32, torch.bfloat16):
        exact = pair.exact(dtype=dtype, device=device)
        traces.append([])
        for model in exact.sides:
            traces[-1].append(trace_of(model, texts, []))
            tell()
    return between_mixtures(*traces, lams, pair.vocab_size)


def ladder(
    pair: ModelPair, texts: list[Text], lams: Sequence[float], device: str | torch.device, tell: Callable[[], None]
) -> dict[int, dict[float, np.ndarray]]:
    """KL(exact‖exact of quantised weights) of each scored token: bits → λ → (tokens,) float64. 6 passes a model.

    All matrices of all models are quantised, embeddings and head too, nothing else.
    """
    ends = pair.ends()
    model = pair.merged(ends[0], device=device)
    sides: list[list[Any]] = []
    for lam in ends:
        model.set_lam(lam)
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
        heads: list[torch.nn.ModuleDict] = []  # of this side; quantised ones are copies of their own
        traces = [trace_of(model, texts, heads)]
        tell()
        for bits in BITS:
            _put(model, {name: quantise(weight, bits) for name, weight in kept.items()})
            traces.append(trace_of(model, texts, heads))
            tell()
        sides.append(traces)
    whole, *rounded = zip(*sides, strict=True)
    return {bits: between_mixtures(whole, each, lams, pair.vocab_size) for bits, each in zip(BITS, rounded, strict=True)}


@torch.no_grad()
def _put(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


def bits_like(kl: float, rungs: dict[int, float]) -> float | None:
    """How many bits of quantisation cost as much as `kl`: between rungs on a logarithmic scale; None outside of them."""
    known = sorted((math.log(value), bits) for bits, value in rungs.items() if value > 0)
    if kl <= 0 or len(known) < 2 or not known[0][0] <= math.log(kl) <= known[-1][0]:
        return None
    return float(np.interp(math.log(kl), *zip(*known, strict=True)))


def in_bits(kl: float, rungs: dict[int, float]) -> str:
    """`kl` in words on that scale."""
    bits = bits_like(kl, rungs)
    if bits is not None:
        return f"about as far as {bits:.0f}-bit quantisation"
    return "nearer than 8-bit quantisation" if kl <= min(rungs.values()) else "further than 3-bit quantisation"


def verdict(result: dict[str, Any], floor: float | None, resolution: float) -> tuple[Verdict, str]:
    """What one λ's figures say to someone who wants to ship the merge, and why.

    `safe`: kl, at the upper end of its interval, is below what bfloat16 alone costs exact DeRa, or at least 90 % of the
    shift is captured. `usable`: at least half is captured, or kl is below ten times that cost. Else `not DeRa any more`.
    """
    kl = result["kl_ci"][1] if result["kl_ci"] else result["kl"]
    surely = "at least " if result["kl_ci"] else ""
    known = floor is not None and floor >= resolution
    what = "what bfloat16 alone costs exact DeRa" if known else "the resolution of the measurement"
    floor = floor if known else resolution
    if kl is None or not math.isfinite(kl):
        return "not DeRa any more", "kl is not finite"
    if kl <= floor:
        return "safe", f"kl is below {what}"
    bound = min(result["kl_ref"], result["kl_aligned"])
    captured = 1 - kl / bound if bound > resolution else None
    if captured is not None and captured >= USABLE_CAPTURED:
        word: Verdict = "safe" if captured >= SAFE_CAPTURED else "usable"
        return word, f"{surely}{captured:.0%} of the shift is captured"
    if kl <= USABLE_FLOORS * floor:
        return "usable", f"kl is {kl / floor:.1f} times {what}"
    if captured is None:
        return "not DeRa any more", "exact DeRa is at one of the two models, and the merge is not"
    nearer = "reference" if result["kl_ref"] <= result["kl_aligned"] else "aligned model"
    if captured < 0:
        return "not DeRa any more", f"the {nearer}, which you have already, may be nearer to exact DeRa"
    return "not DeRa any more", f"no more than {captured:.0%} of the shift is surely captured"
