#!/usr/bin/env python3
"""Does Cross-Task Linearity hold layer by layer, and what does its gap say of kl? In float32, on texts of exact DeRa.

    python scripts/study_ctl.py REF ALIGNED [--lambdas 0.25,0.5,0.75,1.5,2] [--prompts FILE] [--plot FILE]

Cross-Task Linearity (Zhou et al., ICML 2024) says that features of θ_ref + λΔ are those of the two models, mixed with
the same weights. The gap of a layer is ‖x_merged - (1-λ)·x_ref - λ·x_aligned‖ / ‖x_aligned - x_ref‖ over the scored
tokens' hidden states: 0 where it holds, and at λ = ½ a half is no better than either model. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path

import torch

from dera_merge import DeraForCausalLM, ModelPair
from dera_merge.lambdas import parse_lambdas
from dera_merge.measuring.attribution import feature_gaps
from dera_merge.measuring.divergence import divergences
from dera_merge.measuring.traces import Text, tokens_of, trace_of
from dera_merge.texts.prompts import built_in, encode, read
from dera_merge.texts.sampling import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--lambdas", default="0.25,0.5,0.75,1.5,2")
    parser.add_argument("--prompts")
    parser.add_argument("--count", type=int, default=16, help="prompts (16)")
    parser.add_argument("--tokens", type=int, default=40, help="length of the sampled texts (40)")
    parser.add_argument("--plot", type=Path, help="a PNG of the gaps over the layers")
    args = parser.parse_args()

    began = time.monotonic()
    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    exact, merged, tokenizer = DeraForCausalLM.from_pair(pair, dtype=torch.float32), pair.merged(0.5), pair.tokenizer
    prompts = [prompt.ids for prompt in encode((read(args.prompts) if args.prompts else built_in()), tokenizer)]
    prompts = prompts[: args.count]
    lams, gaps = parse_lambdas([args.lambdas]), {}
    print("| λ | kl | captured | gap, layers in quarters | largest gap (layer) | last layer |\n" + "|---" * 6 + "|")
    for lam in lams:
        merged.set_lam(lam)
        new = sample(exact, tokenizer, prompts, max_new_tokens=args.tokens, lams=[lam] * len(prompts))
        texts = [Text(i, [*ids, *made], len(ids)) for i, (ids, made) in enumerate(zip(prompts, new, strict=True))]
        sides = [trace_of(model, texts) for model in (exact.ref, exact.aligned)]
        traces = [(lam, {"kl": trace_of(merged, texts)})]
        figures = divergences(sides, traces, tokens_of(texts), exact.config.vocab_size)[lam]
        kl, to_ref, to_aligned = (float(figures[key].mean()) for key in ("kl", "kl_ref", "kl_aligned"))
        gaps[lam] = feature_gaps(exact.ref, exact.aligned, merged, texts, lam)
        layers = gaps[lam][1:]  # behind the embeddings
        quarters = [layers[len(layers) * i // 4 : len(layers) * (i + 1) // 4] for i in range(4)]
        worst = max(range(len(layers)), key=layers.__getitem__)
        print(
            f"| {lam:g} | {kl:.2g} | {1 - kl / min(to_ref, to_aligned):.0%} | "
            f"{', '.join(f'{sum(part) / len(part):.3f}' for part in quarters)} | "
            f"{layers[worst]:.3f} ({worst + 1}) | {layers[-1]:.3f} |"
        )
    if args.plot:
        plot(gaps, args.plot)
    seconds = time.monotonic() - began
    print(f"\n{date.today()}, {seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


def plot(gaps: dict[float, list[float]], file: Path) -> None:
    """The gap over the layers, a line for each λ."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (lam, values), style in zip(gaps.items(), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))) * 3, strict=False):
        axes.plot(range(len(values)), values, linestyle=style, label=f"λ = {lam:g}")
    axes.set(xlabel="layer (0: embeddings)", ylabel="gap, in parts of the shift", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
