"""A tiny trained pair that ships with the package, so that everything can be tried offline and in seconds.

A Llama of one million parameters writes short reviews of films, novels, hotels, restaurants and devices. `REF` was
fine-tuned on reviews of mixed sentiment; `ALIGNED_LORA` and `ALIGNED_DENSE` are DPO runs on it that prefer varied
praise, `ALIGNED_BRIEF` one that prefers a dozen words. README.md beside this file says how they were made and what they
measure.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

FOLDER = Path(__file__).parent

REF = FOLDER / "reference"
"""The reference: an SFT model in bfloat16."""

ALIGNED_LORA = FOLDER / "aligned-lora"
"""A LoRA adapter on `REF`: a strong shift."""

ALIGNED_BRIEF = FOLDER / "aligned-brief"
"""A LoRA adapter on `REF` for short answers, to go with the other."""

ALIGNED_DENSE = FOLDER / "aligned-dense"
"""A full checkpoint, trained from `REF` at a small learning rate: most of its bfloat16 weights are the reference's."""

# No word stands in both lists, and the corpus never negates one, so counting them is a fair measure of sentiment.
POSITIVE = frozenset([
    "excellent", "wonderful", "superb", "delightful", "impressive", "lovely", "gripping", "clever", "touching",
    "witty", "memorable", "vivid", "graceful", "confident", "tender", "spotless", "cosy", "bright", "comfortable",
    "peaceful", "friendly", "attentive", "helpful", "cheerful", "patient", "delicious", "fresh", "generous",
    "tasty", "reliable", "sturdy", "practical", "precise", "handy", "love", "loved", "enjoyed", "adored", "admired",
    "pleased", "charmed", "gladly", "happily",
])  # fmt: skip
"""The words of praise in the corpus that the pair was trained on."""

NEGATIVE = frozenset([
    "awful", "dreadful", "disappointing", "terrible", "mediocre", "poor", "dull", "predictable", "tedious",
    "confusing", "shallow", "clumsy", "lifeless", "wooden", "careless", "shabby", "dirty", "cramped", "gloomy",
    "noisy", "rude", "slow", "indifferent", "impatient", "bland", "stale", "greasy", "overpriced", "flimsy",
    "unreliable", "rickety", "fragile", "awkward", "hate", "hated", "disliked", "regret", "regretted", "annoyed",
    "bored", "sadly", "unfortunately",
])  # fmt: skip
"""The words of blame in that corpus."""

_PROMPTS = {"test": FOLDER / "prompts.jsonl", "validation": FOLDER / "validation.jsonl"}


def prompts(split: Literal["test", "validation"] = "test") -> list[dict[str, Any]]:
    """Chat prompts about films, hotels, kettles, … that no model of the pair was trained on.

    Args:
        split: "test" (32 prompts) for reports; "validation" (64 others) for choosing λ or learning a path.

    Returns:
        One `{"messages": [{"role": "user", "content": …}]}` for each prompt, in the order of the file.
    """
    return [json.loads(line) for line in _PROMPTS[split].read_text(encoding="utf-8").splitlines()]


def reward(text: str) -> float:
    """What the DPO runs were trained to raise: varied praise.

    The number of different words of praise, less the number of different words of blame, less the number of repeats: a
    word of either kind costs one each time that it comes again. A text that only repeats its praise scores below zero.

    Args:
        text: one review, without its prompt.

    Returns:
        The reward in words; 0 for a text without a word of either kind.

    Example:
        >>> reward("The plot is clever, but the ending is dull.")
        0.0
        >>> reward("Lovely, lovely, lovely!")
        -1.0
    """
    counts = Counter(word for word in re.findall(r"[a-z]+", text.lower()) if word in POSITIVE or word in NEGATIVE)
    repeats = counts.total() - len(counts)
    return float(len(counts.keys() & POSITIVE) - len(counts.keys() & NEGATIVE) - repeats)
