"""The log-probability of given continuations, and whether greedy decoding would write them, at every λ of a grid.

    log π_λ(y|x) = Σ_t [(1-λ)·log p_ref(y_t) + λ·log p_aligned(y_t) - log Z_t(λ)]

One reading of both models serves all λ. Greedy decoding writes y where y_t is the likeliest token at every t. The lead
of y_t over a rival is linear in λ, so that is an interval of λ for each token, and of exact DeRa no λ is missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..lambdas import Lam, Vector
from .divergence import HEAD_VALUES, chunks
from .normaliser import LOWEST, geometric, log_softmax, normalisers
from .traces import Text, Trace, logits_of


@dataclass(frozen=True)
class Continuations:
    """Continuations of contexts, over texts that are each read once: those that differ in their last token share one.

    Attributes:
        texts: what a model reads.
        rows: for each token of each continuation, which of the texts' scored tokens predicts it, (tokens,).
        tokens: those tokens, (tokens,), of one continuation after another.
        starts: where each continuation begins among them, (continuations,).
    """

    texts: list[Text]
    rows: torch.Tensor
    tokens: torch.Tensor
    starts: np.ndarray

    @staticmethod
    def of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Continuations:
        """Of (context, continuation) pairs of token ids, neither empty."""
        place_of: dict[tuple[int, tuple[int, ...]], int] = {}
        texts: list[Text] = []
        places: list[int] = []  # the text of each pair
        for context, continuation in pairs:
            ids = (*context, *continuation)
            place = place_of.setdefault((len(context), ids[:-1]), len(texts))
            if place == len(texts):
                texts.append(Text(place, list(ids), len(context)))
            places.append(place)
        first_row = np.cumsum([0, *(len(text.completion) for text in texts)])
        lengths = [len(continuation) for _, continuation in pairs]
        rows = [first_row[place] + np.arange(length) for place, length in zip(places, lengths, strict=True)]
        tokens = [token for _, continuation in pairs for token in continuation]
        starts = np.cumsum([0, *lengths])[:-1]
        return Continuations(texts, torch.tensor(np.concatenate(rows)), torch.tensor(tokens), starts)

    def summed(self, values: torch.Tensor) -> np.ndarray:
        """Values (tokens, …) summed over each continuation, (continuations, …)."""
        return np.add.reduceat(values.cpu().numpy(), self.starts)

    def everywhere(self, holds: torch.Tensor) -> np.ndarray:
        """Whether something holds (tokens, …) at each token of a continuation, (continuations, …)."""
        return np.logical_and.reduceat(holds.cpu().numpy(), self.starts)


@torch.no_grad()
def scores(
    sides: Sequence[Trace], continuations: Continuations, lams: Sequence[Lam], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of exact DeRa: log-probability in nats, float64, and whether it is greedy's; both (continuations, λ).

    Args:
        sides: what the reference, and then each aligned model, makes of `continuations.texts`.
        vocab_size: rows of the vocabulary that all models have.
    """
    logp = torch.empty(len(continuations.tokens), len(lams), dtype=torch.float64)
    greedy = torch.empty(logp.shape, dtype=torch.bool)
    for chosen, rows, token_ids, (log_ref, *log_aligned) in _parts(sides, continuations, vocab_size):
        log_z, _ = normalisers(log_ref, log_aligned, lams)
        own = [log_side[rows, token_ids][:, None] for log_side in (log_ref, *log_aligned)]
        logp[chosen] = (torch.cat([geometric(own[0], own[1:], lam) for lam in lams], 1) - log_z[rows]).cpu()
        greedy[chosen] = _greedy(log_ref, log_aligned, rows, token_ids, lams).cpu()
    return continuations.summed(logp), continuations.everywhere(greedy)


@torch.no_grad()
def own_scores(trace: Trace, continuations: Continuations, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one model by itself: as `scores`, both (continuations,)."""
    logp = torch.empty(len(continuations.tokens), dtype=torch.float64)
    greedy = torch.empty(logp.shape, dtype=torch.bool)
    for chosen, rows, token_ids, (log_p,) in _parts([trace], continuations, vocab_size):
        logp[chosen] = log_p[rows, token_ids].cpu()
        greedy[chosen] = (log_p.argmax(-1)[rows] == token_ids).cpu()
    return continuations.summed(logp), continuations.everywhere(greedy)


def _parts(
    traces: Sequence[Trace], continuations: Continuations, vocab_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
    """Log-probabilities (rows, vocabulary) of each trace, some scored tokens of the texts at a time.

    With them, which of `continuations.tokens` these rows predict, the row of each, and those tokens.
    """
    device = traces[0].hidden.device
    order = continuations.rows.argsort(stable=True)
    by_row = continuations.rows[order]
    for chunk, parts in chunks(len(traces[0].hidden), vocab_size, device):
        sides = logits_of(traces, chunk, vocab_size)
        for part in parts:
            bounds = torch.tensor([chunk.start + part.start, chunk.start + part.stop])
            first, last = torch.searchsorted(by_row, bounds).tolist()
            chosen = order[first:last]
            rows = (by_row[first:last] - bounds[0]).to(device)
            logs = [log_softmax(side[part]) for side in sides]
            yield chosen, rows, continuations.tokens[chosen].to(device), logs


def _greedy(
    log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], rows: torch.Tensor, token_ids: torch.Tensor,
    lams: Sequence[Lam],
) -> torch.Tensor:  # fmt: skip
    """Whether each token, of a row of log-probabilities, is the likeliest at each λ: (tokens, λ)."""
    walks = not isinstance(lams[0], Vector) and float(min(log_ref.min(), log_aligned[0].min())) > LOWEST
    if not walks:  # a vector, or a token that a model rules out: then a lead is no straight line
        top = torch.stack([geometric(log_ref, log_aligned, lam).argmax(-1) for lam in lams], 1)
        return top[rows] == token_ids[:, None]
    at, few = torch.tensor(lams, dtype=log_ref.dtype, device=log_ref.device), max(1, HEAD_VALUES // log_ref.shape[1])
    found = []
    for row, token in zip(rows.split(few), token_ids.split(few), strict=True):  # a row may be of many tokens
        low, high = greedy_between(log_ref[row], log_aligned[0][row], token)
        found.append((low[:, None] <= at) & (at <= high[:, None]))
    return torch.cat(found)


def greedy_between(
    log_ref: torch.Tensor, log_aligned: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Between which λ each row's token is the likeliest, ties included: two bounds, (rows,); low > high: at none.

    The lead over a rival v is lead_ref + λ·(lead_aligned - lead_ref) ≥ 0 on a half-line, and those intersect.

    Args:
        log_ref, log_aligned: log-probabilities or logits, float64 (rows, vocabulary).
        token_ids: (rows,).
    """
    index = token_ids[:, None]
    lead = log_ref.gather(1, index) - log_ref
    slope = log_aligned.gather(1, index) - log_aligned - lead
    crossing = -lead / slope
    low = crossing.where(slope > 0, -math.inf).amax(-1)
    high = crossing.where(slope < 0, math.inf).amin(-1)
    return low.masked_fill((slope.eq(0) & lead.lt(0)).any(-1), math.inf), high
