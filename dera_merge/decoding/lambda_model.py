"""What the two kinds of model that take λ with each call have in common."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import DeraError
from ..lambdas import Vector, known, numbers
from ..models import doors
from . import caches, compiled
from .config import DeraConfig
from .hooks import ReferenceHooks, check_generates

# Outputs that bear the name of an argument, but are no state; and caches, which have a way of their own.
_NO_STATE = frozenset({"cache", "past_key_values", "attention_mask", "image_hidden_states"})

Lam = float | Sequence[float] | Sequence[Sequence[float]] | torch.Tensor


class LambdaModel(ReferenceHooks, PreTrainedModel, GenerationMixin):
    """What the two kinds of model have in common: λ as an argument of `generate` and `forward`."""

    config_class = DeraConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, like: PreTrainedModel, lam: float | Sequence[float], vocab_size: int, models: int = 1) -> None:
        doors.check("exact decoding")
        text_config = copy.deepcopy(like.config.get_text_config(decoder=True))
        text_config.vocab_size = vocab_size
        super().__init__(
            DeraConfig(text_config, dtype=like.dtype, attn_implementation=like.config._attn_implementation)
        )
        self.all_tied_weights_keys: dict[str, str] = {}
        self.generation_config = copy.deepcopy(like.generation_config)
        self.models = models  # aligned ones
        self.set_lam(lam)

    def set_lam(self, lam: float | Sequence[float]) -> None:
        """Set the default λ, used by calls that bring none; with several aligned models, a number for each."""
        value = known(lam, self.models)
        if not all(map(math.isfinite, numbers(value))):
            raise ValueError(f"λ must be finite, not {lam}")
        self.config.lam = list(value) if isinstance(value, Vector) else value

    @property
    def lam(self) -> float | list[float]:
        """The default λ."""
        return self.config.lam

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, lam: Lam | None = None, **kwargs: Any) -> Any:
        """transformers' `generate` at λ: all of its arguments, and `lam`, one λ or one per sequence of the batch.

        With several aligned models a λ is a sequence of as many numbers.
        """
        doors.check("exact decoding")
        if kwargs.get("inputs_embeds") is not None:
            raise DeraError("λ models take tokens; pass input_ids")
        check_generates(type(self.asked))
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        lam = lam.tolist() if isinstance(lam, torch.Tensor) else lam
        # In memory of its own, whatever λ came as: a compiled step is for tensors that lie as the first call's did.
        lams = self._lams(lam, 1 if ids is None else len(ids)).to(self.device).contiguous()
        if (cache := caches.given(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))) is not None:
            kwargs[caches.CACHE] = cache
        return super().generate(inputs, *args, lam=lams, **kwargs)

    def _lams(self, lam: Lam | None, batch: int) -> torch.Tensor:
        """λ as a float32 tensor, (batch,), or with several aligned models (batch, models).

        It is a tensor because `generate` repeats tensors for beams and samples.
        """
        lam = self.lam if lam is None else lam
        # A tensor's values are not checked: each step would wait for the accelerator, and `generate` has checked them.
        is_tensor = isinstance(lam, torch.Tensor)
        try:
            given = lam if is_tensor or not hasattr(lam, "__iter__") else list(lam)
            values = torch.as_tensor(given, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"λ {lam!r} is no number, and no list of numbers: {error}") from None
        if not is_tensor and not values.isfinite().all():
            raise ValueError(f"λ must be finite, not {lam}")
        shape = () if self.models == 1 else (self.models,)
        if tuple(values.shape) not in (shape, (batch, *shape)):
            size = "" if self.models == 1 else f", each of {self.models} numbers"
            raise ValueError(f"lam has shape {tuple(values.shape)}, expected one λ or {batch}, one per sequence{size}")
        return values.expand(batch, *shape)

    def _running(self, cache: Cache | None) -> tuple[list[tuple[PreTrainedModel, Cache]], int]:
        """The models that run with a cache, each with its own part of it, and how many rows each has for a sequence."""
        return [] if cache is None else [(self.asked, cache)], 1

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        parts, _ = self._running(model_kwargs.get(caches.CACHE))
        return bool(parts) and compiled.may_compile(parts, model_kwargs, generation_config)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps one paged cache for one model and hands on no λ."""
        raise DeraError("generate_batch keeps one cache for one model and would give wrong tokens; use generate")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: these are several models' weights. Write one checkpoint with `ModelPair.merge`."""
        raise DeraError("this is no single checkpoint; write one with pair.merge(), or keep the two models")


def causal_output(
    logits: torch.Tensor,
    past: Cache | None,
    labels: torch.Tensor | None,
    return_dict: bool | None,
    state: dict[str, Any],
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    """transformers' output, with the mean cross-entropy in nats where there are labels; as a tuple if so asked.

    `state`: what the next pass takes beside a cache, in the architecture's own names.
    """
    loss = None
    if labels is not None:
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
        )
    output = CausalLMOutputWithPast(loss=loss, logits=logits, **{caches.CACHE: past})
    for name, value in state.items():
        output[name] = value
    return output.to_tuple() if return_dict is False else output


class Passes:
    """How a model is called: with the arguments that its forward takes, and its cache by the name that it has there.

    Args:
        model: which.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = caches.arguments_of(model)
        self.takes_more = caches.takes_more(model)

    def run(self, given: dict[str, Any], more: dict[str, Any], cache: Cache | None) -> Any:
        """A forward pass.

        Args:
            given: arguments of any causal model. Those that its forward does not name are left out: an architecture
                without `position_ids`, say, derives its own.
            more: what this architecture's own preparation of inputs adds.
            cache: keys and values, or None.
        """
        inputs = {key: value for key, value in given.items() if key in self.names}
        inputs |= {key: value for key, value in more.items() if key in self.names or self.takes_more}
        if cache is not None:
            inputs[caches.name_among(self.names) or caches.CACHE] = cache
        return self.model(**inputs)

    def state(self, output: Any) -> dict[str, Any]:
        """What of a pass's output the next one takes, but for a `Cache`; xLSTM's is none, but a state."""
        return {
            key: output[key] for key in output
            if key in self.names and output[key] is not None
            and (key not in _NO_STATE or (key == caches.CACHE and not isinstance(output[key], Cache)))
        }  # fmt: skip
