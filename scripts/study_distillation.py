#!/usr/bin/env python3
"""Exact DeRa at one λ, distilled into one model: the baseline that a learned path has to beat.

    python scripts/study_distillation.py REF ALIGNED --lambdas 0.5 --texts 192 [--path FILE]

As TrRa does it (2506.12704): a student learns from the mixture of the two models' logits at one λ, here by
KL(exact‖student) on texts of exact DeRa. It is a LoRA, started once from the reference and once from θ_ref + λΔ.
Prompts are those that the reference writes itself, as for `dera-merge calibrate`; figures are of the 32 general ones,
float32. `--path` puts a learned path beside them, on the same texts. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, set_seed

from dera_merge import ModelPair
from dera_merge.calibrating.lessons import own_prompts
from dera_merge.calibrating.training import STEP_TOKENS
from dera_merge.decoding.mix import mix, shares_of
from dera_merge.lambdas import parse_lambdas
from dera_merge.measuring.divergence import divergences
from dera_merge.measuring.traces import Text, Trace, batches, padded, scored, tokens_of, trace_of
from dera_merge.statistics.intervals import bootstrap
from dera_merge.texts.prompts import default, encode
from dera_merge.texts.sampling import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--lambdas", default="0.5")
    parser.add_argument("--path", help="a path that calibrate wrote")
    parser.add_argument("--texts", type=int, default=192, help="to learn from, at each λ (192)")
    parser.add_argument("--tokens", type=int, default=48, help="length of these (48); of those that are measured: 40")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()

    began = time.monotonic()
    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    exact = pair.exact(dtype=torch.float32)
    set_seed(0)
    learned_from = [prompt.ids for prompt in encode(own_prompts(pair, exact.ref, args.texts), pair.tokenizer)]
    asked = [prompt.ids for prompt in encode(default(pair.tokenizer), pair.tokenizer)]

    def sampled(prompts: list[list[int]], lam: float, tokens: int, seed: int) -> tuple[list[Text], tuple[Trace, Trace]]:
        """A text of exact DeRa for each prompt, and what the reference and the aligned model make of them."""
        new = sample(
            exact, pair.tokenizer, prompts, lam=lam, max_new_tokens=tokens, seed=seed, vocab_size=pair.vocab_size
        )
        texts = [Text(number, ids + row, len(ids)) for number, (ids, row) in enumerate(zip(prompts, new, strict=True))]
        return texts, (trace_of(exact.ref, texts), trace_of(exact.aligned, texts))

    merged = partial(pair.merged, dtype="float32", compute_dtype="float32")
    print("| λ | model | kl | line / it | less the line (95 %) | seconds of training |")
    print("|---" * 6 + "|")
    for lam in parse_lambdas([args.lambdas]):
        lessons, teacher = sampled(learned_from, lam, args.tokens, 0)
        texts, ends = sampled(asked, lam, 40, 1000)
        measure = _Measure(lam, texts, ends, pair.vocab_size)
        measure.row("straight line", merged(lam))
        if args.path:
            measure.row("learned path", merged(lam, path=args.path))
        for start, at in (("the reference", 0.0), ("the line", lam)):
            torch.manual_seed(0)
            since = time.monotonic()
            student = distilled(merged(at), lessons, teacher, lam, args.rank, args.learning_rate)
            measure.row(f"distilled, from {start}", student, time.monotonic() - since)
    seconds = time.monotonic() - began
    print(f"\n{date.today()}, {seconds:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


@dataclass
class _Measure:
    """Rows of the table for one λ; the first is what the others are compared with."""

    lam: float
    texts: list[Text]
    ends: tuple[Trace, Trace]
    vocab_size: int
    line: np.ndarray | None = None

    def row(self, what: str, model: PreTrainedModel, seconds: float | None = None) -> None:
        approximation = [(self.lam, {"kl": trace_of(model, self.texts)})]
        kl = divergences(self.ends, approximation, tokens_of(self.texts), self.vocab_size)[self.lam]["kl"]
        self.line = kl if self.line is None else self.line
        prompt_of = np.repeat([text.prompt for text in self.texts], [len(text.completion) for text in self.texts])
        low, high = bootstrap(kl - self.line, prompt_of)
        took = "–" if seconds is None else f"{seconds:.0f}"
        ratio = f"{self.line.mean() / kl.mean():.2f}"
        print(f"| {self.lam:g} | {what} | {kl.mean():.2g} | {ratio} | {low:.1e} to {high:.1e} | {took} |", flush=True)


def distilled(
    model: PreTrainedModel, texts: list[Text], teacher: tuple[Trace, Trace], lam: float, rank: int, learning_rate: float
) -> PreTrainedModel:
    """The model with a LoRA on all linear layers, trained on KL(exact‖it) in one pass over the texts; merged."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    student = get_peft_model(model, config).train()
    steps = list(batches(texts, STEP_TOKENS))
    random.Random(0).shuffle(steps)
    starts = np.cumsum([0, *(len(text.completion) for text in texts)])
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    warm = max(1, len(steps) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min((n + 1) / warm, (len(steps) - n) / len(steps))
    )
    for step in steps:
        chosen = [texts[i] for i in step]
        where = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in step])
        with torch.no_grad():
            ref, aligned = (side.head(side.hidden[where])[:, None] for side in teacher)
            log_p = torch.log_softmax(mix([ref, aligned], shares_of(torch.full((len(where),), lam)))[:, 0], -1)
        ids, mask = padded(chosen, student.device)
        log_q = torch.log_softmax(scored(student(input_ids=ids, attention_mask=mask).logits, chosen), -1)
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
    return student.merge_and_unload().eval()


if __name__ == "__main__":
    main()
