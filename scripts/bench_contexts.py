#!/usr/bin/env python3
"""What it spares to read once a context that several continuations have.

    python scripts/bench_contexts.py MODEL [--items 16] [--context 96] [--choices 4] [--tokens 12]

Items as of multiple choice: `choices` endings of `tokens` tokens behind a context of their own. Prints both times of
one run, their ratio, and by how much states and log-probabilities differ.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from dera_merge.measuring.contexts import trace_at_once
from dera_merge.measuring.traces import Text, tokens_of, trace_of

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, value in {"items": 16, "context": 96, "choices": 4, "tokens": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, model.config.vocab_size, (count,), generator=draw).tolist()

    contexts = [ids(args.context) for _ in range(args.items)]
    texts = [Text(n, [*context, *ids(args.tokens)], args.context)
             for n, context in enumerate(contexts) for _ in range(args.choices)]  # fmt: skip
    times: dict[str, list[float]] = {"one by one": [], "contexts once": []}
    traces = {}
    for _ in range(REPEATS):
        for (way, spent), work in zip(times.items(), (trace_of, trace_at_once), strict=True):
            began = time.process_time()
            traces[way] = work(model, texts)
            spent.append(time.process_time() - began)
    slow, fast = (statistics.median(spent) for spent in times.values())
    logp = [trace.head(trace.hidden).log_softmax(-1).gather(1, tokens_of(texts)[:, None]) for trace in traces.values()]
    apart = (traces["one by one"].hidden - traces["contexts once"].hidden).abs().max()
    print(f"{args.items} items: contexts of {args.context} tokens, {args.choices} endings of {args.tokens}")
    print(f"one by one {slow:.2f} s of CPU, contexts once {fast:.2f} s: {slow / fast:.2f} times as fast")
    print(f"states differ by {apart:.1e}, log-probabilities by {(logp[0] - logp[1]).abs().max():.1e} nats a token")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
