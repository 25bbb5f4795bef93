"""A decoding step of fixed shapes, so that transformers' `generate` can compile it as it does its own models'.

With `cache_implementation="static"` on an accelerator, `generate` runs every pass but the first through
`torch.compile`. One graph serves all steps, λ, texts and calls if whatever differs between them is a tensor of one
shape: λ is one; so are the masks, which are made here, outside of the graph, for each model from its own config and
for the rows that it gets. What is compiled, and how, is transformers' own switch: `compile_config`, `disable_compile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import create_masks_for_generate

from . import caches
from .hooks import Sides, repeated

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache

# What some architectures make masks from, beside the mask of padding.
_SEEN = ("position_ids", "block_sequence_ids", "token_type_ids", "mm_token_type_ids")


def with_masks(
    inputs: dict[str, Any], parts: Sequence[tuple[PreTrainedModel, Cache]], copies: int, first: bool
) -> dict[str, Any]:
    """The inputs of a pass, with masks of the caches' size where these are fixed.

    Args:
        inputs: as `prepare_inputs_for_generation` made them; the mask is of padding, (batch, tokens), or None.
        parts: each model that runs, and its own cache.
        copies: rows for each sequence.
        first: whether this is the first pass.

    Returns:
        `inputs` as they are where a cache grows. Else `attention_mask` has the mask of each model: (rows, 1, tokens,
        size), or a dict of them by type of layer, or None where the model needs none.
    """
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    if not all(cache.is_compileable and not all(cache.is_linear) for _, cache in parts):
        return inputs
    if mask is not None and mask.ndim != 2:
        return inputs
    seen = {key: repeated(key, inputs.get(key), len(ids), copies) for key in ("attention_mask", *_SEEN)}
    masks = []
    for model, cache in parts:
        make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        shape = torch.empty((len(ids) * copies, ids.shape[1], 0), dtype=model.dtype, device=ids.device)
        made = make(
            config=model.config, inputs_embeds=shape, is_first_iteration=first, **{caches.CACHE: cache}, **seen
        )
        masks.append(_contiguous(made))
    return inputs | {"attention_mask": Sides(masks)}


def _contiguous(mask: Any) -> Any:
    if isinstance(mask, dict):
        return {kind: _contiguous(inner) for kind, inner in mask.items()}
    return mask.contiguous() if isinstance(mask, torch.Tensor) else mask


def may_compile(
    parts: Sequence[tuple[PreTrainedModel, Cache]], model_kwargs: dict[str, Any], settings: GenerationConfig
) -> bool:
    """Whether transformers would compile a step of every model that runs, given its own cache."""
    return all(
        "llama4" not in model.config.model_type  # which transformers itself leaves alone
        and model._valid_auto_compile_criteria({**model_kwargs, caches.CACHE: cache}, settings)
        for model, cache in parts
    )
