"""Learn a path θ(λ) that follows exact DeRa more closely than the straight line; `merging/path.py` has its form.

Texts are sampled from exact DeRa at λ all over the range. One model whose λ differs from row to row of the batch, the
tree of `decoding/rows.py` with a `Bent` on each linear layer that Δ changes, is then trained on KL(exact‖path) over the
whole range at once, starting from the straight line. One curve serves all λ, and what is learned beyond λ = 1, where
the error is large, helps below, where it is ten times smaller.

A few hundred texts suffice if every step has the right length, but the inputs of a layer vary a thousand times more in
some directions than in others. So the curve's right factor is learned in coordinates in which they vary less unevenly,
the left one in units of what Δ itself does (`layers.measure`). Coordinates in which inputs vary equally in all
directions would go too far: where they hardly vary, mostly noise would be learned.

A share of the prompts is held out; of the line and the states on the way, the one that does best on them is kept.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import set_seed

from ..decoding.exact import DeraForCausalLM
from ..decoding.rows import in_rows
from ..errors import DeraError
from ..files.room import check_space
from ..measuring.ledger import Ledger
from ..measuring.precision import full_float32, in_bytes
from ..measuring.traces import Heads
from ..merging.path import Curve
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..progress import Progress, unheard
from ..texts import prompts as prompt_files
from ..texts.batches import Batches
from ..texts.generate import quantised
from .layers import bend, bendable, learned, measure
from .lessons import PROMPT_TOKENS, as_array, kept, own_prompts, sampled_lessons, some_of
from .training import Teacher, Trainer
from .ways import HELD_OUT, LoadIn, Size, keep_gradients, recompute, way

Kind = Literal["curve", "gains"]
MARGIN = 0.1  # no texts are sampled at λ nearer than this to 0 or 1, where every path is exact


@full_float32()
def calibrate(
    pair: Pair,
    lams: Sequence[float],
    prompts: Sequence[str | dict[str, Any]] | None = None,
    *,
    kind: Kind = "curve",
    rank: int = 16,
    texts: int = 256,
    max_new_tokens: int = 48,
    passes: int = 3,
    learning_rate: float = 0.02,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    load_in: LoadIn = None,
    max_memory: int | str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Curve:
    """Learn a path through the two models that follows exact DeRa, over the range of `lams` at once.

    Args:
        pair: the two models.
        lams: the path is learned for λ from the smallest to the largest of these, both at least 0.
        prompts: what to learn on; default: prompts that the reference writes itself (a chat model continues an open
            user's turn). What is too long is left out.
        kind: `"curve"`: a gain and a low-rank curve for each layer; `"gains"`: the gains alone.
        rank: of the curve.
        texts: how many to sample from exact DeRa, in all.
        max_new_tokens: their length, in tokens.
        passes: how often to go over the texts, 1 or more.
        learning_rate: Adam's, at its peak, relative to the size that each parameter is expected to have.
        batch_size: texts to sample at a time, and in a step of training; the learning rate grows with the root of it.
            Default: 48 and about 128 tokens on a CPU; elsewhere what fits, and 800 steps where there are many texts.
        seed: of everything random.
        device: where the models run.
        compute_dtype: in what they run; `"auto"` is float32, or bfloat16 where only that fits in free memory.
        load_in: hold the base of an adapter pair in 4 bits (bitsandbytes); what is learned is then to follow exact
            DeRa of the quantised base, and is for the pair as it is.
        max_memory: bytes that may be taken, or a text such as `"8GB"`; default: what is free. Where keeping all
            activations would take more, they are checkpointed: the same gradients, in about 1.3 times the time.
        out: a file to write the path to; what is worked out on the way is kept in `<out>.unfinished` until then.
        resume: go on with what an interrupted call with the same arguments left there.
        overwrite: throw away what an earlier call left there.
        progress: called as work goes on.

    Returns:
        The path; `recipe["held_out"]` says what it does to texts of prompts that it was not trained on, and that chose
        which state is kept: mean kl of the straight line and of the path, in nats per token, on each side of λ = 1.

    Raises:
        DeraError: the pair has no weight-space form, there is nothing to learn, prompts are unusable, another run is at
            work on `out`, or an earlier one left something there; or it takes more memory than there is.
    """
    pair.only_pair("a path is learned")
    lams = pair.known(lams)
    low, high = min(lams), max(lams)
    if low < 0:
        raise DeraError(f"λ={low:g}: paths are learned for λ from 0 on; below 0 the straight line is all there is")
    sides = (max(low, MARGIN), min(high, 1 - MARGIN)), (max(low, 1 + MARGIN), high)
    spans = [(start, stop) for start, stop in sides if start <= stop]
    if not spans:
        raise DeraError(f"λ from {low:g} to {high:g} leaves nothing to learn: at 0 and 1 every path is exact")
    if passes < 1:
        raise DeraError(f"passes={passes}: nothing would be learned; give 1 or more")
    if texts < 16:
        raise DeraError(f"--texts {texts} are too few to learn from and to check on; give 16 or more")
    tell = progress or unheard
    set_seed(seed)

    names, limit = bendable(pair), in_bytes(max_memory)
    if load_in and not pair.shared_base:
        raise DeraError("--load-in is for an adapter and its base: two checkpoints that are quantised differ by their "
                        "rounding more than by what is to be learned")  # fmt: skip
    if len({side.vocabulary_rows for side in pair.sides}) > 1:
        raise DeraError("the two vocabularies are padded differently; paths are learned for pairs of one size only")
    length, tokenizer = pair.context_length, pair.tokenizer
    given = None if prompts is None else prompt_files.fitting(prompts, tokenizer, max_new_tokens, length)
    how = {
        "kind": kind, "rank": rank if kind == "curve" else None, "texts": texts, "max_new_tokens": max_new_tokens,
        "passes": passes, "learning_rate": learning_rate, "seed": seed,
        "batch_size": batch_size, "load_in": load_in,
    }  # fmt: skip
    place = None if out is None else Path(f"{os.fspath(out)}.unfinished")
    if resume and place is not None and Path(out).is_file() and not place.is_dir():
        done = Curve.load(out)
        same = {key: done.recipe.get(key) for key in how} == how
        if not same or (done.fingerprint, done.span) != (fingerprint(pair), (low, high)):
            raise DeraError(f"{out} is the path of another call; --overwrite replaces it, or give another --output")
        return done
    longest = max_new_tokens + max((len(prompt.ids) for prompt in given or ()), default=PROMPT_TOKENS)
    bent = rank if kind == "curve" else 0
    size = Size.of(pair, names, bent, texts, longest, max_new_tokens, passes, batch_size, device)
    taken = way(size, compute_dtype, device, limit, load_in)
    compute = str(taken.dtype).removeprefix("torch.")
    mark = how | {
        "pair": fingerprint(pair), "lams": [low, high], "compute": compute,
        "prompts": None if given is None else [prompt.ids for prompt in given],
    }  # fmt: skip
    loading = {"quantization_config": quantised(load_in)} if load_in else {}
    exact = DeraForCausalLM.from_pair(pair, dtype=taken.dtype, device=device, **loading)
    keep_gradients(exact)
    student = exact.rows or in_rows(exact.ref, exact.ref, exact.aligned)
    if student is None:
        raise DeraError("this pair cannot have a λ for each row of a batch (experts, say), so that no path is learned")

    if place is not None:
        # Of a text, both models' states; of the layers, what is learned with its two moments and the best so far.
        check_space(place, 4 * (2 * texts * longest * size.hidden + 6 * size.learned))
    batches = Batches(batch_size, taken.room)
    with Ledger(place, mark, resume=resume, overwrite=overwrite) as ledger:
        entries = given
        if entries is None:

            def write() -> dict[str, np.ndarray]:
                return {"prompts": as_array(own_prompts(pair, exact.ref, math.ceil(texts / len(spans)), tell, batches))}

            written = json.loads(kept(ledger, "prompts", exact.ref.device, write)["prompts"].tobytes())
            entries = prompt_files.fitting(prompt_files.encode(written, tokenizer), tokenizer, max_new_tokens, length)
        ids = [prompt.ids for prompt in entries]
        dice = random.Random(seed)
        # Every prompt serves both sides of λ = 1, so that one that is held out is held out for both.
        tasks = [(number // len(spans) % len(ids), spans[number % len(spans)]) for number in range(texts)]
        used = sorted({prompt for prompt, _ in tasks})
        if len(used) < 2:
            raise DeraError(f"{len(used)} prompts are too few to hold one out; give more")
        unseen = set(dice.sample(used, max(1, round(HELD_OUT * len(used)))))
        drawn = [dice.uniform(*span) for _, span in tasks]
        lessons = sampled_lessons(
            pair, exact, ids, [prompt for prompt, _ in tasks], drawn, unseen, max_new_tokens, tell, ledger,
            batches,
        )
        order = [lesson for lesson in lessons if lesson.text.prompt not in unseen]
        dice.shuffle(order)
        held_out = [lesson for lesson in lessons if lesson.text.prompt in unseen]
        for model in (exact, student):
            model.requires_grad_(False)
        heads: Heads = [] if exact.ref.dtype.itemsize == 2 else None  # of 16 bits, float32 copies; mostly all have one
        teacher = Teacher.of(exact, [*order, *held_out], heads)
        layers = bend(student, names, bent, device)
        if kind == "curve":
            tell("measuring the layers", 0, 1)
            measure(student, layers, some_of(order, dice))
            tell("measuring the layers", 1, 1)
        if taken.recomputed:
            recompute(student)
        trainer = Trainer(student, layers, teacher, len(order), learning_rate, batches, heads, taken.together)
        trainer.run(passes, dice, tell, ledger)
        figures = trainer.keep_best()
        recipe = {
            "ref": pair.ref.source.name, "aligned": pair.aligned.source.name, **how,
            "prompts": "written by the reference" if prompts is None else len(ids), "compute_dtype": compute, **figures,
        }  # fmt: skip
        curve = Curve((low, high), fingerprint(pair), learned(pair, layers), recipe)
        if out is not None:
            curve.save(out)
    ledger.close()
    return curve
