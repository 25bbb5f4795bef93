#!/usr/bin/env python3
"""How far is θ_ref + λΔ from exact DeRa? The study behind the README's table, as a script over the library.

    python scripts/compare_exact_approx.py REF ALIGNED -o DIR [--prompts FILE] [--lambdas 0:2:0.25] [--tokens 64]

Prints one Markdown table and writes DIR/report.json, report.md and fidelity.png. Without --prompts: 32 general ones.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from dera_merge import ModelPair, compare
from dera_merge.lambdas import parse_lambdas
from dera_merge.pages.fidelity import markdown
from dera_merge.pages.frame import read as as_read
from dera_merge.texts.prompts import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("-o", "--out", required=True)
    parser.add_argument("--prompts")
    parser.add_argument("--lambdas", default="0:2:0.25")
    parser.add_argument("--tokens", type=int, default=64, help="length of the sampled texts (64)")
    parser.add_argument("--rounding", choices=["stochastic", "nearest"])
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()

    began = time.monotonic()
    report = compare(
        ModelPair.from_pretrained(args.ref, args.aligned),
        parse_lambdas([args.lambdas]),
        prompts=read(args.prompts) if args.prompts else None,
        dtype=args.dtype,
        rounding=args.rounding,
        max_new_tokens=args.tokens,
        progress=lambda what, done, total: print(f"\r{what}: {done}/{total}   ", end="", flush=True),
    )
    report.save(args.out)
    print(f"\r{markdown(as_read(report.to_dict()))}")
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")


if __name__ == "__main__":
    main()
