"""What all models make of an answer, from one reading of it: of each token, and over the whole range of λ.

    kl(λ) ≈ ½·Var_{p_λ}[g·λ(1-λ)/μ(1-μ)],    g = log q_μ - log p_μ

is how far the merge is from exact DeRa at every λ, from the gap g of the one merged model μ that read the text: to
leading order the gap grows with λ(1-λ) (docs/theory.md). It is scaled so that it is what was measured at μ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..decoding import caches
from ..errors import DeraError
from ..lambdas import Lam, numbers
from ..measuring.divergence import chunks, densities, divergences
from ..measuring.normaliser import log_softmax, mixture
from ..measuring.traces import Text, Trace, logits_of, padded
from ..statistics.prediction import scale
from ..statistics.summary import aligned_name
from .answers import SIDES, Asked, Side
from .both import Both

LIKELIEST = 10
PROBE = 0.5  # λ of the merged model that reads the text for the curve, where the session's own says too little
LEAST_SCALE = scale(0.1)  # below, kl at λ is too small to say what it is elsewhere


def logits_at(model: Any, ids: torch.Tensor, mask: torch.Tensor, kept: int, **at: Any) -> torch.Tensor:
    """A model's logits at the last `kept` places of padded texts, (texts, kept, vocabulary), as it makes them."""
    if "logits_to_keep" in caches.arguments_of(model):
        at["logits_to_keep"] = kept
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **at).logits[:, -kept:]


@dataclass(frozen=True)
class Read:
    """One answer, as all models read it.

    Attributes:
        tokens: its tokens.
        sides: logits of the reference and each aligned model; a trace whose states are logits.
        merged: those of the merged model at λ.
        probe: λ, and logits, of the merged model that the curve is made from; None where there is no curve.
    """

    tokens: list[int]
    sides: list[Trace]
    merged: Trace
    probe: tuple[Lam, Trace] | None = None


@torch.no_grad()
def read(both: Both, prompt: list[int], answers: dict[Side, list[int]], lam: Lam) -> dict[Side, Read]:
    """Read both answers: a pass of each side and of the merged model, over both texts at once.

    Args:
        both: the models.
        prompt: its tokens.
        answers: the tokens of each, none of them empty.
        lam: λ.

    Returns:
        The exact answer first; the same object twice where the answers are the same.

    Raises:
        DeraError: logits are not finite.
    """
    different = [list(tokens) for tokens in dict.fromkeys(tuple(answers[side]) for side in SIDES)]
    texts = [Text(0, prompt + tokens, len(prompt)) for tokens in different]
    ids, mask = padded(texts, both.exact.device)
    kept = ids.shape[1] - len(prompt) + 1
    known_rows = getattr(both.exact.ref, "dera_known_rows", None)

    def traces(model: Any, count: int = len(texts), **at: Any) -> list[Trace]:
        logits = logits_at(model, ids[:count], mask[:count], kept, **at)
        if not logits[:, 0].isfinite().any():
            raise DeraError("a model gives no finite logits here; take a λ nearer to 0")
        own = zip(logits, texts[:count], strict=True)
        return [Trace(rows[: len(text.completion)], torch.Tensor.float, known_rows) for rows, text in own]

    sides = list(zip(*(traces(model) for model in both.exact.sides), strict=True))
    with both.merged(lam) as (model, at):
        merged = traces(model, **at)
    probe = None
    if len(numbers(lam)) == 1:
        probe = (lam, merged[0])
        if scale(*numbers(lam)) < LEAST_SCALE:
            with both.merged(PROBE) as (model, at):
                probe = (PROBE, traces(model, 1, **at)[0])
    reads = [Read(text.completion, list(sides[n]), merged[n], None if n else probe) for n, text in enumerate(texts)]
    return dict(zip(SIDES, [reads[0], reads[-1]], strict=True))


def by_token(of: Read, both: Both, lam: Lam) -> list[dict[str, Any]]:
    """The figures of each token of an answer.

    Returns:
        For each token `token` (its id), `text`, `kl` of the merged from the exact distribution there, in nats,
        `log_ratio` log π_k - log π_ref of the token for each aligned model, `p` and `likeliest`: of each model of
        `names`, the token's probability, and the ten likeliest tokens with theirs.
    """
    size = both.pair.vocab_size
    figures = divergences(of.sides, [(lam, {"kl": of.merged})], torch.tensor(of.tokens), size)[lam]
    models = both.pair.models
    keys = ["logp_ref", *(aligned_name("logp", k) for k in range(1, models + 1)), "logp", "logp_merged"]
    p = np.exp([figures[key] for key in keys])
    tops = likeliest(of, both, lam)
    named = names(models)
    pieces = pieces_of(of.tokens, both.pair.tokenizer)
    return [
        {
            "token": token, "text": pieces[n], "kl": max(0.0, float(figures["kl"][n])),
            "log_ratio": [float(figures[key][n] - figures["logp_ref"][n]) for key in keys[1 : models + 1]],
            "p": {name: float(p[k, n]) for k, name in enumerate(named)},
            "likeliest": dict(zip(named, tops[n], strict=True)),
        }
        for n, token in enumerate(of.tokens)
    ]  # fmt: skip


def names(models: int) -> list[str]:
    """What the models are called: reference, aligned (or aligned 1, aligned 2, …), exact, merged."""
    aligned = ["aligned"] if models == 1 else [f"aligned {k}" for k in range(1, models + 1)]
    return ["reference", *aligned, *SIDES]


def likeliest(of: Read, both: Both, lam: Lam) -> list[list[list[list[Any]]]]:
    """For each token, for each of `names`: the likeliest tokens there, each its text and its probability."""
    size, tokenizer = both.pair.vocab_size, both.pair.tokenizer
    tops = []
    for chunk, parts in chunks(len(of.tokens), size, of.merged.hidden.device):
        logits = [*logits_of(of.sides, chunk, size), *logits_of([of.merged], chunk, size)]
        for part in parts:
            *log_sides, log_merged = (log_softmax(side[part]) for side in logits)
            log_p, _, _ = mixture(log_sides[0], log_sides[1:], lam)
            models = torch.stack([*log_sides, log_p, log_merged], 1)  # (tokens, models, vocabulary)
            top = models.topk(min(LIKELIEST, size))
            for ids, p in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True):
                pairs = [zip(*model, strict=True) for model in zip(ids, p, strict=True)]
                tops.append([[[tokenizer.decode([i]), share] for i, share in model] for model in pairs])
    return tops


def curve(of: Read, both: Both, lams: Sequence[Lam]) -> list[dict[str, Any]]:
    """Over λ, the mean over the answer's tokens, in nats, of how far exact DeRa is from the reference and the merge.

    Args:
        of: the exact answer.
        both: the models.
        lams: where.

    Returns:
        For each λ `lambda`, `kl_ref` and, with one aligned model, `kl`, predicted as the module says.
    """
    tokens, size = torch.tensor(of.tokens), both.pair.vocab_size
    _, kl_ref = densities(of.sides, tokens, lams, size)
    rows = [{"lambda": lam, "kl_ref": float(value)} for lam, value in zip(lams, kl_ref.mean(0), strict=True)]
    if of.probe is None:
        return rows
    at, merged = of.probe
    measured = float(divergences(of.sides, [(at, {"kl": merged})], tokens, size)[at]["kl"].mean())
    variances = _variances(of.sides, merged, at, [at, *lams], size)
    ratio = measured / variances[0] if variances[0] > 0 else 0.0
    for row, variance in zip(rows, variances[1:], strict=True):
        row["kl"] = float(ratio * variance * scale(row["lambda"]) / scale(at))
    return rows


def _variances(sides: list[Trace], merged: Trace, at: Lam, lams: Sequence[Lam], size: int) -> np.ndarray:
    """½·Var_{p_λ}[log q_μ - log p_μ], the mean over tokens, of each λ; μ is `at`."""
    sums = np.zeros(len(lams))
    for chunk, parts in chunks(len(merged.hidden), size, merged.hidden.device):
        logits = [*logits_of(sides, chunk, size), *logits_of([merged], chunk, size)]
        for part in parts:
            *log_sides, log_q = (log_softmax(side[part]) for side in logits)
            log_p, _, _ = mixture(log_sides[0], log_sides[1:], at)
            gap = log_q - log_p
            for number, lam in enumerate(lams):
                _, p, _ = mixture(log_sides[0], log_sides[1:], lam)
                mean = torch.linalg.vecdot(p, gap)
                sums[number] += float((torch.linalg.vecdot(p, gap.square()) - mean.square()).clamp(min=0).sum()) / 2
    return sums / len(merged.hidden)


def pieces_of(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token, special ones included; a character that several tokens make belongs to the last."""
    pieces, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and count < len(tokens):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces


def seen(both: Both, asked: Asked, answers: dict[Side, list[int]], reads: dict[Side, Read]) -> dict[str, Any]:
    """All that a session sees of its answers, as JSON holds it. `curves`, one for each aligned model, come later."""
    tokenizer, ends = both.pair.tokenizer, both.exact.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    tokens = {side: by_token(reads[side], both, asked.lam) for side in SIDES}
    places = enumerate(zip(answers["exact"], answers["merged"], strict=False))
    return {
        "prompt": asked.prompt, "chat": asked.chat, "lambda": asked.lam, "seed": asked.seed,
        "max_new_tokens": asked.max_new_tokens,
        "part_at": next((place for place, (one, other) in places if one != other), None),
        "answers": {
            side: {
                "text": tokenizer.decode(answers[side], skip_special_tokens=True),
                "ended": answers[side][-1] in ends,
                "kl": float(np.mean([token["kl"] for token in tokens[side]])),
                "tokens": tokens[side],
            }
            for side in SIDES
        },
        "curves": [],
    }  # fmt: skip
