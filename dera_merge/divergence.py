"""Per-token divergences from exact DeRa, made from traces a few tokens at a time and reduced in float64.

    kl = Σ_v p(v)·[log p(v) - log q(v)],    p = softmax(h_λ) exact, q = the approximation, in nats

Memory: `HEAD_VALUES` logits of each model in float32, and of a dozen arrays of `REDUCE_VALUES` in float64 (on an
accelerator the reductions take a head's chunk at once).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .traces import Trace

HEAD_VALUES = 1 << 22  # logits of a model that exist at a time: a product with the head pays from a few dozen tokens on
REDUCE_VALUES = 1 << 18  # of them in float64 at a time on a CPU: what is computed stays in its cache
LOWEST = -1e30  # stands for log 0, so that 0·log 0 is 0

MEASURES = ("kl", "reverse_kl", "js", "tv", "top1", "kl_ref", "kl_aligned")
CHOSEN = ("logp", "logp_merged", "logp_ref", "logp_aligned")  # log-probabilities of the text's own tokens


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


def mixture(log_ref: torch.Tensor, log_aligned: torch.Tensor, lam: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p_λ, p_λ, and log Z_λ = log Σ_v p_ref^(1-λ)·p_aligned^λ of each row; (rows, vocabulary) twice, (rows,)."""
    log_p = (1 - lam) * log_ref
    log_p.add_(log_aligned, alpha=lam)
    if lam < 0 or lam > 1:
        # A token that one of the two, or both, rule out stays ruled out.
        log_p.masked_fill_((log_ref <= LOWEST) | (log_aligned <= LOWEST), LOWEST)
    log_z = log_p.logsumexp(-1)
    log_p -= log_z[:, None]
    return log_p, log_p.exp(), log_z


@torch.no_grad()
def divergences(
    ref: Trace, aligned: Trace, approximations: Sequence[tuple[float, dict[str, Trace]]], tokens: torch.Tensor,
    vocab_size: int,
) -> dict[float, dict[str, np.ndarray]]:  # fmt: skip
    """Per-token figures for each λ and its approximations.

    Args:
        ref, aligned: what the two models make of the texts.
        approximations: λ, and name → trace: `kl`, whose figures these are, and others of which kl alone is wanted, under the
            name that it gets: `kl_nonlinearity`, the same unrounded, say.
        tokens: the texts' own scored tokens (tokens,).
        vocab_size: rows of the vocabulary that all have.

    Returns:
        λ → measure → float64 array (tokens,): `MEASURES`, `CHOSEN`, `log_z`, and kl of the others.
    """
    found: dict[float, dict[str, list[torch.Tensor]]] = {lam: {} for lam, _ in approximations}
    device = ref.hidden.device
    for chunk, parts in chunks(len(ref.hidden), vocab_size, device):
        sides = [side.head(side.hidden[chunk])[:, :vocab_size] for side in (ref, aligned)]
        others = [
            {name: trace.head(trace.hidden[chunk])[:, :vocab_size] for name, trace in traces.items()}
            for _, traces in approximations
        ]
        chosen = tokens[chunk].to(device)
        for part in parts:
            log_ref, log_aligned = (log_softmax(side[part]) for side in sides)
            own = chosen[part][:, None]
            here = {"logp_ref": log_ref.gather(1, own)[:, 0], "logp_aligned": log_aligned.gather(1, own)[:, 0]}
            for (lam, _), logits in zip(approximations, others, strict=True):
                row = here | _at(log_ref, log_aligned, lam, {name: each[part] for name, each in logits.items()}, own)
                for measure, values in row.items():
                    found[lam].setdefault(measure, []).append(values.cpu())
    return {lam: {m: torch.cat(values).numpy() for m, values in measures.items()} for lam, measures in found.items()}


def _at(
    log_ref: torch.Tensor, log_aligned: torch.Tensor, lam: float, approximations: dict[str, torch.Tensor], own: torch.Tensor
) -> dict[str, torch.Tensor]:
    dot = torch.linalg.vecdot
    log_p, p, log_z = mixture(log_ref, log_aligned, lam)
    entropy = dot(p, log_p)  # negative
    row = {
        "kl_ref": entropy - dot(p, log_ref), "kl_aligned": entropy - dot(p, log_aligned), "log_z": log_z,
        "logp": log_p.gather(1, own)[:, 0],
    }  # fmt: skip
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
    ref: Trace, aligned: Trace, ref_other: Trace, aligned_other: Trace, lams: Sequence[float], vocab_size: int
) -> dict[float, np.ndarray]:
    """KL(exact‖exact of the other two models) of each token, for each λ: λ → float64 array (tokens,)."""
    found: dict[float, list[torch.Tensor]] = {lam: [] for lam in lams}
    for chunk, parts in chunks(len(ref.hidden), vocab_size, ref.hidden.device):
        logits = [t.head(t.hidden[chunk])[:, :vocab_size] for t in (ref, aligned, ref_other, aligned_other)]
        for part in parts:
            log = [log_softmax(each[part]) for each in logits]
            for lam in lams:
                log_p, p, _ = mixture(log[0], log[1], lam)
                log_q, _, _ = mixture(log[2], log[3], lam)
                found[lam].append((torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)).cpu())
    return {lam: torch.cat(values).numpy() for lam, values in found.items()}


@torch.no_grad()
def densities(
    ref: Trace, aligned: Trace, tokens: torch.Tensor, lams: Sequence[float], vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact DeRa's log-probability of each token, and its kl from the reference there, at many λ.

    With log Z = log Σ p_ref^(1-λ)·p_aligned^λ, KL(p_λ‖p_ref) = λ·E_λ[log p_aligned - log p_ref] - log Z.

    Args:
        ref, aligned: what the two models make of the texts.
        tokens: the texts' own scored tokens (tokens,).

    Returns:
        Two float64 arrays (tokens, λ), in nats.
    """
    logp, kl = [], []
    for chunk, parts in chunks(len(ref.hidden), vocab_size, ref.hidden.device):
        sides = [side.head(side.hidden[chunk])[:, :vocab_size] for side in (ref, aligned)]
        chosen = tokens[chunk].to(ref.hidden.device)
        for part in parts:
            log_ref, log_aligned = (log_softmax(side[part]) for side in sides)
            ratio, own = log_aligned - log_ref, chosen[part][:, None]
            rows = []
            for lam in lams:
                log_p, p, log_z = mixture(log_ref, log_aligned, lam)
                kept = lam * torch.linalg.vecdot(p, ratio) - log_z if lam else torch.zeros_like(log_z)
                rows.append((log_p.gather(1, own)[:, 0], kept.clamp_(min=0)))
            logp.append(torch.stack([row[0] for row in rows], 1).cpu())
            kl.append(torch.stack([row[1] for row in rows], 1).cpu())
    return torch.cat(logp).numpy(), torch.cat(kl).numpy()


def summarise(
    per_token: dict[str, np.ndarray], prompt_of: np.ndarray, text_of: np.ndarray, resolution: float, seed: int
) -> dict[str, Any]:
    """The figures of one λ: means over all tokens, 95 % intervals over prompts, captured shift, the split of kl, quantiles.

    Args:
        per_token: measure → (tokens,).
        prompt_of, text_of: the prompt and the text of each token.
        resolution: nats below which kl is noise.
    """
    means = {measure: float(per_token[measure].mean()) for measure in MEASURES}
    bound = min(means["kl_ref"], means["kl_aligned"])
    smooth = float(per_token["kl_nonlinearity"].mean()) if "kl_nonlinearity" in per_token else means["kl"]
    figures: dict[str, Any] = {"tokens": len(prompt_of)}
    for measure in MEASURES:
        figures[measure] = means[measure]
        if measure in ("kl", "tv", "top1"):
            figures[f"{measure}_ci"] = bootstrap(per_token[measure], prompt_of, seed)
    figures["captured"] = 1 - means["kl"] / bound if bound > resolution else None
    figures["kl_rounding"] = means["kl"] - smooth
    figures["kl_nonlinearity"] = smooth
    quantiles = np.quantile(per_token["kl"], [0.5, 0.9, 0.99, 0.999])
    figures |= dict(zip(("kl_median", "kl_p90", "kl_p99", "kl_p999"), map(float, quantiles), strict=True))
    if "kl_line" in per_token:
        line = per_token["kl_line"]
        figures["line"] = {
            "kl": float(line.mean()), "kl_ci": bootstrap(line, prompt_of, seed),
            "difference_ci": bootstrap(per_token["kl"] - line, prompt_of, seed),
        }  # fmt: skip
    change = np.exp(per_token["logp_merged"]) - np.exp(per_token["logp"])
    figures["rms_dp"] = float(np.sqrt((change**2).mean()))
    figures["perplexity"] = {
        name: float(np.exp(-per_token[key].mean()))
        for name, key in zip(("exact", "merged", "ref", "aligned"), CHOSEN, strict=True)
    }
    figures["sequence"] = _sequences(per_token, prompt_of, text_of, seed)
    return finite(figures)


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know, at any depth."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sequences(per_token: dict[str, np.ndarray], prompt_of: np.ndarray, text_of: np.ndarray, seed: int) -> dict[str, Any]:
    """What the tokens of a text add up to.

    `kl`: nats per text. `log_normaliser`: mean of Σ_t log Z_t, and per token; exact DeRa is the sequence-level mixture where
    it is constant. `ess_share`: effective sample size of the weights Π_t Z_t that would turn texts of exact DeRa into
    texts of the sequence-level mixture, as a share of their number; within prompts where each has several texts, else
    over all texts, which is a lower bound since prompts differ too.
    """
    _, index = np.unique(text_of, return_inverse=True)
    sums = {key: np.bincount(index, per_token[key]) for key in ("kl", "log_z")}
    prompts = np.zeros(len(sums["kl"]), dtype=int)
    prompts[index] = prompt_of
    several = np.unique(prompts, return_counts=True)[1].max() > 1

    def share(log_weights: np.ndarray) -> float:
        weights = np.exp(log_weights - log_weights.max())
        return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))

    groups = [prompts == prompt for prompt in np.unique(prompts)] if several else [np.ones(len(prompts), dtype=bool)]
    shares = [share(sums["log_z"][group]) for group in groups if group.sum() > 1]
    figures = {
        "texts": len(sums["kl"]), "kl": float(sums["kl"].mean()), "kl_ci": bootstrap(sums["kl"], prompts, seed),
        "log_normaliser": float(sums["log_z"].mean()), "log_normaliser_per_token": float(per_token["log_z"].mean()),
        "ess_share": float(np.mean(shares)) if shares else None, "ess_within_prompts": bool(several),
    }  # fmt: skip
    return figures


def bootstrap(values: np.ndarray, prompt_of: np.ndarray, seed: int = 0, samples: int = 2000) -> list[float] | None:
    """95 % interval of the pooled mean, resampling prompts with all their tokens; None with fewer than two prompts."""
    _, index = np.unique(prompt_of, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    if len(sums) < 2 or not np.isfinite(sums).all():
        return None
    draws = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]
