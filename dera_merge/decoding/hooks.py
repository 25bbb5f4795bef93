"""What `generate` asks of a model, asked of the reference: how its class takes arguments, positions and images.

Many architectures answer these hooks in their own way: XLM appends a mask token, openai-gpt reads everything again,
Qwen's vision models have three positions for each token. A mixture that answered by itself would decode from other
inputs than its models are used to.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from ..errors import DeraError
from . import caches

# Arguments of a mixture's passes that none of its models knows.
OURS = ("lam", "plausibility", "speculation", "known")
# How arguments begin that bring images, videos or sounds.
_IMAGES = ("pixel_", "image_", "video_", "input_features", "mm_encoder_outputs")


class Sides(tuple[Any, ...]):
    """One value for each model: the state that XLNet or RWKV hands from pass to pass, or what each sees in images."""


class ReferenceHooks(GenerationMixin):
    """A mixture that puts `generate`'s questions to one of its models."""

    @property
    def asked(self) -> PreTrainedModel:
        """The model that answers."""
        raise NotImplementedError

    @property
    def towers(self) -> tuple[PreTrainedModel, ...]:
        """The models that look at images, each for itself."""
        raise NotImplementedError

    @property
    def _is_stateful(self) -> bool:
        return bool(self.asked._is_stateful)

    def _supports_default_dynamic_cache(self) -> bool:
        return self.asked._supports_default_dynamic_cache()

    def _supports_logits_to_keep(self) -> bool:
        return self.asked._supports_logits_to_keep()

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.asked._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in OURS})

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        if "position_ids" not in caches.arguments_of(self.asked):
            return None
        return self.asked._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Images as each model's own tower sees them, where an architecture looks at them before the first pass."""
        if not sees(model_kwargs):
            return model_kwargs
        prepared = [
            model._maybe_prepare_encoder_kwargs_for_generation(inputs_tensor, at(model_kwargs, model), *args, **kwargs)
            for model in self.towers
        ]
        seen = Sides(own.pop("mm_encoder_outputs", None) for own in prepared)
        return prepared[0] | ({"mm_encoder_outputs": seen} if any(seen) else {})

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        seen = model_kwargs.pop("mm_encoder_outputs", None)
        if seen is not None and expand_size > 1:
            seen = Sides(self.asked._expand_multimodal_outputs(input_ids, own, expand_size=expand_size) for own in seen)
        input_ids, model_kwargs = self.asked._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | ({} if seen is None else {"mm_encoder_outputs": seen})

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        return self.asked._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The inputs of a pass, as the answering model's class makes them."""
        ours = {key: kwargs.pop(key) for key in OURS if key in kwargs}
        name = caches.name_among(caches.arguments_of(self.asked)) or caches.CACHE
        if caches.CACHE in kwargs:
            kwargs[name] = kwargs.pop(caches.CACHE)
        # A state that each model has for itself is prepared for each; all else of the inputs is the same for all.
        states = {key: value for key, value in kwargs.items() if isinstance(value, Sides)}
        count = len(next(iter(states.values()), (None,)))
        prepared = [
            self.asked.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                **kwargs | {key: value[number] for key, value in states.items()},
            )
            for number in range(count)
        ]
        inputs = prepared[0] | {key: Sides(own.get(key) for own in prepared) for key in states if key in prepared[0]}
        if name in inputs:
            inputs[caches.CACHE] = inputs.pop(name)
        return inputs | ours

    def _get_logits_processor(
        self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        """transformers' own, where the one for guidance, which runs the mixture once more, does so at the call's λ."""
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = partial(self, lam=(model_kwargs or {}).get("lam"))
        return processors


def check_generates(kind: type) -> None:
    """Raise DeraError where a class generates in a way of its own, past the hooks that a mixture can answer."""
    # Before 5.24 `generate` called a state by another name than these classes do: tokens differed, or it broke off.
    if caches.CACHE != "cache" and not caches.arguments_of(kind).isdisjoint({"cache", "cache_params", "mems"}):
        raise DeraError(f"exact decoding of {kind.__name__} needs transformers 5.24 or newer; merge it")
    if kind.generate is not GenerationMixin.generate:
        raise DeraError(
            f"{kind.__name__} has a generate of its own, which runs one model and no mixture; merge it, or "
            "call forward for each token"
        )


def sees(inputs: dict[str, Any]) -> bool:
    """Whether there is more than text among the inputs of a pass."""
    return any(value is not None and key.startswith(_IMAGES) for key, value in inputs.items())


def at(inputs: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Inputs with their tensors, those in dicts included, on a model's device."""

    def move(value: Any) -> Any:
        if isinstance(value, dict) and type(value) is dict:
            return {key: move(inner) for key, inner in value.items()}
        return value.to(model.device) if isinstance(value, torch.Tensor) else value

    return {key: move(value) for key, value in inputs.items()}


def repeated(key: str, value: Any, batch: int, sides: int) -> Any:
    """What belongs to each sequence, for the sequences as the rows of each side, one side after another."""
    if isinstance(value, dict):
        return {name: repeated(name, inner, batch, sides) for name, inner in value.items()}
    axis = 1 if key == "position_ids" and isinstance(value, torch.Tensor) and value.ndim == 3 else 0  # of M-RoPE
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[axis] == batch:
        return torch.cat([value] * sides, axis)
    return value
