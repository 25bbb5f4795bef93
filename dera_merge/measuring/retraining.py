"""Does decoding at λ stand for retraining with the KL coefficient β/λ?

KL-regularised alignment maximises E_π[r] - β·KL(π‖π_ref); its optimum is π_β ∝ π_ref·exp(r/β) (Liu et al., ICML 2024,
§3). The mixture π_ref^(1-λ)·π_β^λ of whole answers is then the optimum at β/λ. Exact DeRa mixes token by token, which
is another distribution where the mixture's normaliser depends on the answer so far, and training does not reach the
optimum. `agreement` measures what is left of the claim: models that were retrained, beside what one of them gives at λ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import DeraError
from ..lambdas import Lam, numbers
from ..merging.path import Course
from ..models.pair import Pair
from ..progress import Progress
from ..statistics.intervals import bootstrap
from ..texts.prompts import Prompt, encode
from ..texts.samplers import Sampler
from .divergence import between_mixtures, densities, divergences
from .laboratory import Compute, Laboratory
from .traces import Text, Trace, per_text, tokens_of, trace_of


def optimum(log_ref: torch.Tensor, reward: torch.Tensor, beta: float) -> torch.Tensor:
    """log π_β of every answer: log π_ref + r/β, normalised.

    Args:
        log_ref: log-probabilities under the reference, over all axes together, nats.
        reward: of each answer; the same shape.
        beta: the KL coefficient, reward per nat.
    """
    log_p = log_ref + reward / beta
    return log_p - log_p.logsumexp(tuple(range(log_p.ndim)))


def per_token(log_ref: torch.Tensor, log_aligned: Sequence[torch.Tensor], lam: Lam) -> torch.Tensor:
    """Exact DeRa of distributions over answers of T tokens: each next token comes from the mixture of all.

    Args:
        log_ref: log-probabilities of every answer, shape (V,)·T, nats.
        log_aligned: the same of each aligned model.
        lam: λ; of several aligned models, a vector.

    Returns:
        Log-probabilities under the mixture, the same shape; the probabilities of all answers sum to 1.
    """
    total = torch.zeros_like(log_ref)
    for step in range(log_ref.ndim):
        mixed = (1 - sum(numbers(lam))) * _next(log_ref, step)
        mixed = mixed + sum(share * _next(log_p, step) for share, log_p in zip(numbers(lam), log_aligned, strict=True))
        mixed = mixed - mixed.logsumexp(-1, keepdim=True)
        total = total + mixed.reshape(*mixed.shape, *[1] * (log_ref.ndim - step - 1))
    return total


def _next(log_p: torch.Tensor, step: int) -> torch.Tensor:
    """log p(token `step` | those before), shape (V,)·(step+1)."""
    rest = tuple(range(step + 1, log_p.ndim))
    prefix = log_p.logsumexp(rest) if rest else log_p
    return prefix - prefix.logsumexp(-1, keepdim=True)


class _Study(Laboratory):
    """The models of one study, what each writes to the same prompts, and the figures of its texts."""

    def __init__(
        self, pair: Pair, compute: Compute, path: Course | None, seed: int, tell: Progress | None,
        prompts: list[Prompt], reward: Callable[[str], float], samples: int, max_new_tokens: int,
    ) -> None:  # fmt: skip
        super().__init__(pair, compute, path, seed, tell)
        self.prompts, self.reward, self.samples, self.max_new_tokens = prompts, reward, samples, max_new_tokens

    def texts(self, sampler: Sampler, lam: Lam) -> list[Text]:
        """Texts at temperature 1; the noise belongs to (seed, prompt, sample), so all models have the same."""
        count = len(self.prompts)
        asked = [prompt for _ in range(self.samples) for prompt in self.prompts]
        new = sampler.sample(asked, [lam] * len(asked), range(len(asked)), max_new_tokens=self.max_new_tokens)
        return [Text.of(i % count, prompt, row) for i, (prompt, row) in enumerate(zip(asked, new, strict=True))]

    def writes(self, model: PreTrainedModel) -> Sampler:
        """A sampler of any model."""
        return self.sampler(lambda _: model)

    def figures(self, texts: list[Text], kl_ref: np.ndarray) -> dict[str, Any]:
        """Reward, length and KL to the reference (nats a text) of texts; means and intervals over prompts."""
        prompt_of = np.array([text.prompt for text in texts])
        decoded = [self.pair.tokenizer.decode(text.completion, skip_special_tokens=True) for text in texts]
        values = {
            "reward": np.array([self.reward(text) for text in decoded]),
            "length": np.array([float(len(text.completion)) for text in texts]),
            "kl": per_text(kl_ref, texts),
        }
        summary: dict[str, Any] = {
            "texts": decoded[:4],
            "rewards": values["reward"].tolist(),
            "prompts": prompt_of.tolist(),
        }
        for name, measured in values.items():
            summary |= {name: float(measured.mean()), f"{name}_ci": bootstrap(measured, prompt_of, self.seed)}
        return summary


def agreement(
    pair: Pair,
    retrained: dict[float, PreTrainedModel],
    prompts: Sequence[str | dict[str, Any]],
    reward: Callable[[str], float],
    *,
    second: PreTrainedModel | None = None,
    path: Course | None = None,
    samples: int = 2,
    max_new_tokens: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Models retrained at β₀/λ beside what one pair, trained at β₀, gives at λ.

    Args:
        pair: the reference, and the model that was trained at β₀.
        retrained: λ → the model that was trained at β₀/λ, on the pair's tokens.
        prompts: ones that no model was trained on.
        reward: of an answer.
        second: another training at β₀: the scale of every distance.
        path: a path that `calibrate` learned, for a third kind of answer.
        samples: answers to each prompt of each model, with the same noise.
        max_new_tokens: their length, in tokens.
        seed: of sampling and bootstrap.
        device: where the models run, in float32.
        progress: called as work goes on.

    Returns:
        For each λ `kinds`: name → reward, length (tokens), kl (nats a text, from the reference, each on its own texts),
        with 95 % intervals over prompts; and `from_retrained`: KL(retrained‖it) in nats per token on the retrained
        model's texts, with interval. Names: retrained, exact, merged, calibrated (with `path`), second (at λ=1, with
        `second`). `from_retrained` has the reference and the model at β₀ too, as `ref` and `aligned`.

    Raises:
        DeraError: no λ, or the pair cannot be merged.
    """
    if not retrained:
        raise DeraError("no retrained model is given to compare with")
    pair.only_pair("retraining is compared")
    encoded = encode(prompts, pair.tokenizer)
    lab = _Study(pair, Compute(device), path, seed, progress, encoded, reward, samples, max_new_tokens)
    exact, vocab = lab.exact, pair.vocab_size

    rows = []
    for number, (lam, model) in enumerate(sorted(retrained.items())):
        lab.tell("comparing with retrained models", number, len(retrained))
        model = model.to(device)
        texts = lab.texts(lab.writes(model), lam)
        retrained_trace = trace_of(model, texts)
        sides = [trace_of(side, texts) for side in (exact.ref, exact.aligned)]
        distances = {
            "exact": between_mixtures([retrained_trace, retrained_trace], sides, [lam], vocab)[lam],
            "ref": _kl(retrained_trace, sides[0], texts, vocab),
            "aligned": _kl(retrained_trace, sides[1], texts, vocab),
        }  # fmt: skip
        kinds = {"retrained": lab.figures(texts, distances["ref"])}
        exact_texts = lab.texts(lab.exact_sampler, lam)
        exact_traces = [trace_of(side, exact_texts) for side in (exact.ref, exact.aligned)]
        _, exact_kl = densities(exact_traces, tokens_of(exact_texts), [lam], vocab)
        kinds["exact"] = lab.figures(exact_texts, exact_kl[:, 0])
        # One model becomes each of the merged ones in turn, so each is asked for when it is needed.
        candidates: dict[str, Callable[[], PreTrainedModel]] = {"merged": lambda lam=lam: lab.merged(lam, path=None)}
        if path is not None:
            candidates["calibrated"] = lambda lam=lam: lab.merged(lam)
        if second is not None and lam == 1:
            candidates["second"] = lambda: second.to(device)
        for name, candidate_of in candidates.items():
            candidate = candidate_of()
            answers = lab.texts(lab.writes(candidate), lam)
            candidate_trace, ref_trace = trace_of(candidate, answers), trace_of(exact.ref, answers)
            kinds[name] = lab.figures(answers, _kl(candidate_trace, ref_trace, answers, vocab))
            distances[name] = _kl(retrained_trace, trace_of(candidate, texts), texts, vocab)
        prompt_of = np.repeat([text.prompt for text in texts], [len(text.completion) for text in texts])
        apart = {
            name: {"kl": float(kl.mean()), "kl_ci": bootstrap(kl, prompt_of, seed)} for name, kl in distances.items()
        }
        rows.append({"lambda": lam, "kinds": kinds, "from_retrained": apart})
    lab.tell("comparing with retrained models", len(retrained), len(retrained))
    return rows


def _kl(p: Trace, q: Trace, texts: list[Text], vocab_size: int) -> np.ndarray:
    """KL(p‖q) at each scored token, nats."""
    return divergences([p, p], [(0.0, {"kl": q})], tokens_of(texts), vocab_size)[0.0]["kl"]


def regret(
    best: dict[str, Any], trusted: dict[str, Any], seed: int = 0, draws: int = 2000
) -> tuple[float, list[float]]:
    """Reward of one model less that of another on the same prompts, with a 95 % interval over prompts.

    Args:
        best, trusted: entries of `kinds`, of a row of `agreement`.
    """
    prompts = np.unique(best["prompts"])
    means = [
        np.array([np.mean(np.array(figures["rewards"])[np.array(figures["prompts"]) == prompt]) for prompt in prompts])
        for figures in (best, trusted)
    ]
    apart = means[0] - means[1]
    picks = np.random.default_rng(seed).integers(len(apart), size=(draws, len(apart)))
    return float(apart.mean()), np.quantile(apart[picks].mean(1), [0.025, 0.975]).tolist()
