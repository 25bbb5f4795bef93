#!/usr/bin/env python3
"""How well is kl over the whole range predicted from three probes? Against measurements, in float32.

    python scripts/study_prediction.py REF ALIGNED [--lambdas 0.1:0.9:0.1,1.1:2:0.1] [--prompts FILE] [--count 32]

Probes lie at 1/4, 3/4 and the largest λ. Prints a Markdown table with the share by which each prediction misses.
"""

from __future__ import annotations

import argparse
import time
from datetime import date

import torch

from dera_merge import ModelPair, compare
from dera_merge.lambdas import parse_lambdas
from dera_merge.texts.prompts import built_in, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--lambdas", default="0.1:0.9:0.1,1.1:2:0.1")
    parser.add_argument("--prompts")
    parser.add_argument("--count", type=int, default=32, help="prompts (32)")
    parser.add_argument("--tokens", type=int, default=48, help="length of the sampled texts (48)")
    args = parser.parse_args()

    began = time.monotonic()
    prompts = (read(args.prompts) if args.prompts else built_in())[: args.count]
    report = compare(
        ModelPair.from_pretrained(args.ref, args.aligned), parse_lambdas([args.lambdas]), prompts, dtype="float32",
        max_new_tokens=args.tokens, extras=("predict",),
    )  # fmt: skip
    print("| λ | kl (95 %) | predicted | misses by |\n|---|---|---|---|")
    for row in report.results:
        low, high = row["kl_ci"]
        miss = row["predicted"]["kl"] / row["kl"] - 1
        measured = f"{row['kl']:.2g} ({low:.2g} to {high:.2g})"
        print(f"| {row['lambda']:g} | {measured} | {row['predicted']['kl']:.2g} | {miss:+.0%} |")
    seconds = time.monotonic() - began
    print(f"\n{date.today()}, {seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
