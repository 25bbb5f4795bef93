"""Per-token divergences from exact DeRa, made from traces a few tokens at a time and reduced in float64.

    kl = Σ_v p(v)·[log p(v) - log q(v)],    p = softmax(h_λ) exact, q = the approximation, in nats

Memory: `HEAD_VALUES` logits of each model in float32, and a dozen arrays of `REDUCE_VALUES` in float64 (on an
accelerator the reductions take a whole chunk of the heads at once).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..lambdas import Lam, numbers
from ..statistics.summary import aligned_name, covariance_name
from .normaliser import geometric, log_softmax, mixture, normalisers
from .traces import Trace, logits_of

HEAD_VALUES = 1 << 22  # logits of one model that exist at a time; below a few dozen tokens the head is slow
REDUCE_VALUES = 1 << 18  # logits that a CPU reduces at a time in float64, so that they stay in its cache


def chunks(tokens: int, vocab_size: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Chunks of tokens for the heads; with each, its parts for the reductions, counted from the start of the chunk."""
    step = max(1, HEAD_VALUES // vocab_size)
    part = max(1, REDUCE_VALUES // vocab_size) if device.type == "cpu" else step
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        yield slice(start, start + count), [slice(i, min(i + part, count)) for i in range(0, count, part)]


@torch.no_grad()
def divergences(
    exact: Sequence[Trace], approximations: Sequence[tuple[Lam, dict[str, Trace]]], tokens: torch.Tensor,
    vocab_size: int,
) -> dict[Lam, dict[str, np.ndarray]]:  # fmt: skip
    """Per-token figures for each λ and its approximations.

    Args:
        exact: traces of the reference, and then of each aligned model.
        approximations: λ, and name → trace. The one called `kl` gets all figures; any other gets its kl alone, under
            its name (`kl_nonlinearity`: the same model, not rounded).
        tokens: the texts' own scored tokens (tokens,).
        vocab_size: rows of the vocabulary that all models have.

    Returns:
        λ → measure → float64 array (tokens,): `MEASURES`, `CHOSEN`, `log_z`, and kl of the others. With several aligned
        models also the figures of the further ones, `kl_aligned_2` and so on, and the covariances of their log-ratios,
        `cov_1_2` and so on.
    """
    figures: dict[Lam, dict[str, list[torch.Tensor]]] = {lam: {} for lam, _ in approximations}
    device = exact[0].hidden.device
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, device):
        sides = logits_of(exact, chunk, vocab_size)
        approx_logits = [
            {name: trace.head(trace.hidden[chunk])[:, :vocab_size] for name, trace in traces.items()}
            for _, traces in approximations
        ]
        chosen = tokens[chunk].to(device)
        for part in parts:
            log_ref, *log_aligned = (log_softmax(side[part]) for side in sides)
            token_ids = chosen[part][:, None]
            shared = {"logp_ref": log_ref.gather(1, token_ids)[:, 0]}
            shared |= {
                aligned_name("logp", k): log_side.gather(1, token_ids)[:, 0]
                for k, log_side in enumerate(log_aligned, 1)
            }
            if len(log_aligned) > 1:
                covariance = covariances(log_ref, log_aligned)
                shared |= {
                    covariance_name(k, m): covariance[:, k, m] for k in range(len(log_aligned)) for m in range(k + 1)
                }
            for (lam, _), logits in zip(approximations, approx_logits, strict=True):
                row = shared | _at(
                    log_ref, log_aligned, lam, {name: rows[part] for name, rows in logits.items()}, token_ids
                )
                for measure, values in row.items():
                    figures[lam].setdefault(measure, []).append(values.cpu())
    return {lam: {m: torch.cat(values).numpy() for m, values in measures.items()} for lam, measures in figures.items()}


def _at(
    log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lam: Lam, approximations: dict[str, torch.Tensor],
    token_ids: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The figures that depend on λ, of some rows of log-probabilities; `token_ids` (rows, 1): the texts' own tokens."""
    dot = torch.linalg.vecdot
    log_p, p, log_z = mixture(log_ref, log_aligned, lam)
    entropy = dot(p, log_p)  # negative
    row = {"kl_ref": entropy - dot(p, log_ref), "log_z": log_z, "logp": log_p.gather(1, token_ids)[:, 0]}
    row |= {aligned_name("kl", k): entropy - dot(p, log_side) for k, log_side in enumerate(log_aligned, 1)}
    for name, logits in approximations.items():
        log_q = log_softmax(logits)
        row[name] = entropy - dot(p, log_q)
        if name != "kl":
            continue
        q = log_q.exp()
        both = p + q
        row |= {
            "reverse_kl": dot(q, log_q) - dot(q, log_p),
            "top1": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
            "logp_merged": log_q.gather(1, token_ids)[:, 0],
            # js = ½·KL(p‖m) + ½·KL(q‖m), m = (p+q)/2
            "js": (entropy + dot(q, log_q) - dot(both, both.clamp(min=1e-300).log())) / 2 + math.log(2),
        }
        row["tv"] = q.sub_(p).abs_().sum(-1) / 2
    return row


@torch.no_grad()
def between_mixtures(
    exact: Sequence[Trace], other: Sequence[Trace], lams: Sequence[Lam], vocab_size: int
) -> dict[Lam, np.ndarray]:
    """KL(exact‖exact of other models) of each token, for each λ: λ → float64 array (tokens,).

    Args:
        exact, other: traces of a reference, and then of each aligned model.
    """
    kl: dict[Lam, list[torch.Tensor]] = {lam: [] for lam in lams}
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, exact[0].hidden.device):
        logits = [*logits_of(exact, chunk, vocab_size), *logits_of(other, chunk, vocab_size)]
        for part in parts:
            log = [log_softmax(side_logits[part]) for side_logits in logits]
            ours, theirs = log[: len(exact)], log[len(exact) :]
            for lam in lams:
                log_p, p, _ = mixture(ours[0], ours[1:], lam)
                log_q, _, _ = mixture(theirs[0], theirs[1:], lam)
                kl[lam].append((torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)).cpu())
    return {lam: torch.cat(values).numpy() for lam, values in kl.items()}


@torch.no_grad()
def densities(
    exact: Sequence[Trace], tokens: torch.Tensor, lams: Sequence[Lam], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact DeRa's log-probability of each token, and its kl from the reference there, at many λ.

    With log Z = log Σ p_ref^(1-Σλ)·Π p_k^λ_k, KL(p_λ‖p_ref) = Σ λ_k·E_λ[log p_k - log p_ref] - log Z.

    Args:
        exact: traces of the reference, and then of each aligned model.
        tokens: the texts' own scored tokens (tokens,).

    Returns:
        Two float64 arrays (tokens, λ), in nats.
    """
    logp, kl = [], []
    device = exact[0].hidden.device
    tilted = torch.tensor([float(any(numbers(lam))) for lam in lams], dtype=torch.float64, device=device)
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, device):
        sides = logits_of(exact, chunk, vocab_size)
        chosen = tokens[chunk].to(device)
        for part in parts:
            log_ref, *log_aligned = (log_softmax(side[part]) for side in sides)
            log_z, tilt = normalisers(log_ref, log_aligned, lams)
            own = [log_side.gather(1, chosen[part][:, None]) for log_side in (log_ref, *log_aligned)]
            mixed = torch.cat([geometric(own[0], own[1:], lam) for lam in lams], 1)
            logp.append((mixed - log_z).cpu())
            kl.append(((tilt - log_z).clamp_(min=0) * tilted).cpu())
    return torch.cat(logp).numpy(), torch.cat(kl).numpy()


def covariances(log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Covariances of the log-ratios log p_k - log p_ref under the reference, (rows, models, models), nats squared.

    The root of the k-th diagonal element, averaged over tokens, is the size of that model's log-ratio.
    """
    ratios, p = torch.stack([log_side - log_ref for log_side in log_aligned]), log_ref.exp()
    ratios -= (ratios * p).sum(-1, keepdim=True)
    return torch.einsum("ktv,ltv,tv->tkl", ratios, ratios, p)


@torch.no_grad()
def gram(exact: Sequence[Trace], vocab_size: int) -> np.ndarray:
    """The mean of `covariances` over all tokens, (models, models); `exact` as for `divergences`."""
    per_token = []
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, exact[0].hidden.device):
        sides = logits_of(exact, chunk, vocab_size)
        for part in parts:
            log_ref, *log_aligned = (log_softmax(side[part]) for side in sides)
            per_token.append(covariances(log_ref, log_aligned).cpu())
    return torch.cat(per_token).mean(0).numpy()
