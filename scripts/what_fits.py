#!/usr/bin/env python3
"""What fits where: memory of each command, computed from the shapes of models, not measured. Prints Markdown.

    python scripts/what_fits.py [--texts 32] [--tokens 192]

Counted: weights; float32 heads of both sides and of the merges that are held; keys, values and logits of the texts that
are sampled together; their last hidden states; 1 GB for activations and the libraries. A LoRA leaves heads alone here.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from dera_merge.calibrating.layers import AXES
from dera_merge.calibrating.lessons import MEASURED_TOKENS
from dera_merge.calibrating.training import LOOKED_AT, step_tokens
from dera_merge.calibrating.ways import FEWEST, HELD_OUT, Size

GB = 1e9
CARDS = {"24 GB": 24, "48 GB": 48, "80 GB": 80}
OTHER = 1 * GB  # activations of a batch without gradients, and the libraries' own
HEADS = 1 << 30  # see measuring/steps.py
WAYS = {"": (), ", checkpointed": (True,), ", base in 4 bits": (True, "4bit")}  # arguments of `Size.takes`


@dataclass(frozen=True)
class Shape:
    """A decoder with gated linear units: all sizes in numbers, `kv` the width of keys."""

    hidden: int
    inner: int
    layers: int
    kv: int
    vocabulary: int
    tied: bool = False

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        return 2 * self.hidden**2 + 2 * self.hidden * self.kv + 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        return self.layers * self.layer + self.head * (1 if self.tied else 2)

    def sampling(self, models: int, texts: int, tokens: int, width: int) -> float:
        """Bytes of caches and logits while texts are sampled."""
        return models * texts * (tokens * 2 * self.layers * self.kv * width + 8 * 4 * self.vocabulary)

    def calibrated(self, rank: int, texts: int, new: int = 48, prompt: int = 32) -> Size:
        """What learning a path of an adapter of the same rank takes on an accelerator, as calibrate counts it."""
        ends = self.layers * (9 * self.hidden + 2 * self.kv + 3 * self.inner)
        axes = AXES * self.layers * (6 * self.hidden + self.inner)
        linear = self.layers * self.layer
        return Size(
            linear=linear, other=self.weights - linear + 2 * rank * ends, heads=self.head, ends=ends,
            layers=self.layers, hidden=self.hidden, vocabulary=self.vocabulary, cache=2 * self.layers * self.kv,
            learned=rank * ends, axes=axes, sampled=FEWEST, text=new + prompt,
            step=step_tokens(texts * (new + prompt), 3, False),
            looked=min(LOOKED_AT, round(HELD_OUT * texts) * new), kept=0, measured=MEASURED_TOKENS, one_base=True,
        )  # fmt: skip


MODELS = {
    "1B (Llama 3.2)": Shape(2048, 8192, 16, 512, 128256, tied=True),
    "8B (Llama 3)": Shape(4096, 14336, 32, 1024, 128256),
    "32B (Qwen2.5)": Shape(5120, 27648, 64, 1024, 152064),
    "70B (Llama 3)": Shape(8192, 28672, 80, 1024, 128256),
}


def needs(shape: Shape, texts: int, tokens: int, width: int) -> dict[str, float]:
    """Bytes that each kind of work takes with weights of `width` bytes."""
    weights, head, dtype = width * shape.weights, 4 * shape.head, {2: torch.bfloat16, 4: torch.float32}[width]
    states = 4 * 3 * texts * tokens * shape.hidden
    sampled = shape.sampling(2, texts, tokens, width)
    held = {"dense": 2 * head + max(2 * head, HEADS), "LoRA": head}  # sides, and merges as stored and unrounded
    return {
        "compare, given texts, dense": weights + held["dense"] + states + OTHER,
        "compare, given texts, LoRA": weights + held["LoRA"] + states + OTHER,
        "compare or sweep, sampled, dense": max(2 * weights + sampled, weights + held["dense"]) + states + OTHER,
        "compare or sweep, sampled, LoRA": max(weights + sampled, weights + held["LoRA"]) + states + OTHER,
        "generate, exact, dense": 2 * weights + shape.sampling(2, 1, 4096, width) + OTHER,
        "generate, exact, LoRA": weights + shape.sampling(2, 1, 4096, width) + OTHER,
        **{f"calibrate, LoRA, {texts} texts{how}": shape.calibrated(16, texts).takes(dtype, *way)
           for texts in (256, 4096) for how, way in WAYS.items()},
    }  # fmt: skip


def widest(sizes: dict[str, float], card: float) -> str:
    """The first dtype of which the size fits a card, 5 % left for what was not counted; a dash for none."""
    return next((dtype for dtype, size in sizes.items() if size <= 0.95 * card * GB), "–")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=32, help="sampled together")
    parser.add_argument("--tokens", type=int, default=192, help="of a text, prompt included")
    args = parser.parse_args()
    for name, shape in MODELS.items():
        wide, narrow = (needs(shape, args.texts, args.tokens, width) for width in (4, 2))
        print(f"\n**{name}**, {shape.weights / 1e9:.1f} B weights\n")
        print(f"| | float32 | bfloat16 | {' | '.join(CARDS)} | 2 × 80 GB |\n|---|---|---|{'---|' * (len(CARDS) + 1)}")
        for what in wide:
            sizes = {"float32": wide[what], "bfloat16": narrow[what]}
            fits = [widest(sizes, card) for card in CARDS.values()]
            halves = what == "generate, exact, dense"  # --device cuda:0,cuda:1 puts a model on each
            fits.append(widest({dtype: size / (1 + halves) for dtype, size in sizes.items()}, 80))
            print(f"| {what} | {wide[what] / GB:.0f} GB | {narrow[what] / GB:.0f} GB | {' | '.join(fits)} |")


if __name__ == "__main__":
    main()
