"""Per-token divergences from exact DeRa, made from traces a few tokens at a time and reduced in float64.

    kl = Σ_v p(v)·[log p(v) - log q(v)],    p = softmax(h_λ) exact, q = the approximation, in nats

Memory: `HEAD_VALUES` logits of each model in float32, and of a dozen arrays of `REDUCE_VALUES` in float64 (on an
accelerator the reductions take a head's chunk at once).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..lambdas import Lam, numbers
from ..statistics.summary import aligned_name, covariance_name
from .traces import Trace

HEAD_VALUES = 1 << 22  # logits of a model that exist at a time: a product with the head pays from a few dozen tokens on
REDUCE_VALUES = 1 << 18  # of them in float64 at a time on a CPU: what is computed stays in its cache
LOWEST = -1e30  # stands for log 0, so that 0·log 0 is 0


def chunks(tokens: int, vocab_size: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Chunks of tokens for the heads, and of each its parts for the reductions, counted within the chunk."""
    step = max(1, HEAD_VALUES // vocab_size)
    part = max(1, REDUCE_VALUES // vocab_size) if device.type == "cpu" else step
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        yield slice(start, start + count), [slice(i, min(i + part, count)) for i in range(0, count, part)]


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Of each row, float64, with `LOWEST` for a probability of 0. Logits of any float dtype."""
    log_p = logits.double()
    log_p -= log_p.logsumexp(-1, keepdim=True)
    return log_p.clamp_(min=LOWEST)


def mixture(
    log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lam: Lam
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p_λ, p_λ, and log Z_λ = log Σ_v p_ref^(1-Σλ)·Π p_k^λ_k of each row; (rows, vocabulary) twice, (rows,)."""
    shares = numbers(lam)
    log_p = (1 - sum(shares)) * log_ref
    for share, each in zip(shares, log_aligned, strict=True):
        log_p.add_(each, alpha=share)
    if min(*shares, 1 - sum(shares)) < 0:
        # A token that any of the models rules out stays ruled out.
        for each in (log_ref, *log_aligned):
            log_p.masked_fill_(each <= LOWEST, LOWEST)
    log_z = log_p.logsumexp(-1)
    log_p -= log_z[:, None]
    return log_p, log_p.exp(), log_z


@torch.no_grad()
def divergences(
    exact: Sequence[Trace], approximations: Sequence[tuple[Lam, dict[str, Trace]]], tokens: torch.Tensor,
    vocab_size: int,
) -> dict[Lam, dict[str, np.ndarray]]:  # fmt: skip
    """Per-token figures for each λ and its approximations.

    Args:
        exact: what the reference, and then each aligned model, makes of the texts.
        approximations: λ, and name → trace: `kl`, whose figures these are, and others of which kl alone is wanted,
            under the name that it gets: `kl_nonlinearity`, the same unrounded, say.
        tokens: the texts' own scored tokens (tokens,).
        vocab_size: rows of the vocabulary that all have.

    Returns:
        λ → measure → float64 array (tokens,): `MEASURES`, `CHOSEN`, `log_z`, and kl of the others; with several aligned
        models what is said of the first is said of the others too, as `kl_aligned_2` and so on, and there are the
        covariances of their log-ratios, `cov_1_2` and so on.
    """
    found: dict[Lam, dict[str, list[torch.Tensor]]] = {lam: {} for lam, _ in approximations}
    device = exact[0].hidden.device
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, device):
        sides = [side.head(side.hidden[chunk])[:, :vocab_size] for side in exact]
        others = [
            {name: trace.head(trace.hidden[chunk])[:, :vocab_size] for name, trace in traces.items()}
            for _, traces in approximations
        ]
        chosen = tokens[chunk].to(device)
        for part in parts:
            log_ref, *log_aligned = (log_softmax(side[part]) for side in sides)
            own = chosen[part][:, None]
            here = {"logp_ref": log_ref.gather(1, own)[:, 0]}
            here |= {aligned_name("logp", k): each.gather(1, own)[:, 0] for k, each in enumerate(log_aligned, 1)}
            if len(log_aligned) > 1:
                both = covariances(log_ref, log_aligned)
                here |= {covariance_name(k, m): both[:, k, m] for k in range(len(log_aligned)) for m in range(k + 1)}
            for (lam, _), logits in zip(approximations, others, strict=True):
                row = here | _at(log_ref, log_aligned, lam, {name: each[part] for name, each in logits.items()}, own)
                for measure, values in row.items():
                    found[lam].setdefault(measure, []).append(values.cpu())
    return {lam: {m: torch.cat(values).numpy() for m, values in measures.items()} for lam, measures in found.items()}


def _at(
    log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lam: Lam, approximations: dict[str, torch.Tensor],
    own: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    dot = torch.linalg.vecdot
    log_p, p, log_z = mixture(log_ref, log_aligned, lam)
    entropy = dot(p, log_p)  # negative
    row = {"kl_ref": entropy - dot(p, log_ref), "log_z": log_z, "logp": log_p.gather(1, own)[:, 0]}
    row |= {aligned_name("kl", k): entropy - dot(p, each) for k, each in enumerate(log_aligned, 1)}
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
            "logp_merged": log_q.gather(1, own)[:, 0],
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
        exact, other: a reference and each aligned model.
    """
    found: dict[Lam, list[torch.Tensor]] = {lam: [] for lam in lams}
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, exact[0].hidden.device):
        logits = [t.head(t.hidden[chunk])[:, :vocab_size] for t in (*exact, *other)]
        for part in parts:
            log = [log_softmax(each[part]) for each in logits]
            ours, theirs = log[: len(exact)], log[len(exact) :]
            for lam in lams:
                log_p, p, _ = mixture(ours[0], ours[1:], lam)
                log_q, _, _ = mixture(theirs[0], theirs[1:], lam)
                found[lam].append((torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)).cpu())
    return {lam: torch.cat(values).numpy() for lam, values in found.items()}


@torch.no_grad()
def densities(
    exact: Sequence[Trace], tokens: torch.Tensor, lams: Sequence[Lam], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact DeRa's log-probability of each token, and its kl from the reference there, at many λ.

    With log Z = log Σ p_ref^(1-Σλ)·Π p_k^λ_k, KL(p_λ‖p_ref) = Σ λ_k·E_λ[log p_k - log p_ref] - log Z.

    Args:
        exact: what the reference, and then each aligned model, makes of the texts.
        tokens: the texts' own scored tokens (tokens,).

    Returns:
        Two float64 arrays (tokens, λ), in nats.
    """
    logp, kl = [], []
    device = exact[0].hidden.device
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, device):
        sides = [side.head(side.hidden[chunk])[:, :vocab_size] for side in exact]
        chosen = tokens[chunk].to(device)
        for part in parts:
            log_ref, *log_aligned = (log_softmax(side[part]) for side in sides)
            ratios, own = [each - log_ref for each in log_aligned], chosen[part][:, None]
            rows = []
            for lam in lams:
                log_p, p, log_z = mixture(log_ref, log_aligned, lam)
                shares = zip(numbers(lam), ratios, strict=True)
                terms = [share * torch.linalg.vecdot(p, ratio) for share, ratio in shares if share]
                kept = sum(terms) - log_z if terms else torch.zeros_like(log_z)
                rows.append((log_p.gather(1, own)[:, 0], kept.clamp_(min=0)))
            logp.append(torch.stack([row[0] for row in rows], 1).cpu())
            kl.append(torch.stack([row[1] for row in rows], 1).cpu())
    return torch.cat(logp).numpy(), torch.cat(kl).numpy()


def covariances(log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of the log-ratios log p_k - log p_ref under the reference, (rows, models, models), in nats squared.

    The root of the k-th diagonal element, in the mean over tokens, is the size of that model's log-ratio.
    """
    ratios, p = torch.stack([each - log_ref for each in log_aligned]), log_ref.exp()
    ratios -= (ratios * p).sum(-1, keepdim=True)
    return torch.einsum("ktv,ltv,tv->tkl", ratios, ratios, p)


@torch.no_grad()
def gram(exact: Sequence[Trace], vocab_size: int) -> np.ndarray:
    """The same from what the reference, and then each aligned model, makes of texts."""
    found = []
    for chunk, parts in chunks(len(exact[0].hidden), vocab_size, exact[0].hidden.device):
        sides = [side.head(side.hidden[chunk])[:, :vocab_size] for side in exact]
        for part in parts:
            log_ref, *log_aligned = (log_softmax(side[part]) for side in sides)
            found.append(covariances(log_ref, log_aligned).cpu())
    return torch.cat(found).mean(0).numpy()
