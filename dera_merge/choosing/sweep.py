"""Choose λ: what each λ earns and what it costs in KL from the reference, on a validation set.

`sweep` goes all the way from prompts to the answer. Texts are sampled from exact DeRa at a few λ (anchors), scored, and
read once by both models; `statistics/reweighting.py` makes curves over all λ of them. Where the best λ is not known
well enough, the next anchor goes there. The merged model, whose texts say nothing of exact DeRa, is sampled at the
anchors, under the same noise. Without reweighting every λ is sampled, and what is left of a budget is spent around the
best.

Every batch of texts is appended to `texts.jsonl` as it comes, with its rewards; an interrupted run goes on from there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DeraError
from ..files.atomic import load_json
from ..files.room import alone, check_space
from ..measuring.compare import compare
from ..measuring.laboratory import Compute
from ..measuring.precision import chosen, full_float32
from ..merging.path import Curve, opened
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..processes import gathered, launched
from ..progress import Progress
from ..serving import vllm_server as engines
from ..texts import prompts as prompt_files
from ..texts.batches import Batches
from ..texts.exchanges import in_words
from ..texts.rewards import Reward, as_reward, checked
from .anchors import default_lambdas, first_anchors, grid_between
from .answers import Asked, Mode, Store
from .curves import Curves
from .report import Sweep
from .sampler import SweepLab
from .targets import Cost, goal

PER_TEXT, PER_TOKEN = 200, 16  # bytes of texts.jsonl for a text and for a token of it
PAGES = 4_000_000  # bytes of a report


@full_float32()
def sweep(
    pair: Pair,
    prompts: Sequence[str | dict[str, Any]],
    rewards: Sequence[Reward | str | Callable[..., Any]] = (),
    lams: Sequence[float | Sequence[float]] | None = None,
    *,
    weights: Sequence[float] | None = None,
    target_kl: float | None = None,
    target_length: float | None = None,
    keep: float | None = None,
    minimise: Cost = "tokens",
    anchors: Sequence[float | Sequence[float]] | None = None,
    samples: int = 1,
    max_new_tokens: int = 64,
    mode: Mode = "exact",
    reweight: bool = True,
    merged: bool = True,
    path: str | os.PathLike[str] | Curve | None = None,
    scored: Sequence[dict[str, Any]] | None = None,
    budget: int | None = None,
    check: bool = True,
    beta: float | None = None,
    seed: int = 0,
    engine: str | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Find the λ that rewards on a validation set want, or that meets a target.

    Started by `accelerate launch` or `torchrun`, each process samples and reads a share; all return the same.

    Args:
        pair: the two models.
        prompts: texts or rows, as for `compare`, without completions. What is too long is left out.
        rewards: what texts are worth: each a `Reward`, a function, or a spec as for `load_reward`. A target of KL or
            length needs none.
        lams: the λ of interest; with `reweight`, the curve spans them. Default: 0 to 2. With several aligned models a
            number for each, and those that are given are the grid; default: every combination from 0 to 1.
        weights: of the rewards; default 1 each.
        target_kl: choose the λ at which KL from the reference is so much, in nats a token, on texts of that λ.
        target_length: choose the λ whose texts have so many tokens on average, an end token included.
        keep: choose the λ of the least cost among those that surely keep this share of λ=1's reward: the lower bound of
            the paired ratio is no less.
        minimise: the cost: `"tokens"` of a text, or `"kl"`.
        anchors: where texts are sampled; default 0, 0.5, 1 and 2 as far as they lie within the span, and its ends; with
            several aligned models, each alone, none, and their mean.
        samples: texts for each prompt at each anchor.
        max_new_tokens: their length, in tokens.
        mode: whose texts answer the question: exact DeRa's, the same sampled one by one with the merged model drafting
            (`"speculative"`), or the merged model's alone (`"merged"`; they cannot be reweighted).
        reweight: make curves over all λ of the texts of a few; without it every one of `lams` is sampled, and what a
            budget leaves goes half-way between the best and its neighbours, or, with several aligned models, where
            optuna's sampler proposes within the box that `lams` span.
        merged: sample the merged model at the anchors too.
        path: a path that `calibrate` learned, for the merged model.
        scored: texts that were sampled before, see `read_scored`; nothing is sampled then.
        budget: texts of exact DeRa in all; default: those of the anchors, and with `reweight` of three more.
        check: measure how far the merged model at the recommended λ is from exact DeRa.
        beta: the KL coefficient that ALIGNED was trained with; default: what its directory says, if it does.
        seed: of sampling and bootstrap.
        engine: sample exact DeRa's texts by vLLM: the address of a server of the pair's exact directory, or `"vllm"` to
            start one. Its noise is its own, so texts of several λ and of both modes are not coupled.
        batch_size: how many texts models sample and read at a time; default: as many as fit, fewer once memory ran out.
        device: where the models run.
        compute_dtype: in what they run; `"auto"` is float32, or bfloat16 where only that fits in free memory.
        out: a directory in which texts are kept as they come.
        resume: go on with what an interrupted call with the same arguments left there.
        overwrite: throw away the texts that an earlier call left there.
        progress: called as work goes on.

    Returns:
        A `Sweep`. Intervals are 95 % (bootstrap over prompts).

    Raises:
        DeraError: prompts, rewards or λ are unusable, or a reward fails on every text; another run is at work in `out`,
            or an earlier one left texts there.
    """
    if mode == "merged":
        if scored is not None or engine:
            raise DeraError("--from-scored and --engine bring exact DeRa's texts; leave out --mode merged")
        reweight = False
    if mode == "speculative" and engine:
        raise DeraError("--engine samples by itself; leave out --mode speculative")
    lams = pair.known(lams) if lams is not None else default_lambdas(pair, reweight)
    rewards = [as_reward(reward, folder=out) for reward in rewards]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise DeraError("give each reward once")
    by = goal(target_kl, target_length, keep, minimise, len(rewards), lams)
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    if len(weights) != len(rewards) or not all(map(math.isfinite, weights)):
        raise DeraError(f"{len(weights)} weights for {len(rewards)} rewards")
    encoded = prompt_files.fitting(
        prompts, pair.tokenizer, max_new_tokens, pair.context_length, processor=lambda: pair.processor
    )
    if mode == "speculative" and any(prompt.shown for prompt in encoded):
        raise DeraError("a draft reads no images; leave out --mode speculative")
    if any(prompt.completion is not None for prompt in encoded):
        raise DeraError("the prompts bring completions; texts that are scored already go with --from-scored")
    if len(encoded) < 2:
        raise DeraError("one prompt says nothing about others; give more")
    if scored is None:
        checked(rewards, encoded)
    compute_dtype = chosen(pair, compute_dtype, device)
    curve = opened(path, pair, lams)
    grid = sorted({*lams, *grid_between(lams)}) if reweight else sorted(lams)
    anchors = pair.known(anchors) if anchors is not None else first_anchors(pair, lams) if reweight else grid
    grid = sorted({*grid, *anchors, *([1.0] if keep is not None else [])})
    if keep is not None and not reweight and 1.0 not in anchors:
        raise DeraError("--keep asks for a share of λ=1's reward, and each λ is sampled by itself; let -l hold 1")
    settings = {
        "prompts": len(encoded), "samples": samples, "max_new_tokens": max_new_tokens, "anchors": anchors, "seed": seed,
        "rewards": dict(zip(names, weights, strict=True)), "reweight": reweight, "budget": budget,
        "path": curve.describe() if curve else None, "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "engine": "vllm" if engine else None, "mode": mode,
    }  # fmt: skip
    mark = {"pair": fingerprint(pair), "prompts": [prompt.mark for prompt in encoded]}
    mark |= {key: value for key, value in settings.items() if key not in ("anchors", "budget")}  # texts are the same
    folder, first_process = None if out is None else Path(out), launched()[0] == 0
    most = budget or (len(anchors) + 3 * reweight) * len(encoded) * samples
    if folder is not None:
        check_space(folder, PAGES + 2 * most * (1 + merged) * (PER_TEXT + max_new_tokens * PER_TOKEN))
    with alone(folder if first_process else None):
        store = Store(folder, mark, resume, overwrite, writes=first_process)
        texts = [in_words(prompt.asked) for prompt in encoded]
        asked = Asked(encoded, texts, rewards, samples, max_new_tokens, mode, reweight)
        lab = SweepLab(pair, Compute(device, compute_dtype, Batches(batch_size)), curve, seed, progress, asked, store)
        curves = Curves(lab, weights, by)

        if scored is not None:
            lab.take(scored)
            anchors = sorted({answer.lam for answer in store.answers if answer.mode == lab.kind})
            grid = sorted({*grid, *anchors})
        else:
            with engines.engine(engine, pair, lambda: lab.exact, encoded, max_new_tokens, compute_dtype) as lab.engine:
                lab.sample_rivals()
                lab.sample(lab.kind, anchors)
                begun_with = anchors
                while (len(anchors) + 1) * len(encoded) * samples <= most:
                    wanted = curves.next_anchor(grid) if reweight else curves.next_point(anchors, begun_with)
                    if wanted is None:
                        break
                    anchors, grid = sorted([*anchors, wanted]), sorted({*grid, wanted})
                    lab.sample(lab.kind, [wanted])
        settled = curves.settled(grid if reweight else anchors, reweight)  # the last that exact DeRa is needed for
        if merged and scored is None and mode != "merged":
            lab.let_go()
            lab.sample("merged", [lam for lam in anchors if lam not in pair.ends()])
        result = curves.result(settled, settings | {"anchors": anchors})
        result.judges = [spent for reward in rewards if (spent := _spent(reward))]
        lam = result.best["lambda"]
        if pair.models == 1 and (beta := beta if beta is not None else recorded_beta(pair)) is not None:
            result.best |= {"beta": beta, "equivalent_beta": beta / lam if lam else None}
        if check and result.chosen and lam not in pair.ends():
            few = encoded[:16]
            lab.tell("checking the merge", 0, 1)
            lab.let_go()
            row = compare(
                pair, [lam], few, path=curve, max_new_tokens=max_new_tokens, seed=seed, device=device,
                batch_size=batch_size, compute_dtype=compute_dtype,
            ).at(lam)  # fmt: skip
            result.faithful = {key: row[key] for key in ("kl", "kl_ci", "tv", "top1", "captured", "verdict", "why")}
        return result


def _spent(reward: Reward) -> dict[str, Any] | None:
    """What a reward took, in all processes together."""
    if reward.spent is None:
        return None
    parts = gathered([reward.spent()])
    return {"name": reward.name} | {key: sum(part[key] for part in parts) for key in parts[0]}


def recorded_beta(pair: Pair) -> float | None:
    """The KL coefficient that ALIGNED's directory records as JSON (`beta` of a training config), or None.

    TRL pickles its arguments (`training_args.bin`), and those are not opened.
    """
    for name in ("training_args.json", "training_config.json", "dpo_config.json", "trainer_config.json"):
        file = pair.aligned.source.folder / name
        if (
            file.is_file()
            and isinstance(config := load_json(file), dict)
            and isinstance(config.get("beta"), int | float)
        ):
            return float(config["beta"]) or None
    return None
