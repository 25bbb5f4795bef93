"""`dera-merge demo`: what λ does, on the pair in `demo/`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from . import demo
from .api import ModelPair
from .measuring.compare import compare
from .pages.fidelity import plot_fidelity
from .progress import Progress
from .texts.prompts import encode
from .texts.sampling import sample

LAMS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
SHOWN = [0.0, 0.5, 1.0, 2.0]
PROMPT = 2  # whose texts are shown: short ones, which say what λ does
TOKENS = 64
log = logging.getLogger(__name__)


def run(out: str | os.PathLike[str], progress: Progress | None = None) -> dict[str, Any]:
    """Sample, compare, plot and merge the demo pair.

    Args:
        out: directory; gets report.json, report.md, fidelity.png, demo.png and the checkpoint `merged-0.5`.
        progress: called as work goes on.

    Returns:
        `prompt`, `samples` (λ, exact text, merged text), `results` (as `compare --json`), mean reward at each λ under
        both, the paths of `plot` and `checkpoint`.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(out)
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    tokenizer = pair.tokenizer
    prompts = demo.prompts()
    (checkpoint,) = pair.merge(folder / "merged-0.5", [0.5], overwrite=True)
    asked = encode(prompts, tokenizer)
    log.info("%d prompts of the demo's own, each answered at %d λ", len(asked), len(LAMS))
    report = compare(pair, LAMS, asked, max_new_tokens=TOKENS, progress=progress)
    report.save(folder)

    ids = [prompt.ids for prompt in asked]
    exact, merged = pair.exact(), pair.merged(0.0)
    samples, rewards = [], {"exact": [], "merged": []}
    for number, lam in enumerate(LAMS, 1):
        merged.set_lam(lam)
        # The same noise for both models: their texts part only where their distributions do.
        texts = {
            name: [
                tokenizer.decode(tokens, skip_special_tokens=True)
                for tokens in sample(model, tokenizer, ids, max_new_tokens=128, **kwargs)
            ]
            for name, model, kwargs in (("exact", exact, {"lams": [lam] * len(ids)}), ("merged", merged, {}))
        }
        for name, answers in texts.items():
            rewards[name].append(sum(map(demo.reward, answers)) / len(answers))
        if lam in SHOWN:
            samples.append({"lambda": lam, "exact": texts["exact"][PROMPT], "merged": texts["merged"][PROMPT]})
        if progress:
            progress("sampling answers, whose praise is counted, at λ number", number, len(LAMS))
    plot = plot_fidelity(
        report.results, folder / "demo.png", {"exact DeRa": rewards["exact"], "merged": rewards["merged"]}
    )

    plain = AutoModelForCausalLM.from_pretrained(checkpoint)  # an ordinary checkpoint, nothing of ours needed
    assert plain.num_parameters() > 0
    return {
        "prompt": prompts[PROMPT]["messages"][-1]["content"],
        "samples": samples,
        "results": report.results,
        "reward_exact": rewards["exact"],
        "reward_merged": rewards["merged"],
        "plot": str(plot) if plot else None,
        "checkpoint": str(checkpoint),
    }
