"""Where in the model a merge's error comes from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..merging.live import live
from ..models.names import layer_kind
from .traces import Text, Trace, batches, decoder_of, inputs_of, scored, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.pair import Pair

Features = list[list[torch.Tensor]]  # of each batch of texts, by layer, (scored tokens, hidden size)


def attribute(
    pair: Pair, texts: list[Text], lam: float, device: str | torch.device, tell: Callable[[int, int], None],
    points: int = 4,
) -> dict[str, float]:  # fmt: skip
    """Which tensors' Δ the error comes from: shares of ½·Var_{p_λ}[h_λ - h(θ_λ)], which is kl to leading order.

    With v = p_λ∘(e - E[e]) for the error e = h_λ - h(θ_λ), the variance is v·e, and e = λ∫₀¹ dh/dτ - ∫₀^λ dh/dτ along
    the line. dh/dτ is a sum over tensors, each through its own Δ: gradients of v·h at a few points of the line, times Δ
    (integrated gradients, Sundararajan et al., 2017). The shares sum to the whole up to the error of the quadrature. A
    share may be negative: that of a tensor whose change makes up for others'.

    Args:
        tell: called with (steps done, steps in all).
        points: of the quadrature (Gauss-Legendre) on each stretch of the line.

    Returns:
        Tensor name in memory → nats per token.
    """
    model = live(pair, 0.0, device=device)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.set_lam(1.0)
    delta = {name: d for name, p in model.named_parameters() if bool((d := p.detach() - start[name]).any())}

    @torch.no_grad()
    def turn(tau: float) -> None:
        for name, change in delta.items():
            model.get_parameter(name).copy_(start[name] + tau * change)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in delta)
    groups = list(batches(texts, 512))
    starts = np.cumsum([0, *(len(text.completion) for text in texts)])
    heads: list[torch.nn.ModuleDict] = []
    ends: list[Trace] = []
    for tau in (0.0, 1.0, lam):
        turn(tau)
        ends.append(trace_of(model, texts, heads))

    @torch.no_grad()
    def direction(group: list[int]) -> torch.Tensor:
        """v of the group's scored tokens, made anew each time: logits of all texts at once would not stay small."""
        where = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in group])
        ref, aligned, merged = (end.head(end.hidden[where]) for end in ends)
        h = (1 - lam) * ref + lam * aligned
        p, error = h.softmax(-1), h - merged
        return p * (error - (p * error).sum(-1, keepdim=True))

    nodes, weights = np.polynomial.legendre.leggauss(points)
    # λ∫₀¹ - ∫₀^λ as weighted stretches, without what cancels: (λ-1) on [0, min(λ,1)], λ on [λ,1] or -(1) on [1,λ].
    inner = min(lam, 1.0)
    stretches = [(0.0, inner, lam - 1), (lam, 1.0, lam) if lam < 1 else (1.0, lam, -1.0)]
    tokens = sum(len(text.completion) for text in texts)
    shares = dict.fromkeys(delta, 0.0)
    steps = [(a + (b - a) * (x + 1) / 2, factor * w * (b - a) / 2) for a, b, factor in stretches if a != b
             for x, w in zip(nodes, weights, strict=True)]  # fmt: skip
    for number, (tau, weight) in enumerate(steps, 1):
        turn(tau)
        for group in groups:
            chosen = [texts[i] for i in group]
            logits = scored(model(**inputs_of(chosen, model), use_cache=False).logits.float(), chosen)
            (logits * direction(group)).sum().backward()
        for name, change in delta.items():
            parameter = model.get_parameter(name)
            if parameter.grad is not None:
                shares[name] += weight * float((parameter.grad.double() * change.double()).sum()) / tokens / 2
            parameter.grad = None
        tell(number, len(steps))
    return shares


@torch.no_grad()
def features(model: PreTrainedModel, texts: list[Text]) -> Features:
    """A model's hidden states at the scored tokens, of each batch: the embeddings', and each layer's."""
    found = []
    for batch in batches(texts):
        chosen = [texts[i] for i in batch]
        inputs = inputs_of(chosen, model)
        states = decoder_of(model)[1](**inputs, use_cache=False, output_hidden_states=True).hidden_states
        found.append([scored(state, chosen) for state in states])
    return found


def feature_gaps(ref: Features, aligned: Features, merged: Features, lam: float) -> list[float]:
    """How far the merged model's features leave the interpolated ones, layer by layer, the embeddings first.

    ‖x_merged - (1-λ)x_ref - λ·x_aligned‖ / ‖x_aligned - x_ref‖ over all scored tokens' hidden states.
    """
    gap = shift = None
    for batch in zip(ref, aligned, merged, strict=True):
        layers = [[state.double() for state in states] for states in zip(*batch, strict=True)]
        distance = np.array([float(((1 - lam) * r + lam * a - m).square().sum()) for r, a, m in layers])
        apart = np.array([float((a - r).square().sum()) for r, a, _ in layers])
        gap, shift = (distance, apart) if gap is None else (gap + distance, shift + apart)
    return [math.sqrt(g / s) if s > 0 else 0.0 for g, s in zip(gap, shift, strict=True)]


def by_layer(shares: dict[str, float], gaps: list[float]) -> dict[str, Any]:
    """Shares of the error by tensor, by numbered layer and by kind of module, and the features' gaps.

    Args:
        shares: from `attribute`.
        gaps: from `feature_gaps`.
    """
    layers: dict[int, float] = {}
    kinds: dict[str, float] = {}
    for name, share in shares.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            layers[number] = layers.get(number, 0.0) + share
        kinds[layer_kind(name)] = kinds.get(layer_kind(name), 0.0) + share
    largest = sorted(shares, key=lambda name: -abs(shares[name]))[:10]
    return {
        "kl_leading_order": sum(shares.values()),
        "layers": [{"layer": number, "kl": layers[number]} for number in sorted(layers)],
        "kinds": [{"kind": kind, "kl": value} for kind, value in sorted(kinds.items(), key=lambda item: -item[1])],
        "tensors": [{"tensor": name, "kl": shares[name]} for name in largest],
        "feature_gaps": gaps,
    }
