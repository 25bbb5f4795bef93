#!/usr/bin/env python3
"""What texts cost at every λ of a grid once both models have read them, beside the reading itself.

    python scripts/bench_grid.py REF ALIGNED [--texts 32] [--tokens 64] [--points 37]

Times of one run: the two models' passes; `densities`, which walks along λ (measuring/normaliser.py); and the same
figures with each λ summed by itself. The largest difference between the two is printed too.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch

from dera_merge import ModelPair
from dera_merge.measuring.divergence import chunks, densities
from dera_merge.measuring.normaliser import log_softmax, mixture
from dera_merge.measuring.traces import Text, Trace, logits_of, tokens_of, trace_of
from dera_merge.texts import prompts as prompt_files

REPEATS = 3


def timed(work):
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


@torch.no_grad()
def one_by_one(sides: list[Trace], tokens: torch.Tensor, lams: list[float], vocab_size: int) -> tuple[np.ndarray, ...]:
    """log p_λ of each token and KL from the reference there, every λ from logits of its own."""
    logp, kl = [], []
    for chunk, parts in chunks(len(tokens), vocab_size, sides[0].hidden.device):
        logits = logits_of(sides, chunk, vocab_size)
        for part in parts:
            log_ref, log_aligned = (log_softmax(side[part]) for side in logits)
            ratio, token_ids, rows = log_aligned - log_ref, tokens[chunk][part][:, None], []
            for lam in lams:
                log_p, p, log_z = mixture(log_ref, [log_aligned], lam)
                rows.append((log_p.gather(1, token_ids)[:, 0], lam * torch.linalg.vecdot(p, ratio) - log_z))
            logp.append(torch.stack([row[0] for row in rows], 1))
            kl.append(torch.stack([row[1] for row in rows], 1))
    return torch.cat(logp).numpy(), torch.cat(kl).numpy()


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--points", type=int, default=37)
    args = parser.parse_args()
    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    generator = np.random.default_rng(0)
    words = [word for word in pair.tokenizer.get_vocab() if word.isascii() and word.isalpha()]
    prompts = prompt_files.built_in()[: args.texts]
    given = [{**prompt, "completion": " ".join(generator.choice(words, args.tokens))} for prompt in prompts]
    encoded = prompt_files.encode(given, pair.tokenizer)
    texts = [Text(i, [*p.ids, *p.completion[: args.tokens]], len(p.ids)) for i, p in enumerate(encoded)]
    exact, tokens = pair.exact(), tokens_of(texts)
    lams = np.linspace(0, 2, args.points).tolist()
    rows = []
    for _ in range(REPEATS):
        reading, sides = timed(lambda: [trace_of(model, texts) for model in exact.sides])
        fast, ours = timed(lambda sides=sides: densities(sides, tokens, lams, pair.vocab_size))
        slow, theirs = timed(lambda sides=sides: one_by_one(sides, tokens, lams, pair.vocab_size))
        rows.append((reading, fast, slow))
    reading, fast, slow = np.median(rows, 0)
    off = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    print(f"{len(texts)} texts, {len(tokens)} tokens, a vocabulary of {pair.vocab_size}, {len(lams)} λ")
    print(f"both models' passes {reading:.2f} s")
    print(f"densities {fast:.2f} s; each λ by itself {slow:.2f} s: {slow / fast:.1f} times that")
    print(f"largest difference {off:.1e} nats; torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
