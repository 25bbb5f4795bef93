"""log Z(λ) of exact DeRa at many λ, in one walk along λ: an exponential a token of the vocabulary, not two a λ.

    Z(λ) = Σ_v p_ref(v)·exp(λ·r(v)),   r = log p_aligned - log p_ref,   d log Z/dλ = E_λ[r]

From one λ to the next a step h away each term is multiplied by exp(h·r). On an even grid that factor is the same at
every step, so a λ costs a product and two sums over the vocabulary. Nothing is interpolated: the terms are those of the
sum, and their relative error grows by a rounding a step.

That holds as long as no term leaves the range of float64 on its way. `SAFE` bounds it, for each row; rows beyond, such
as those with tokens that a model rules out, are summed at each λ by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..lambdas import Lam, Vector, numbers

LOWEST = -1e30  # stands for log 0, so that 0·log 0 is 0
WALK_VALUES = 1 << 15  # terms that a CPU takes along λ at a time, so that they and their factors stay in its cache
FACTORS = 4  # exp(h·r) that are kept, for as many steps h: a grid that was rounded has two or three
SAFE = 600.0  # nats: exp of this, times a vocabulary, is finite in float64, and exp(-SAFE) is not denormal
Tilted = tuple[torch.Tensor, torch.Tensor]  # log Z, and Σ_k λ_k·E_λ[r_k]; both (rows, λ)


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of each row, float64, `LOWEST` where one is 0; from logits of any float dtype."""
    log_p = logits.double()
    log_p -= log_p.logsumexp(-1, keepdim=True)
    return log_p.clamp_(min=LOWEST)


def mixture(
    log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lam: Lam
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p_λ, p_λ, and log Z_λ = log Σ_v p_ref^(1-Σλ)·Π p_k^λ_k of each row; (rows, vocabulary) twice, (rows,)."""
    log_p = geometric(log_ref, log_aligned, lam)
    log_z = log_p.logsumexp(-1)
    log_p -= log_z[..., None]
    return log_p, log_p.exp(), log_z


def geometric(log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lam: Lam) -> torch.Tensor:
    """(1-Σλ)·log p_ref + Σ λ_k·log p_k of log-probabilities of any shape: log p_λ but for the normaliser."""
    shares = numbers(lam)
    log_p = (1 - sum(shares)) * log_ref
    for share, log_side in zip(shares, log_aligned, strict=True):
        log_p.add_(log_side, alpha=share)
    if min(*shares, 1 - sum(shares)) < 0:
        # A token that any of the models rules out stays ruled out.
        for log_side in (log_ref, *log_aligned):
            log_p.masked_fill_(log_side <= LOWEST, LOWEST)
    return log_p


def normalisers(log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lams: Sequence[Lam]) -> Tilted:
    """log Z and Σ_k λ_k·E_λ[r_k] of each row at each λ, float64 (rows, λ); their difference is KL(p_λ‖p_ref).

    Args:
        log_ref, log_aligned: log-probabilities (rows, vocabulary), as `log_softmax` makes them.
    """
    if isinstance(lams[0], Vector):
        return _one_by_one(log_ref, log_aligned, lams)
    lowest = torch.minimum(log_ref.amin(-1), log_aligned[0].amin(-1))
    # |log of a term| ≤ |1-λ|·|log p_ref| + |λ|·|log p_aligned| ≤ (1 + 2|λ|)·|lowest|
    safe = -lowest * (1 + 2 * max(map(abs, lams))) < SAFE
    if safe.all():
        return _walk(log_ref, log_aligned[0], lams)
    log_z, tilt = log_ref.new_empty(2, len(log_ref), len(lams))
    for rows, method in ((safe, lambda ref, aligned, at: _walk(ref, aligned[0], at)), (~safe, _one_by_one)):
        if rows.any():
            log_z[rows], tilt[rows] = method(log_ref[rows], [side[rows] for side in log_aligned], lams)
    return log_z, tilt


def _walk(log_ref: torch.Tensor, log_aligned: torch.Tensor, lams: Sequence[float]) -> Tilted:
    """`normalisers` of one aligned model, for rows whose terms stay in float64's range."""
    sums = log_ref.new_zeros(len(log_ref), len(lams), 2)
    rows, width = log_ref.shape
    if log_ref.device.type == "cpu":
        rows, width = max(1, WALK_VALUES // width), min(width, WALK_VALUES)
    for row in range(0, len(log_ref), rows):
        for start in range(0, log_ref.shape[1], width):
            part = slice(row, row + rows), slice(start, start + width)
            sums[part[0]] += _sums(log_ref[part], log_aligned[part], lams)
    total, weighted = sums.unbind(-1)
    return total.log(), weighted / total * torch.tensor(lams, dtype=total.dtype, device=total.device)


def _sums(log_ref: torch.Tensor, log_aligned: torch.Tensor, lams: Sequence[float]) -> torch.Tensor:
    """Σ_v p_ref·exp(λr) and Σ_v p_ref·exp(λr)·r over some tokens of the vocabulary at each λ, (rows, λ, 2)."""
    ratio = log_aligned - log_ref
    summands = torch.stack([torch.ones_like(ratio), ratio], 1)
    order = sorted(range(len(lams)), key=lams.__getitem__)
    at = lams[order[0]]
    terms = torch.add(log_ref, ratio, alpha=at).exp_()
    factors: dict[float, torch.Tensor] = {}
    sums: list[torch.Tensor] = [terms] * len(lams)
    for column in order:
        # Steps of an even grid differ by roundings only; what a step is off by is made good by the next.
        if step := round(lams[column] - at, 14):
            if step not in factors:
                if len(factors) == FACTORS:
                    factors.clear()
                factors[step] = torch.mul(ratio, step).exp_()
            terms *= factors[step]
            at += step
        sums[column] = torch.bmm(summands, terms[..., None])[..., 0]
    return torch.stack(sums, 1)


def _one_by_one(log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lams: Sequence[Lam]) -> Tilted:
    """`normalisers` of any number of aligned models and of any rows."""
    rows = []
    for lam in lams:
        _, p, log_z = mixture(log_ref, log_aligned, lam)
        shares = [(share, log_side) for share, log_side in zip(numbers(lam), log_aligned, strict=True) if share]
        tilt = [share * torch.linalg.vecdot(p, log_side - log_ref) for share, log_side in shares]
        rows.append((log_z, sum(tilt) if tilt else torch.zeros_like(log_z)))
    return torch.stack([row[0] for row in rows], 1), torch.stack([row[1] for row in rows], 1)
