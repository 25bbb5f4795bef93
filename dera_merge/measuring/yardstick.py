"""A scale that people know: what bfloat16, and quantisation to fewer bits, cost exact DeRa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..decoding.load import each_side
from ..merging.live import live
from .divergence import between_mixtures
from .traces import Text, Trace, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.pair import Pair

BITS = (8, 6, 5, 4, 3)
GROUP = 32  # weights that share a scale


@torch.no_grad()
def quantise(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to 2^(bits-1) - 1 steps on either side of 0, in groups of 32, each scaled by its largest weight.

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
    pair: Pair, texts: list[Text], lams: Sequence[float], device: str | torch.device, tell: Callable[[], None]
) -> dict[float, np.ndarray]:
    """KL(exact in float32‖in bfloat16) of each scored token, for each λ; (tokens,) float64.

    Two passes a model; `tell` is called after each.
    """

    def read(model: PreTrainedModel) -> Trace:
        trace = trace_of(model, texts, wide_head=False)  # what bfloat16 costs, the head's share included
        tell()
        return trace

    traces = [list(each_side(pair, dtype, device, read)) for dtype in (torch.float32, torch.bfloat16)]
    return between_mixtures(*traces, lams, pair.vocab_size)


def ladder(
    pair: Pair, texts: list[Text], lams: Sequence[float], device: str | torch.device, tell: Callable[[], None]
) -> dict[int, dict[float, np.ndarray]]:
    """KL(exact‖exact of quantised weights) of each scored token: bits → λ → (tokens,) float64. 6 passes a model.

    All matrices of all models are quantised, embeddings and head too, nothing else. `tell` is called after each pass.
    """
    ends = pair.ends()
    model = live(pair, ends[0], device=device)
    sides: list[list[Any]] = []
    for lam in ends:
        model.set_lam(lam)
        kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
        heads: list[torch.nn.ModuleDict] = []  # this side's; a quantised head is a copy of its own
        traces = [trace_of(model, texts, heads)]
        tell()
        for bits in BITS:
            _put(model, {name: quantise(weight, bits) for name, weight in kept.items()})
            traces.append(trace_of(model, texts, heads))
            tell()
        sides.append(traces)
    whole, *rounded = zip(*sides, strict=True)
    return {
        bits: between_mixtures(whole, rung, lams, pair.vocab_size) for bits, rung in zip(BITS, rounded, strict=True)
    }


@torch.no_grad()
def _put(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy these values into the model's parameters, by name."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
