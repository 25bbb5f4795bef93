"""The figures of one λ, made of its per-token figures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..lambdas import Vector
from .intervals import bootstrap, finite

MEASURES = ("kl", "reverse_kl", "js", "tv", "top1", "kl_ref", "kl_aligned")
CHOSEN = ("logp", "logp_merged", "logp_ref", "logp_aligned")  # log-probabilities of the text's own tokens


def aligned_name(what: str, number: int) -> str:
    """What a figure of the number-th aligned model is called: `kl_aligned`, `kl_aligned_2`, …"""
    return f"{what}_aligned" if number == 1 else f"{what}_aligned_{number}"


def covariance_name(one: int, other: int) -> str:
    """What the covariance of two aligned models' log-ratios is called: `cov_1_2` for models 0 and 1."""
    return f"cov_{min(one, other) + 1}_{max(one, other) + 1}"


def gram_of(per_token: dict[str, np.ndarray], models: int) -> np.ndarray:
    """The mean of `covariances` over tokens, (models, models), from the figures of `divergences`."""
    return np.array([[per_token[covariance_name(k, m)].mean() for m in range(models)] for k in range(models)])


def log_ratio(matrix: np.ndarray, lam: Vector) -> dict[str, Any]:
    """How large the mixed log-ratio Σ λ_k·r_k is beside its parts r_k, and the λ that gives it their mean size.

    Averaging log-ratios that differ shrinks them. The geometric scale sqrt(Σ|λ_k|·G_kk / λᵀGλ) undoes that; for shares
    that add up to 1 the scaled mixture is as large as the parts are in the mean (of squares).

    Args:
        matrix: G, from `gram` or `gram_of`, (models, models).
        lam: λ of each model.

    Returns:
        `sizes` of the parts and `mixed`, that of the mixture, in nats; `scale`; `restored`: scale·λ. The last two are
        None where nothing is mixed.
    """
    shares = np.array(lam)
    parts, mixed = float(np.abs(shares) @ matrix.diagonal()), float(shares @ matrix @ shares)
    scale = math.sqrt(parts / mixed) if mixed > 0 else None
    restored = None if scale is None else [float(f"{scale * value:.4g}") for value in lam]
    sizes = np.sqrt(matrix.diagonal().clip(min=0)).tolist()
    return {"sizes": sizes, "mixed": math.sqrt(max(mixed, 0.0)), "scale": scale, "restored": restored}


def summarise(
    per_token: dict[str, np.ndarray], prompt_of: np.ndarray, text_of: np.ndarray, resolution: float, seed: int
) -> dict[str, Any]:
    """The figures of one λ: means, 95 % intervals over prompts, captured shift, the split of kl, quantiles.

    Args:
        per_token: measure → (tokens,).
        prompt_of, text_of: the prompt and the text of each token.
        resolution: nats below which kl is noise.
        seed: of the bootstrap.
    """
    means = {measure: float(per_token[measure].mean()) for measure in MEASURES}
    aligned_kls = [float(values.mean()) for key, values in per_token.items() if key.startswith("kl_aligned")]
    means["kl_aligned"] = min(aligned_kls)  # of several, the nearest
    bound = min(means["kl_ref"], means["kl_aligned"])
    smooth = float(per_token["kl_nonlinearity"].mean()) if "kl_nonlinearity" in per_token else means["kl"]
    figures: dict[str, Any] = {"tokens": len(prompt_of)}
    for measure in MEASURES:
        figures[measure] = means[measure]
        if measure in ("kl", "tv", "top1"):
            figures[f"{measure}_ci"] = bootstrap(per_token[measure], prompt_of, seed)
    if len(aligned_kls) > 1:
        figures["kl_each_aligned"] = aligned_kls
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


def _sequences(
    per_token: dict[str, np.ndarray], prompt_of: np.ndarray, text_of: np.ndarray, seed: int
) -> dict[str, Any]:
    """What the tokens of a text add up to.

    `kl`: nats per text. `log_normaliser`: mean of Σ_t log Z_t, and per token; exact DeRa is the sequence-level mixture
    where it is constant. `ess_share`: effective sample size of the weights Π_t Z_t that would turn texts of exact DeRa
    into texts of the sequence-level mixture, as a share of their number; within prompts where each has several texts,
    else over all texts, which is a lower bound since prompts differ too.
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
