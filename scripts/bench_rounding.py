#!/usr/bin/env python3
"""What does storing θ(λ) in 16 bits cost? Nearest against stochastic rounding, bfloat16 against float16, side by side.

    python scripts/bench_rounding.py REF ALIGNED [--prompts 12] [--tokens 40] [--lambdas 0.3,0.7,1.5]

For each λ the same texts, sampled from exact DeRa in float32, are scored under the merge as each format stores it.
Prints a Markdown table: kl and tv from exact DeRa, kl_rounding (what rounding alone adds), and kl_ref for scale.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from dera_merge import ModelPair, compare
from dera_merge.lambdas import parse_lambdas
from dera_merge.texts.prompts import built_in

FORMATS = (("float32", "nearest"), ("bfloat16", "nearest"), ("bfloat16", "stochastic"), ("float16", "nearest"),
           ("float16", "stochastic"))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--prompts", type=int, default=12, help="how many of the built-in general prompts (12)")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--lambdas", default="0.3,0.7,1.5")
    args = parser.parse_args()
    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    lams, prompts, began = parse_lambdas([args.lambdas]), built_in()[: args.prompts], time.monotonic()
    print("| λ | stored as | rounding | kl | tv | kl_rounding | kl_ref |\n|---|---|---|---|---|---|---|")
    for dtype, rounding in FORMATS:
        report = compare(pair, lams, prompts, dtype=dtype, rounding=rounding, max_new_tokens=args.tokens)
        for row in report.results:
            rest = "–" if row["kl_rounding"] is None else f"{row['kl_rounding']:.2g}"
            print(f"| {row['lambda']:g} | {dtype} | {rounding} | {row['kl']:.2g} | {row['tv']:.2g} | {rest} | "
                  f"{row['kl_ref']:.2g} |", flush=True)  # fmt: skip
    print(f"\n{len(prompts)} prompts, {args.tokens} tokens, {time.monotonic() - began:.0f} s, "
          f"torch {torch.__version__}, "
          f"{platform.machine()}, {time.strftime('%Y-%m-%d')}")  # fmt: skip


if __name__ == "__main__":
    main()
