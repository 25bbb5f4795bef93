"""Texts that go on from the same context: a model reads that once, and each of them from its keys and values.

The answers of an item of multiple choice differ behind a context that is mostly longer than they are, so most of the
reading is spared. The sums are those of a reading one by one, in another order: states differ by roundings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicLayer

from ..decoding import caches
from ..texts.batches import Batches
from .traces import Text, Trace, decoder_of, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORTEST = 16  # tokens of a context that is worth a pass of its own
HELD = 4  # batches of texts, as they are read, whose keys and values a CPU holds


@torch.no_grad()
def trace_at_once(model: PreTrainedModel, texts: list[Text], batches: Batches | None = None) -> Trace:
    """`trace_of` these texts, but that a context which several have is read once.

    So it is where a model keeps keys and values of all tokens, and makes of the longest such text, to rounding, the
    states that it makes of it alone; else all texts are read one by one.

    Args:
        texts: that show no images.
        batches: how many texts to read at a time; default: what fits.

    Raises:
        DeraError: as for `trace_of`.
    """
    batches, groups = batches or Batches(), _shared(texts)
    name = caches.name_among(caches.arguments_of(decoder_of(model)[1]))
    if not groups or name is None or not _keeps_all(caches.empty(model)):
        return trace_of(model, texts, batches=batches)
    witness = groups[0][0]
    together = {index for group in groups for index in group}
    alone = [index for index in range(len(texts)) if index not in together or index == witness]
    trace = trace_of(model, [texts[index] for index in alone], batches=batches)
    found = dict(zip(alone, trace.hidden.split([len(texts[index].completion) for index in alone]), strict=True))
    if trace.one_by_one or not _reads_so(model, name, [texts[index] for index in groups[0][:2]], found[witness]):
        return trace_of(model, texts, batches=batches)

    def read(numbers: list[int]) -> list[torch.Tensor]:
        return _read(model, name, [[texts[index] for index in groups[number]] for number in numbers])

    def count(number: int) -> int:
        return _together(model, texts, groups[number:], batches)

    for numbers, states in batches.portions("reading", range(len(groups)), count, read):
        found |= dict(zip((index for number in numbers for index in groups[number]), states, strict=True))
    return replace(trace, hidden=torch.cat([found[index] for index in range(len(texts))]))


def _shared(texts: Sequence[Text]) -> list[list[int]]:
    """Texts of one context, for each context that several have; contexts of one length follow each other."""
    by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        by_context[tuple(text.ids[: text.start])].append(index)
    groups = [group for context, group in by_context.items() if len(group) > 1 and len(context) >= SHORTEST]
    groups = [sorted(group, key=lambda index: -len(texts[index].ids)) for group in groups]
    return sorted(groups, key=lambda group: (-texts[group[0]].start, -len(texts[group[0]].ids)))


def _keeps_all(cache: Cache | None) -> bool:
    """Whether a cache is keys and values of tokens, layer by layer."""
    layers = [] if cache is None else caches.layers_of(cache)
    return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


def _together(
    model: PreTrainedModel, texts: Sequence[Text], groups: Sequence[list[int]], batches: Batches
) -> int:  # fmt: skip
    """How many groups, from the first on, to read at a time: their contexts have one length, so none is padded."""
    first, rows = texts[groups[0][0]], 0
    room = (HELD if model.device.type == "cpu" else 1) * batches.read(model, len(first.ids))
    for number, group in enumerate(groups):
        rows += len(group)
        if number and (texts[group[0]].start != first.start or rows > room):
            return number
    return len(groups)


def _read(model: PreTrainedModel, name: str, groups: Sequence[Sequence[Text]]) -> list[torch.Tensor]:
    """The states of each text that predict its completion, of one group after another.

    Endings are padded on the right, where a causal model does not see it; there is no other padding, so no mask.

    Args:
        name: what the decoder calls its cache.
    """
    _, decoder = decoder_of(model)
    cache = caches.empty(model)
    contexts = torch.tensor([group[0].ids[: group[0].start] for group in groups], device=model.device)
    last = decoder(input_ids=contexts, use_cache=True, **{name: cache})[0][:, -1:]
    place = [number for number, group in enumerate(groups) for _ in group]
    endings = [text.completion[:-1] for group in groups for text in group]
    last = last[place]
    width = max(map(len, endings))
    if not width:
        return list(last.to(model.device))
    cache.batch_select_indices(torch.tensor(place, device=model.device))
    ids = torch.tensor([ending + [0] * (width - len(ending)) for ending in endings], device=model.device)
    behind = decoder(input_ids=ids, use_cache=True, **{name: cache})[0]
    states = torch.cat([last, behind], 1).to(model.device)
    return [row[: 1 + len(ending)] for row, ending in zip(states, endings, strict=True)]


def _reads_so(model: PreTrainedModel, name: str, texts: Sequence[Text], expected: torch.Tensor) -> bool:
    """Whether texts of one context can be read so, and the first one's states are, but for roundings, these."""
    try:
        states, *_ = _read(model, name, [texts])
    except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):  # its decoder is called otherwise
        return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    atol = tolerance * float(expected.abs().max())
    return states.shape == expected.shape and torch.allclose(states, expected, rtol=tolerance, atol=atol)
