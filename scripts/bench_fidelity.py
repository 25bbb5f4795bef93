#!/usr/bin/env python3
"""What compare costs beside the forward passes that it cannot do without, and how much memory its distributions take.

    python scripts/bench_fidelity.py REF ALIGNED [--texts 32] [--tokens 64]      # time, ratios within one run
    python scripts/bench_fidelity.py --memory                                   # peak memory at a vocabulary of 128 k

Time: `compare` on given texts at one λ and at nine; the difference is what a further λ costs, divided by one plain
forward pass of the merged model over the same texts (logits of all scored tokens included). Memory: traces of a
vocabulary of 128 256 rows, above what holding heads and traces takes.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings

import numpy as np
import torch

from dera_merge import ModelPair, compare
from dera_merge.measuring.divergence import divergences
from dera_merge.measuring.traces import Text, Trace, batches, padded, scored
from dera_merge.texts import prompts as prompt_files

LAMS = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.5, 2.0]


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def plain_pass(model, texts: list[Text]) -> None:
    """One ordinary forward pass over the texts: hidden states, and logits of the scored tokens."""
    for batch in batches(texts):
        chosen = [texts[i] for i in batch]
        ids, mask = padded(chosen, model.device)
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        model.get_output_embeddings()(scored(states, chosen))


def timing(ref: str, aligned: str, count: int, tokens: int) -> None:
    pair = ModelPair.from_pretrained(ref, aligned)
    generator = np.random.default_rng(0)
    words = [t for t in pair.tokenizer.get_vocab() if t.isascii() and t.isalpha()]
    prompts = prompt_files.built_in()[:count] if pair.tokenizer.chat_template else [{"prompt": "The"}] * count
    given = [{**prompt, "completion": " ".join(generator.choice(words, tokens))} for prompt in prompts]
    encoded = prompt_files.encode(given, pair.tokenizer)
    texts = [Text(i, [*p.ids, *p.completion], len(p.ids)) for i, p in enumerate(encoded)]
    model = pair.merged(0.5)
    plain_pass(model, texts)  # warm
    how = {"dtype": "float32", "extras": ()}
    compare(pair, LAMS[:1], given, **how)
    rows = []
    for _ in range(3):
        alone = seconds(lambda: plain_pass(model, texts))
        one, nine = (seconds(lambda lams=lams: compare(pair, lams, given, **how)) for lams in (LAMS[:1], LAMS))
        turn = seconds(lambda: model.set_lam(0.5))
        rows.append(((nine - one) / (len(LAMS) - 1), turn, alone))
    each, turn, alone = np.median(rows, 0)
    print(
        f"{len(texts)} texts, {sum(len(t.completion) for t in texts)} scored tokens, vocabulary {len(pair.tokenizer)}"
    )
    print(f"a plain pass {alone:.2f} s; a further λ {each:.2f} s, {each / alone:.2f} passes")
    print(f"{turn:.2f} s of it turn the dial; without that {(each - turn) / alone:.2f} passes")


def memory() -> None:
    vocabulary, hidden, tokens = 128_256, 512, 1024
    weights = [torch.randn(vocabulary, hidden) * 0.05 for _ in range(3)]
    traces = [Trace(torch.randn(tokens, hidden), lambda h, w=w: h @ w.T) for w in weights]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    at, own = [(lam, {"kl": traces[2]}) for lam in LAMS], torch.zeros(tokens, dtype=torch.long)
    took = seconds(lambda: divergences(traces[:2], at, own, vocabulary))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    whole = tokens * vocabulary * 8 / 1e6
    print(f"vocabulary {vocabulary}, {tokens} tokens, {len(LAMS)} λ: {after - before:.0f} MB above heads and traces")
    print(f"{took:.0f} s; one distribution of all tokens in float64 is {whole:.0f} MB")


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="REF ALIGNED")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        memory()
    else:
        timing(*args.models, args.texts, args.tokens)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
