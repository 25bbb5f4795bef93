#!/usr/bin/env python3
"""Do curves from the texts of a few λ say what sampling at every λ says? And at what share of the price?

    python scripts/study_sweep.py REF ALIGNED --prompts FILE --reward SPEC [--lambdas 0:2:0.0625] [--samples 4]
    [--direct 2]

Samples every λ directly (noise of its own at each), and makes a curve of a few anchors. Prints how often the direct
mean lies in the curve's 95 % interval, how often once the direct mean's own noise is counted too, and tokens sampled by
each.
"""

from __future__ import annotations

import argparse
import time
from datetime import date

import numpy as np
import torch

from dera_merge import ModelPair, load_reward, sweep
from dera_merge.lambdas import parse_lambdas
from dera_merge.texts.prompts import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--reward", default="lexicon")
    parser.add_argument("--lambdas", default="0:2:0.0625")
    parser.add_argument("--anchors", default="0,0.5,1,2")
    parser.add_argument("--samples", type=int, default=4, help="texts a prompt at each anchor (4)")
    parser.add_argument("--direct", type=int, default=2, help="texts a prompt at each λ, sampled directly (2)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--budget", type=int, help="texts of the curve in all; default: the anchors and three more")
    args = parser.parse_args()

    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    prompts, rewards = read(args.prompts), [load_reward(args.reward)]
    lams = parse_lambdas([args.lambdas])
    common = {"max_new_tokens": args.tokens, "merged": False, "check": False}
    began = time.monotonic()
    anchors = parse_lambdas([args.anchors])
    curve = sweep(pair, prompts, rewards, lams, anchors=anchors, samples=args.samples, budget=args.budget, **common)
    middle = time.monotonic()
    # Texts of the curve's own streams are not used again: another seed.
    direct = [
        sweep(pair, prompts, rewards, [lam], reweight=False, samples=args.direct, seed=1 + n, **common)
        for n, lam in enumerate(lams)
    ]
    rows = {row["lambda"]: row for row in curve.curve}
    print("| λ | direct | curve (95 %) | ess | inside |\n|---|---|---|---|---|")
    inside, fair = [], []
    for lam, found in zip(lams, direct, strict=True):
        (point,) = found.points
        low, high = rows[lam]["reward_ci"]
        inside.append(low <= point["reward"] <= high)
        # Both estimate on the same prompts; what is left of the direct mean's noise is that of its texts.
        half = 1.96 * _noise(found.answers, args.reward)
        fair.append(low - half <= point["reward"] <= high + half)
        text = f"{rows[lam]['reward']:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"| {lam:g} | {point['reward']:.2f} | {text} | {rows[lam]['ess']:.2f} | {'yes' if inside[-1] else 'no'} |"
        )
    spent = [sum(len(answer.ids) for answer in found.answers) for found in (curve, *direct)]
    print(f"\ninside: {np.mean(inside):.0%}; counting the direct means' own noise: {np.mean(fair):.0%}")
    share = f"{spent[0]:,} against {sum(spent[1:]):,} ({spent[0] / sum(spent[1:]):.0%})"
    print(f"anchors {curve.settings['anchors']}; tokens: {share}")
    seconds = f"{middle - began:.0f} s and {time.monotonic() - middle:.0f} s"
    print(f"{date.today()}, {seconds}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def _noise(answers: list, reward: str) -> float:
    """Standard error of the mean over texts within prompts, prompts taken as given."""
    by_prompt: dict[int, list[float]] = {}
    for answer in answers:
        if (value := answer.rewards[reward]) is not None:
            by_prompt.setdefault(answer.prompt, []).append(value)
    parts = [np.var(values, ddof=1) / len(values) for values in by_prompt.values() if len(values) > 1]
    return float(np.sqrt(np.mean(parts) / len(parts))) if parts else 0.0


if __name__ == "__main__":
    main()
