"""Sampling with noise that belongs to the prompt, not to the batch.

A prompt's text does not depend on what else is in its batch, and two models that decode with the same noise are
coupled: they part only where their distributions do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ..lambdas import Lam
from .batches import Batches
from .images import Shown, beside
from .noise import GumbelNoise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def decode_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], **kwargs: object
) -> list[list[int]]:
    """New tokens for each row of ids, an end token included, nothing after it; only the settings given here count.

    Args:
        model: any causal model; its end tokens count, its warpers do not.
        tokenizer: for its padding token.
        rows: token ids of any lengths.
        kwargs: passed to `generate`.
    """
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    # `generate` fills what a config leaves open from the checkpoint's own config, whose warpers would change the
    # distribution; so it gets a shallow copy of the model (the same modules) with a bare config.
    model, pad = copy.copy(model), tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, **kwargs)
    new = []
    for row in output[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        new.append(row[: end + 1])
    return new


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    shown: Sequence[Shown] | None = None,
    vocab_size: int | None = None,
    lams: Sequence[Lam] | None = None,
    batches: Batches | None = None,
    progress: Callable[[int], None] | None = None,
    **kwargs: object,
) -> list[list[int]]:
    """One text a prompt at temperature 1, without any warper.

    Args:
        model: any causal model.
        tokenizer: for its padding token.
        prompts: token ids.
        max_new_tokens: length limit, in tokens.
        seed: the same seed gives the same texts, whatever the batches.
        streams: which noise each prompt gets; default: its number.
        shown: what the images of each prompt are; such a prompt is decoded alone.
        vocab_size: as for `GumbelNoise`.
        lams: λ of each prompt, for a model that takes it with each call.
        batches: how many prompts to decode together; default: what fits.
        progress: called with the number of prompts done.
        kwargs: passed to `generate`.

    Returns:
        The new tokens of each prompt, an end token included, nothing after it.
    """
    streams = range(len(prompts)) if streams is None else streams
    shown = [{}] * len(prompts) if shown is None else shown
    order = sorted(range(len(prompts)), key=lambda index: (bool(shown[index]), len(prompts[index])))
    batches = batches or Batches()
    models = len(model.sides) if hasattr(model, "sides") else 1  # a mixture has several
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if "cache_implementation" in kwargs:  # of one size for all batches, so that a step is compiled once
        kwargs = {"max_cache_len": longest, **kwargs}

    def count(index: int) -> int:
        if shown[index]:
            return 1
        plain = sum(1 for entry in shown if not entry)
        return min(batches.sampled(model, longest, models), plain - order.index(index))

    def work(batch: list[int]) -> list[list[int]]:
        at = beside(shown[batch[0]], len(prompts[batch[0]]), model)
        if lams is not None:
            at["lam"] = [lams[index] for index in batch]
        return decode_batch(
            model, tokenizer, [prompts[index] for index in batch], do_sample=False, max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([GumbelNoise([streams[i] for i in batch], seed, vocab_size)]),
            **at, **kwargs,
        )  # fmt: skip

    texts: dict[int, list[int]] = {}
    for batch, new in batches.portions("sampling", order, count, work):
        texts |= dict(zip(batch, new, strict=True))
        if progress:
            progress(len(texts))
    return [texts[index] for index in range(len(prompts))]
