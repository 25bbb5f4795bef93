"""Caches of keys and values: several models' behind one, and what transformers calls a cache.

`generate` sees one cache whose layers are those of all models. What a forward pass calls that argument is asked for
in this module alone: `cache` since transformers 5.24, `past_key_values` before.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Collection
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import DeraError

_NAMES = ("cache", "past_key_values", "cache_params")
_OF_OUTPUTS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
# What the installed transformers calls a cache among the arguments of `generate` and in outputs.
CACHE = next((name for name in _NAMES if name in _OF_OUTPUTS), _NAMES[0])  # `doors.check` reports any third name


class PairCache(Cache):
    """The key-value caches of the reference and the aligned model, or models, behind one `Cache`.

    Its layers are those of the caches themselves, so that whatever `generate` does to it (reorder for beams, crop
    after speculation, repeat, reset) reaches all.
    """

    is_compileable = False  # else `generate` would make masks of one model's config, and for too few rows

    def __init__(self, *caches: Cache) -> None:
        super().__init__(layers=[layer for cache in caches for layer in layers_of(cache)])
        self.caches = caches
        self.depth = len(layers_of(caches[0]))

    def sides(self, layer: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Keys, and values, of the reference and each aligned model at a layer.

        Each is (batch, heads, tokens, head size).
        """
        layers = [cache.layers[layer] for cache in self.caches]
        return tuple(side.keys for side in layers), tuple(side.values for side in layers)


class RowsCache(Cache):
    """The cache of one model whose batch is every sequence once for each side, all as the reference first."""

    is_compileable = False

    def __init__(self, inner: Cache, sides: int) -> None:
        super().__init__(layers=layers_of(inner))
        self.inner = inner  # what the model gets: masks depend on the kind of cache
        self.depth = len(layers_of(inner))
        self.count = sides

    def sides(self, layer: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """As `PairCache.sides`."""
        return self.layers[layer].keys.chunk(self.count), self.layers[layer].values.chunk(self.count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(self._of_all_sides(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(self._of_all_sides(indices))

    def _of_all_sides(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the reference's part of the batch, and the same rows of each aligned model's."""
        total = next(len(layer.keys) for layer in self.layers if getattr(layer, "keys", None) is not None)
        return torch.cat([rows + number * total // self.count for number in range(self.count)])


def layers_of(cache: Cache) -> list[Any]:
    """The layers of a cache, those of a cache of two among them: BLT has one more for its patches."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return cache.layers


def arguments_of(model: torch.nn.Module | type[torch.nn.Module]) -> frozenset[str]:
    """The names of the arguments of a model's forward, or of a class's."""
    return frozenset(inspect.signature(model.forward).parameters)


def takes_more(model: torch.nn.Module) -> bool:
    """Whether a model's forward hands on arguments that it does not name."""
    kinds = (argument.kind for argument in inspect.signature(model.forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def name_among(arguments: Collection[str]) -> str | None:
    """What a forward with these arguments calls its cache; None if it takes none (some recurrent models)."""
    return next((name for name in _NAMES if name in arguments), None)


def given(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache that a user passed under its newer or its older name.

    Raises:
        ValueError: there are two.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


def has_fixed_size(settings: GenerationConfig) -> bool:
    """Whether the kind of cache that a call asks for has room for a number of tokens, and no more."""
    return settings.cache_implementation not in (None, "dynamic", "offloaded", "paged", "quantized")


def empty(
    model: PreTrainedModel, settings: GenerationConfig | None = None, most_tokens: int | None = None
) -> Cache | None:
    """A new cache for a model.

    Args:
        model: whose layers it is for.
        settings: its `cache_implementation` says which kind (transformers' names); None gives one that grows.
        most_tokens: how many tokens a cache of fixed size has room for.

    Returns:
        None where the model takes no cache from outside: openai-gpt and XLM read every token in each pass, RWKV and
        XLNet hand on a state of their own.

    Raises:
        DeraError: there is no such kind for a mixture.
    """
    config = model.config.get_text_config(decoder=True)
    if name_among(arguments_of(model)) is None or not model._supports_default_dynamic_cache():
        return None
    kind = settings.cache_implementation if settings is not None else None
    if kind in (None, "dynamic"):
        return DynamicCache(config=config)
    if kind == "offloaded":
        return DynamicCache(config=config, offloading=True)
    if kind == "paged":
        raise DeraError("a paged cache is one model's; leave cache_implementation out, or take 'dynamic' or 'static'")
    if kind == "quantized":
        options = copy.deepcopy(settings.cache_config or {})  # a call must not use up the next one's
        return QuantizedCache(**{"backend": "quanto", "config": config, **options})
    # `generate` has checked the name: what is left are transformers' names for caches of fixed size.
    return StaticCache(config=config, max_cache_len=most_tokens or 0, offloading="offloaded" in kind)
