#!/usr/bin/env python3
"""How much nearer to exact DeRa does a learned path come than the straight line? Paired, on prompts that it has not seen.

    python scripts/study_calibration.py REF ALIGNED --path FILE [--path FILE…] [--lambdas 0:2:0.25] [--prompts FILE]

The texts are sampled from exact DeRa with one seed, so that the line and every path are measured on the same tokens; the
intervals of the difference resample prompts. Without --prompts: 32 general ones. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import date

import torch

from dera_merge import ModelPair, compare
from dera_merge.divergence import bootstrap
from dera_merge.lambdas import parse_lambdas
from dera_merge.prompts import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--path", action="append", default=[], metavar="FILE")
    parser.add_argument("--lambdas", default="0.25,0.5,0.75,1.25,1.5,2")
    parser.add_argument("--prompts")
    parser.add_argument("--tokens", type=int, default=40, help="length of the sampled texts (40)")
    parser.add_argument("--dtype", default="float32", help="how the merge is stored (float32: no rounding)")
    parser.add_argument("--extras", default="floor")
    parser.add_argument("--seed", type=int, default=1000, help="of the texts (1000; calibrate's default is 0)")
    args = parser.parse_args()

    began = time.monotonic()
    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    lams = parse_lambdas([args.lambdas])
    prompts = read(args.prompts) if args.prompts else None
    how = {"dtype": args.dtype, "max_new_tokens": args.tokens, "seed": args.seed}
    line = compare(pair, lams, prompts, extras=args.extras.split(",") if args.extras else (), **how)
    paths = {file: compare(pair, lams, prompts, path=file, extras=(), **how) for file in args.path}

    print("| λ | line |", *(f"{file} | line / path | difference (95 %) |" for file in paths), "bf16 floor |")
    print("|---" * (3 + 3 * len(paths)) + "|")
    for index, lam in enumerate(lams):
        straight = line.results[index]
        cells = [f"{lam:g}", f"{straight['kl']:.2g}"]
        for report in paths.values():
            kl = report.results[index]["kl"]
            gain = report.per_token[lam]["kl"] - line.per_token[lam]["kl"]
            low, high = bootstrap(gain, line.prompt_of[lam]) or (float("nan"),) * 2
            cells += [f"{kl:.2g}", f"{straight['kl'] / kl:.2f}" if kl > 1e-9 else "–", f"{low:.1e} to {high:.1e}"]
        floor = straight.get("noise_floor")
        print("|", " | ".join([*cells, "–" if floor is None else f"{floor:.2g}"]), "|", flush=True)
    seconds = time.monotonic() - began
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}"
    print(f"\n{date.today()}, {seconds:.0f} s, torch {torch.__version__}, {machine}")


if __name__ == "__main__":
    main()
