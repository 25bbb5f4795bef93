#!/usr/bin/env python3
"""How much nearer to exact DeRa does a learned path come than the straight line? Paired, on prompts that it has not
seen.

    python scripts/study_calibration.py REF ALIGNED PATH [--lambdas 0:2:0.25] [--prompts FILE]

Line and path are measured on the same texts, sampled from exact DeRa; intervals of the difference resample prompts.
Without --prompts: 32 general ones. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from datetime import date

import torch

from dera_merge import ModelPair, compare
from dera_merge.lambdas import parse_lambdas
from dera_merge.texts.prompts import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("path")
    parser.add_argument("--lambdas", default="0.25,0.5,0.75,1.25,1.5,2")
    parser.add_argument("--prompts")
    parser.add_argument("--tokens", type=int, default=40, help="length of the sampled texts (40)")
    parser.add_argument("--dtype", default="float32", help="how the merge is stored (float32: no rounding)")
    parser.add_argument("--no-floor", action="store_true", help="leave out bfloat16, slow on some processors")
    parser.add_argument("--seed", type=int, default=1000, help="of the texts (1000; calibrate's default is 0)")
    args = parser.parse_args()

    began = time.monotonic()
    report = compare(
        ModelPair.from_pretrained(args.ref, args.aligned), parse_lambdas([args.lambdas]),
        read(args.prompts) if args.prompts else None, path=args.path, dtype=args.dtype, max_new_tokens=args.tokens,
        seed=args.seed, extras=() if args.no_floor else ("floor",),
    )  # fmt: skip
    print("| λ | line | path | line / path | path less line (95 %) | tv | captured | bf16 floor |")
    print("|---" * 8 + "|")
    for row in report.results:
        line, path = row["line"]["kl"], row["kl"]
        low, high = row["line"]["difference_ci"]
        captured = "–" if row["captured"] is None else f"{row['captured']:.1%}"
        ratio = f"{line / path:.2f}" if path > 1e-9 else "–"
        floor = "–" if args.no_floor else f"{row['noise_floor']:.2g}"
        cells = [
            f"{row['lambda']:g}",
            f"{line:.2g}",
            f"{path:.2g}",
            ratio,
            f"{low:.1e} to {high:.1e}",
            f"{row['tv']:.2g}",
        ]
        print(f"| {' | '.join([*cells, captured, floor])} |")
    seconds = time.monotonic() - began
    print(f"\n{date.today()}, {seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
