"""Where in the texts a merge's error lies: by position, by kind of token, by prompt, and token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import warn
from ..lambdas import Lam
from ..statistics.intervals import bootstrap
from ..texts.exchanges import Exchange
from ..texts.prompts import Prompt
from ..texts.rewards import Reward
from .traces import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POSITIONS = 64  # bins of the curve over positions, at most
WORST = 12  # tokens that are listed with their context
SHOWN = 3  # texts that are kept whole, with the kl of each token


def for_each_token(values: Iterable[int], texts: Sequence[Text]) -> np.ndarray:
    """A number for each text, repeated for each of its tokens."""
    return np.repeat(np.array(list(values)), [len(text.completion) for text in texts])


def token_class(text: str, special: bool) -> str:
    """What kind of token a decoded token is."""
    if special:
        return "special"
    if not text.strip():
        return "white space"
    stripped = text.strip()
    if stripped.isdigit():
        return "number"
    if not any(c.isalnum() for c in stripped):
        return "punctuation"
    return "beginning of a word" if text[0].isspace() else "inside a word, or first"


def where_it_lies(
    per_token: dict[str, np.ndarray], texts: list[Text], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """kl by position, by class of token and by prompt, and the worst tokens with what came before them."""
    kl = per_token["kl"]
    place = np.concatenate([np.arange(len(text.completion)) for text in texts])
    bins = min(POSITIONS, int(place.max()) + 1)
    edges = np.linspace(0, place.max() + 1, bins + 1).astype(int)
    positions = []
    for low, high in itertools.pairwise(edges):
        inside = (place >= low) & (place < high)
        if inside.any():
            positions.append({"from": int(low), "tokens": int(inside.sum()), "kl": float(kl[inside].mean())})
    tokens = [token for text in texts for token in text.completion]
    special = set(tokenizer.all_special_ids)
    names = {token: token_class(tokenizer.decode([token]), token in special) for token in set(tokens)}
    kinds = np.array([names[token] for token in tokens])
    classes = [
        {"class": str(kind), "tokens": int((kinds == kind).sum()), "kl": float(kl[kinds == kind].mean()),
         "share": float(kl[kinds == kind].sum() / max(kl.sum(), 1e-300))}
        for kind in np.unique(kinds)
    ]  # fmt: skip
    text_of = for_each_token(range(len(texts)), texts)
    worst = []
    for index in np.argsort(-kl)[:WORST]:
        text, at = texts[text_of[index]], int(place[index])
        before = text.ids[max(0, text.start + at - 24) : text.start + at]
        worst.append({
            "token": tokenizer.decode([tokens[index]]), "before": tokenizer.decode(before), "position": at,
            "prompt": text.prompt, "kl": float(kl[index]), "p_exact": math.exp(per_token["logp"][index]),
            "p_merged": math.exp(per_token["logp_merged"][index]),
        })  # fmt: skip
    prompt_of = for_each_token([text.prompt for text in texts], texts)
    by_prompt = [
        {"prompt": int(p), "tokens": int((prompt_of == p).sum()), "kl": float(kl[prompt_of == p].mean())}
        for p in np.unique(prompt_of)
    ]
    classes.sort(key=lambda row: -row["share"])
    return {"per_position": positions, "per_class": classes, "per_prompt": by_prompt, "worst": worst}


def coupled_figures(
    exact: list[Text], merged: list[Text], tokenizer: PreTrainedTokenizerBase, asked: list[Prompt],
    reward: Reward | None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Texts of both models under the same noise: how many are the same, and where the others part.

    With the noise shared, two texts part only where the distributions differ.
    """
    first = []
    for exact_text, merged_text in zip(exact, merged, strict=True):
        pairs = itertools.zip_longest(exact_text.completion, merged_text.completion)
        first.append(next((place for place, (a, b) in enumerate(pairs) if a != b), None))
    parted = [place for place in first if place is not None]
    prompts = np.array([text.prompt for text in exact])
    same = np.array([place is None for place in first], dtype=float)
    figures: dict[str, Any] = {
        "texts": len(exact), "identical": float(same.mean()), "identical_ci": bootstrap(same, prompts, seed),
        "first_difference": float(np.median(parted)) if parted else None,
        "mean_length": {"exact": float(np.mean([len(t.completion) for t in exact])),
                        "merged": float(np.mean([len(t.completion) for t in merged]))},
    }  # fmt: skip
    if reward is not None:
        earned = [np.array(reward.score(_answers(side, asked, tokenizer)), dtype=float) for side in (exact, merged)]
        both = np.isfinite(earned[0]) & np.isfinite(earned[1])  # a reward that fails on a text has none there
        figures["reward_failed"] = int((~both).sum())
        if not both.any():
            why = reward.why_not(_answers(exact[:1], asked, tokenizer)[0])
            warn(f"the reward {reward.name} fails on every text: {why}")
            return figures | {"reward": None, "reward_difference": None, "reward_difference_ci": None}
        one, other, prompts = earned[0][both], earned[1][both], prompts[both]
        figures |= {
            "reward": {"exact": float(one.mean()), "merged": float(other.mean())},
            "reward_difference": float((other - one).mean()),
            "reward_difference_ci": bootstrap(other - one, prompts, seed),
        }
    return figures


def _answers(
    texts: Sequence[Text], asked: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> list[Exchange]:
    """Texts as rewards see them."""
    return [
        Exchange(asked[t.prompt].asked, tokenizer.decode(t.completion, skip_special_tokens=True),
                 asked[t.prompt].columns, t.completion)
        for t in texts
    ]  # fmt: skip


def shown_texts(
    whose: str, lams: Sequence[Lam], texts_at: dict[Lam, list[Text]], per_token: dict[Lam, dict[str, np.ndarray]],
    merged: dict[Lam, tuple[list[Text], dict[str, np.ndarray]]], tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
) -> list[dict[str, Any]]:  # fmt: skip
    """A few texts of each λ with the kl of each token: scored ones, and the merged model's where there are any.

    Args:
        whose: what the scored texts are called.
        texts_at, per_token: λ → its scored texts, and their figures.
        merged: λ → texts of the merged model, and their figures.
    """

    def pieces(texts: list[Text], kl: np.ndarray, index: int) -> list[list[Any]]:
        start = sum(len(text.completion) for text in texts[:index])
        return [[tokenizer.decode([token]), float(kl[start + n])] for n, token in enumerate(texts[index].completion)]

    shown = []
    for lam in lams:
        texts = texts_at[lam]
        for index in range(min(SHOWN, len(texts))):
            entry = {"lambda": lam, "prompt": prompts[texts[index].prompt].text, "of": whose,
                     "scored": pieces(texts, per_token[lam]["kl"], index)}  # fmt: skip
            if lam in merged:
                entry["merged"] = pieces(merged[lam][0], merged[lam][1]["kl"], index)
            shown.append(entry)
    return shown
