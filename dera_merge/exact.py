"""Exact decoding-time realignment (DeRa) as one transformers model.

    h_λ(x, y<t) = (1-λ)·h_ref(x, y<t) + λ·h_aligned(x, y<t)            Liu et al., ICML 2024

`DeraForCausalLM.forward` runs both models on the same tokens and mixes their logits in float32; everything else
(sampling, beams, padding, streaming, stopping) is transformers' own `generate`, which sees one model with one cache.
λ travels with the call, as a tensor of one value per sequence: nothing is set on the object while it decodes, so calls
and threads cannot see each other's λ. Key-value caches do not depend on λ: a conversation may go on with another one.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import DeraError

Lam = float | Sequence[float] | torch.Tensor


class DeraConfig(PreTrainedConfig):
    """Config of the mixture: the default λ, and `text_config`, a copy of the reference's config for its sizes."""

    model_type = "dera"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(self, text_config: PreTrainedConfig | None = None, lam: float = 1.0, **kwargs: Any) -> None:
        self.text_config = text_config or PreTrainedConfig()
        self.lam = lam
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, getattr(text_config, key, None))
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that both models have."""
        return self.text_config.vocab_size


class PairCache(Cache):
    """The key-value caches of both models behind one `Cache`.

    Its layers are those of the two caches themselves, so that whatever `generate` does to it (reorder for beams, crop
    after speculation, repeat, reset) reaches both.
    """

    is_compileable = False  # else `generate` would build masks from the mixture's config instead of each model's

    def __init__(self, ref: Cache, aligned: Cache) -> None:
        super().__init__(layers=[*ref.layers, *aligned.layers])
        self.ref = ref
        self.aligned = aligned


class DeraForCausalLM(PreTrainedModel, GenerationMixin):
    """Two causal models that decode as one.

    Args:
        ref: the reference model.
        aligned: the aligned model, over the same token ids. Vocabularies padded differently are mixed on their common rows.
        lam: the default λ: any finite number. 0 is the reference, 1 the aligned model.

    Example:
        >>> model = DeraForCausalLM(ref, aligned, lam=0.5)
        >>> model.generate(**inputs)                     # λ = 0.5
        >>> model.generate(**inputs, lam=[0.0, 2.0])     # λ per sequence of the batch

    Raises:
        ValueError: λ is not finite, or a list of λ has another length than the batch.
        DeraError: what is asked for would not be exact: another model's cache, `generate_batch`, guidance, `inputs_embeds`.
    """

    config_class = DeraConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, ref: PreTrainedModel, aligned: PreTrainedModel, lam: float = 1.0) -> None:
        text_config = copy.deepcopy(ref.config)
        text_config.vocab_size = min(model.config.vocab_size for model in (ref, aligned))
        super().__init__(DeraConfig(text_config, dtype=ref.dtype, attn_implementation=ref.config._attn_implementation))
        self.all_tied_weights_keys: dict[str, str] = {}
        self.ref = ref
        self.aligned = aligned
        self.generation_config = copy.deepcopy(aligned.generation_config)
        # An architecture without `position_ids`, say, derives its own.
        self._arguments = [frozenset(inspect.signature(model.forward).parameters) for model in (ref, aligned)]
        self.set_lam(lam)
        self.eval()

    def set_lam(self, lam: float) -> None:
        """Set the default λ, used by calls that bring none."""
        self.config.lam = _finite(lam)

    @property
    def lam(self) -> float:
        """The default λ."""
        return self.config.lam

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: PairCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Lam | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Mixed logits, shape (batch, kept tokens, vocabulary), float32.

        Args:
            input_ids: (batch, tokens).
            attention_mask, position_ids, past_key_values, use_cache, logits_to_keep: as for any causal model.
            labels: (batch, tokens); gives `loss`, the mean cross-entropy in nats per token.
            lam: λ, one for all or one per sequence; None takes the default.
            return_dict: False gives a tuple.
        """
        _check_cache(past_key_values)
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise DeraError("a mixture has no attentions or hidden states of its own; ask model.ref or model.aligned")
        if past_key_values is None and use_cache:
            past_key_values = PairCache(*(DynamicCache(config=model.config) for model in (self.ref, self.aligned)))

        shared = dict(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        pasts = (past_key_values.ref, past_key_values.aligned) if past_key_values is not None else (None, None)
        ref, aligned = (
            model(past_key_values=past, **{key: value for key, value in shared.items() if key in names}).logits
            for model, past, names in zip((self.ref, self.aligned), pasts, self._arguments, strict=True)
        )
        logits = mix(ref, aligned, self._lams(lam, len(input_ids)).to(ref.device))

        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return output.to_tuple() if return_dict is False else output

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, lam: Lam | None = None, **kwargs: Any) -> Any:
        """transformers' `generate` at λ: all of its arguments, and `lam`, one λ or one per sequence of the batch."""
        if kwargs.get("inputs_embeds") is not None:
            raise DeraError("the two models have embeddings of their own; pass input_ids")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        return super().generate(inputs, *args, lam=self._lams(lam, 1 if ids is None else len(ids)), **kwargs)

    def _lams(self, lam: Lam | None, batch: int) -> torch.Tensor:
        """λ as a float32 tensor of shape (batch,): a tensor, because `generate` repeats tensors for beams and samples."""
        lam = self.lam if lam is None else lam
        values = torch.as_tensor(lam, dtype=torch.float32, device=lam.device if isinstance(lam, torch.Tensor) else None)
        if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
            raise ValueError(f"lam has shape {tuple(values.shape)}, expected one λ or {batch}, one per sequence")
        if not torch.isfinite(values).all():
            raise ValueError(f"λ must be finite, not {lam}")
        return values.expand(batch)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        past = model_kwargs.get("past_key_values")
        _check_cache(past)
        if past is not None or generation_config.use_cache is False:
            return
        caches = []
        for model in (self.ref, self.aligned):
            theirs: dict[str, Any] = {}
            model._prepare_cache_for_generation(generation_config, theirs, *args, **kwargs)
            caches.append(theirs["past_key_values"])
        model_kwargs["past_key_values"] = PairCache(*caches)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.guidance_scale not in (None, 1):
            raise DeraError("guidance_scale would call the mixture without its λ; it is not supported")
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def _get_candidate_generator(
        self, generation_config: Any, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        if generation_config.assistant_ensemble_weight is not None:
            raise DeraError("assistant_ensemble_weight samples from a blend with the draft, which is not exact DeRa")
        theirs = {key: value for key, value in model_kwargs.items() if key != "lam"}  # a draft model knows no λ
        return super()._get_candidate_generator(generation_config, *args, model_kwargs=theirs, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps one paged cache, into which both models would write."""
        raise DeraError("generate_batch keeps one cache for one model and would give wrong tokens; use generate")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a mixture is two models. Save them, or one merged checkpoint with `ModelPair.merge`."""
        raise DeraError("a mixture is no single checkpoint; write one with pair.merge(), or keep the two models")

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.ref.get_input_embeddings()


def _check_cache(past: Any) -> None:
    if past is not None and not isinstance(past, PairCache):
        raise DeraError(
            f"a {type(past).__name__} holds one model's keys and values, exact DeRa needs two; leave past_key_values "
            "out, or pass the cache that an earlier call returned"
        )


def mix(ref: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """(1-λ)·h_ref + λ·h_aligned in float32.

    Args:
        ref, aligned: logits (batch, tokens, vocabulary), any float dtype; the rows that both have are mixed.
        lam: (batch,).
    """
    rows = min(ref.shape[-1], aligned.shape[-1])
    ref = ref[..., :rows].float()
    aligned = aligned[..., :rows].to(device=ref.device, dtype=torch.float32)
    lam = lam[:, None, None]
    # Equal logits stay equal at every λ, infinite ones included (a token that both models mask).
    return torch.where(ref == aligned, ref, (1 - lam) * ref + lam * aligned)


def _finite(lam: float) -> float:
    lam = float(lam)
    if not math.isfinite(lam):
        raise ValueError(f"λ must be finite, not {lam}")
    return lam


AutoConfig.register("dera", DeraConfig)
AutoModelForCausalLM.register(DeraConfig, DeraForCausalLM)
