#!/usr/bin/env python3
"""What drawing the next token costs: our noise, transformers' sampling, and noise from a generator for each text.

    python scripts/bench_noise.py                     # 32 texts, a vocabulary of 128,256, the CPU
    python scripts/bench_noise.py --device cuda

Scores (rows, vocabulary) in float32 become one token a row. Contestants take turns; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from dera_merge.texts.noise import GumbelNoise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    scores = torch.randn(args.rows, args.vocabulary, device=args.device)
    ids = torch.zeros(args.rows, 1, dtype=torch.long, device=args.device)
    ours = GumbelNoise(range(args.rows))
    generators = [torch.Generator().manual_seed(row) for row in range(args.rows)]

    def generator_each() -> torch.Tensor:
        """float64 uniforms on the host, then carried over: what this project did until November 2026."""
        uniform = torch.stack([torch.rand(args.vocabulary, generator=g, dtype=torch.float64) for g in generators])
        return (scores - torch.log(-torch.log(uniform)).to(scores)).argmax(-1)

    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "no noise (greedy)": lambda: scores.argmax(-1),
        "ours": lambda: ours(ids, scores).argmax(-1),
        "transformers' sampling (softmax, multinomial)": lambda: torch.multinomial(torch.softmax(scores, -1), 1),
        "a generator for each text, float64, on the host": generator_each,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, draw in contestants.items():
            began = time.perf_counter()
            draw().cpu()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.rows} × {args.vocabulary:,} scores, float32, {where}, torch {torch.__version__}\n")
    print("| | ms | ours = 1 |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median * 1000:.2f} | {median / medians['ours']:.2f} |")


if __name__ == "__main__":
    main()
