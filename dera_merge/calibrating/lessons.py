"""Texts to learn a path from, with what both models make of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import DeraError
from ..measuring.ledger import Ledger
from ..measuring.traces import Text
from ..models.pair import Pair
from ..progress import Progress, unheard
from ..texts.batches import Batches
from ..texts.sampling import decode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..decoding.exact import DeraForCausalLM

Arrays = dict[str, np.ndarray]
SAMPLED_TOGETHER = 48  # texts that a CPU decodes in one batch
MEASURED_TOKENS = 2048  # tokens of texts on which inputs of layers are measured
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # sampling without a warper
PROMPT_TOKENS = 32  # of a prompt that the pair writes itself


@dataclass(frozen=True)
class Lesson:
    """A text to learn from, the λ of its sampling, and both models' states that predict it, (tokens, hidden size).

    The states are on the host, in the dtype in which the models compute.
    """

    text: Text
    lam: float
    ref: torch.Tensor
    aligned: torch.Tensor


def some_of(lessons: Sequence[Lesson], dice: random.Random) -> list[Lesson]:
    """Some of the lessons, about `MEASURED_TOKENS` tokens."""
    picked: list[Lesson] = []
    tokens = 0
    for lesson in dice.sample(lessons, len(lessons)):
        if tokens >= MEASURED_TOKENS:
            break
        picked.append(lesson)
        tokens += len(lesson.text.ids)
    return picked


def kept(ledger: Ledger, key: str, device: torch.device, work: Callable[[], dict[str, np.ndarray]]) -> Arrays:
    """The arrays of a step of the ledger, and torch's noise as it was after it: what follows is the same either way."""
    sources = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    if device.type == "cuda":
        sources["cuda"] = (
            lambda: torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device)
        )  # fmt: skip
    arrays = ledger.step(key, lambda: work() | {f"noise-{name}": get().numpy() for name, (get, _) in sources.items()})
    for name, (_, put) in sources.items():
        put(torch.from_numpy(arrays[f"noise-{name}"]))
    return arrays


def as_array(value: Any) -> np.ndarray:
    """A value of JSON as bytes, for a ledger."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def sampled_together(batches: Batches, model: PreTrainedModel, tokens: int, models: int = 1) -> int:
    """How many texts of `tokens` tokens to sample at a time."""
    if batches.size is None and model.device.type == "cpu":
        return SAMPLED_TOGETHER
    return batches.sampled(model, tokens, models)


def own_prompts(
    pair: Pair, ref: PreTrainedModel, count: int, tell: Progress = unheard, batches: Batches | None = None
) -> list[str | dict[str, Any]]:
    """Prompts that the reference writes at temperature 1: user's turns, or beginnings of texts without a chat template.

    Args:
        count: how many to try for; empty ones and repeats are left out.
        batches: how many to write at a time.

    Raises:
        DeraError: fewer than two were written.
    """
    tokenizer = pair.tokenizer
    mark = "\u2063"
    chat = bool(tokenizer.chat_template)
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        opening = tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"]
    else:
        opening = tokenizer("")["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
    written: dict[str, None] = {}
    batches, done = batches or Batches(), 0
    together = sampled_together(batches, ref, len(opening) + PROMPT_TOKENS)

    def work(numbers: list[int]) -> list[list[int]]:
        return decode_batch(ref, tokenizer, [opening] * len(numbers), max_new_tokens=PROMPT_TOKENS, **PLAIN)

    for numbers, rows in batches.portions("sampling", range(count), lambda _: together, work):
        for new in rows:
            if text := tokenizer.decode(new, skip_special_tokens=True).strip():
                written[text] = None
        done += len(numbers)
        tell("writing prompts", done, count)
    if len(written) < 2:
        raise DeraError("the reference writes no prompts of its own; give some with --prompts")
    return [{"messages": [{"role": "user", "content": text}]} if chat else text for text in written]


def sampled_lessons(
    pair: Pair, exact: DeraForCausalLM, prompts: list[list[int]], chosen: list[int], lams: list[float],
    unseen: set[int], max_new_tokens: int, tell: Progress, ledger: Ledger,
    batches: Batches | None = None,
) -> list[Lesson]:  # fmt: skip
    """One text of exact DeRa for each chosen prompt, each at its own λ.

    Both models' states of a prompt come for free, so it is learned from too, from the token on at which prompts begin
    to differ. Of the prompts that are held out (`unseen`) the answer alone counts.

    Args:
        prompts: token ids of each.
        chosen: the prompt of each text, an index of `prompts`.
        lams: λ of each text.
        ledger: keeps each batch.
        batches: how many to sample at a time. The noise is that of a batch, so other sizes give other texts.
    """
    differ = (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    opening = max(1, next(differ, min(map(len, prompts))))
    lessons: list[Lesson] = []
    order = sorted(range(len(chosen)), key=lambda i: len(prompts[chosen[i]]))

    batches = batches or Batches()
    together = sampled_together(batches, exact.ref, len(prompts[chosen[order[-1]]]) + max_new_tokens, len(exact.sides))

    def work(batch: list[int]) -> Arrays:
        rows = [prompts[chosen[i]] for i in batch]
        firsts = [first_of(i) for i in batch]
        with _recording(exact) as states:
            options = {"max_new_tokens": max_new_tokens, "lam": [lams[i] for i in batch], **PLAIN}
            drawn = decode_batch(exact, pair.tokenizer, rows, **options)
        width = max(map(len, rows))
        # Prompts are padded on the left; what predicts a token stands one before it.
        spans = [
            slice(width - len(ids) + first - 1, width + len(new) - 1)
            for ids, new, first in zip(rows, drawn, firsts, strict=True)
        ]
        sides = {
            side: torch.cat([hidden[row, span] for row, span in enumerate(spans)]).float().cpu().numpy()
            for side, hidden in zip(("ref", "aligned"), states(), strict=True)
        }
        return {"new": np.concatenate(drawn), "lengths": np.array(list(map(len, drawn))), **sides}

    def first_of(i: int) -> int:
        return len(prompts[chosen[i]]) if chosen[i] in unseen else opening

    while len(lessons) < len(order):
        start = len(lessons)
        left = order[start:]

        def sampled() -> Arrays:
            return next(batches.portions("sampling", left, lambda _: together, work))[1]  # noqa: B023

        arrays = kept(ledger, f"texts-{start}", exact.ref.device, sampled)
        batch = left[: len(arrays["lengths"])]  # an interrupted run may have taken others
        rows, firsts = [prompts[chosen[i]] for i in batch], [first_of(i) for i in batch]
        drawn = np.split(arrays["new"], np.cumsum(arrays["lengths"])[:-1])
        texts = [
            Text(chosen[i], [*ids, *new.tolist()], first)
            for i, ids, new, first in zip(batch, rows, drawn, firsts, strict=True)
        ]
        sizes = [len(text.completion) for text in texts]
        states = (torch.from_numpy(arrays[side]).to(exact.ref.dtype) for side in ("ref", "aligned"))
        ref, aligned = (side.split(sizes) for side in states)
        lessons += [Lesson(*row) for row in zip(texts, (lams[i] for i in batch), ref, aligned, strict=True)]
        tell("sampling from exact DeRa", len(lessons), len(order))
    return lessons


@contextmanager
def _recording(exact: DeraForCausalLM) -> Iterator[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Keep what both decoders make of every token while they generate, so that the texts need not be read again.

    Gives a function that returns the two models' states (sequences, tokens, hidden size).
    """
    models = [exact.ref, exact.aligned] if exact.rows is None else [exact.rows]
    kept: list[list[torch.Tensor]] = [[] for _ in models]
    hooks = [
        model.base_model.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0]))
        for model, seen in zip(models, kept, strict=True)
    ]

    def states() -> tuple[torch.Tensor, torch.Tensor]:
        joined = [torch.cat(seen, 1) for seen in kept]
        return tuple(joined) if len(joined) == 2 else joined[0].chunk(2)

    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
