"""Exact decoding-time realignment (DeRa) as one transformers model.

    h_λ(x, y<t) = (1-λ)·h_ref(x, y<t) + λ·h_aligned(x, y<t)            Liu et al., ICML 2024

`DeraForCausalLM.forward` runs both models on the same tokens and mixes their logits in float32; everything else
(sampling, beams, padding, streaming, stopping) is transformers' own `generate`, which sees one model with one cache.
The two models of a LoRA pair are two rows of one batch over one set of weights (see `rows.py`): one forward pass.
λ travels with the call, as a tensor of one value per sequence: nothing is set on the object while it decodes, so calls
and threads cannot see each other's λ. Exact decoding's caches do not depend on λ: a conversation may go on with another.

`DialForCausalLM` is the other thing that one set of weights with an adapter can be: θ_ref + λΔ, with a λ for each row.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import DeraConfig
from .errors import DeraError
from .pair import Source
from .plausibility import PlausibilityMask
from .rows import Strength
from .speculation import MergedDraft, Speculation

Lam = float | Sequence[float] | torch.Tensor


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
        self.depth = len(ref.layers)

    def both(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys of the reference and the aligned model at a layer, then values; each (batch, heads, tokens, head size)."""
        ref, aligned = self.ref.layers[layer], self.aligned.layers[layer]
        return ref.keys, aligned.keys, ref.values, aligned.values


class RowsCache(Cache):
    """The cache of one model whose batch is every sequence twice: first all as the reference, then all as the aligned."""

    is_compileable = False

    def __init__(self, inner: Cache) -> None:
        super().__init__(layers=inner.layers)
        self.inner = inner  # what the model gets: masks depend on the kind of cache
        self.depth = len(inner.layers)

    def both(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `PairCache.both`."""
        return *self.layers[layer].keys.chunk(2), *self.layers[layer].values.chunk(2)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(self._twice(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(self._twice(indices))

    def _twice(self, rows: torch.Tensor) -> torch.Tensor:
        batch = next(len(layer.keys) for layer in self.layers if getattr(layer, "keys", None) is not None) // 2
        return torch.cat([rows, rows + batch])


class _LambdaModel(PreTrainedModel, GenerationMixin):
    """What the two kinds of model have in common: λ as an argument of `generate` and `forward`."""

    config_class = DeraConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, like: PreTrainedModel, lam: float, vocab_size: int) -> None:
        text_config = copy.deepcopy(like.config)
        text_config.vocab_size = vocab_size
        super().__init__(DeraConfig(text_config, dtype=like.dtype, attn_implementation=like.config._attn_implementation))
        self.all_tied_weights_keys: dict[str, str] = {}
        self.generation_config = copy.deepcopy(like.generation_config)
        self.set_lam(lam)

    def set_lam(self, lam: float) -> None:
        """Set the default λ, used by calls that bring none."""
        lam = float(lam)
        if not math.isfinite(lam):
            raise ValueError(f"λ must be finite, not {lam}")
        self.config.lam = lam

    @property
    def lam(self) -> float:
        """The default λ."""
        return self.config.lam

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, lam: Lam | None = None, **kwargs: Any) -> Any:
        """transformers' `generate` at λ: all of its arguments, and `lam`, one λ or one per sequence of the batch."""
        if kwargs.get("inputs_embeds") is not None:
            raise DeraError("λ models take tokens; pass input_ids")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        lam = lam.tolist() if isinstance(lam, torch.Tensor) else lam
        lams = self._lams(lam, 1 if ids is None else len(ids)).to(self.device)
        return super().generate(inputs, *args, lam=lams, **kwargs)

    def _lams(self, lam: Lam | None, batch: int) -> torch.Tensor:
        """λ as a float32 tensor of shape (batch,): a tensor, because `generate` repeats tensors for beams and samples."""
        lam = self.lam if lam is None else lam
        # A tensor is not looked at here, at each step (an accelerator would be waited for); `generate` has looked once.
        if not isinstance(lam, torch.Tensor):
            numbers = [float(value) for value in lam] if hasattr(lam, "__iter__") else [float(lam)]
            lam = numbers if hasattr(lam, "__iter__") else numbers[0]
            if not all(map(math.isfinite, numbers)):
                raise ValueError(f"λ must be finite, not {lam}")
        values = torch.as_tensor(lam, dtype=torch.float32)
        if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
            raise ValueError(f"lam has shape {tuple(values.shape)}, expected one λ or {batch}, one per sequence")
        return values.expand(batch)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.guidance_scale not in (None, 1):
            raise DeraError("guidance_scale would call the mixture without its λ; it is not supported")
        return super()._get_logits_processor(generation_config, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps one paged cache for one model and hands on no λ."""
        raise DeraError("generate_batch keeps one cache for one model and would give wrong tokens; use generate")

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: these are several models' weights. Write one checkpoint with `ModelPair.merge`."""
        raise DeraError("this is no single checkpoint; write one with pair.merge(), or keep the two models")


def _output(
    logits: torch.Tensor, past: Cache | None, labels: torch.Tensor | None, return_dict: bool | None
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    loss = None
    if labels is not None:
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
        )
    output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past)
    return output.to_tuple() if return_dict is False else output


class DeraForCausalLM(_LambdaModel):
    """Two causal models that decode as one.

    Args:
        ref: the reference model.
        aligned: the aligned model, over the same token ids. Vocabularies padded differently are mixed on their common rows.
            The two may be on different devices; the mixed logits are on the reference's.
        lam: the default λ: any finite number. 0 is the reference, 1 the aligned model.
        rows: both models over one set of weights, as `ModelPair.exact` makes of an adapter: then one pass serves both.

    Example:
        >>> model = DeraForCausalLM(ref, aligned, lam=0.5)
        >>> model.generate(**inputs)                     # λ = 0.5
        >>> model.generate(**inputs, lam=[0.0, 2.0])     # λ per sequence of the batch

    Raises:
        ValueError: λ is not finite (a tensor given to `forward` is not looked at), or has another length than the batch.
        DeraError: what is asked for would not be exact: another kind of cache, `generate_batch`, guidance, `inputs_embeds`.
    """

    def __init__(
        self, ref: PreTrainedModel, aligned: PreTrainedModel, lam: float = 1.0, rows: PreTrainedModel | None = None
    ) -> None:
        super().__init__(ref, lam, min(model.config.vocab_size for model in (ref, aligned)))
        self.generation_config = copy.deepcopy(aligned.generation_config)
        self.config.architectures = [type(self).__name__]  # what serving engines look for
        self.ref = ref
        self.aligned = aligned
        self.rows = rows
        # An architecture without `position_ids`, say, derives its own.
        models = {"ref": ref, "aligned": aligned, "rows": rows}
        self._arguments = {name: frozenset(inspect.signature(m.forward).parameters) for name, m in models.items() if m}
        self.eval()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: PairCache | RowsCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Lam | None = None,
        plausibility: PlausibilityMask | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Mixed logits, shape (batch, kept tokens, vocabulary), float32.

        Args:
            input_ids: (batch, tokens).
            attention_mask, position_ids, past_key_values, use_cache, logits_to_keep: as for any causal model.
            labels: (batch, tokens); gives `loss`, the mean cross-entropy in nats per token.
            lam: λ, one for all or one per sequence; None takes the default.
            plausibility: the mask of this call, which wants to see the aligned model's logits.
            return_dict: False gives a tuple.
        """
        self._check_cache(past_key_values)
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise DeraError("a mixture has no attentions or hidden states of its own; ask model.ref or model.aligned")
        if past_key_values is None and use_cache:
            past_key_values = self._new_cache(lambda model, times: DynamicCache(config=model.config))

        shared = dict(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        run = self._two_passes if self.rows is None else self._one_pass
        ref, aligned = run(shared, past_key_values)
        logits = mix(ref, aligned, self._lams(lam, len(input_ids)).to(ref.device))
        if plausibility is not None:
            kept = logits_to_keep if isinstance(logits_to_keep, int) else 0  # which not every architecture heeds
            plausibility.watch(aligned[:, -kept:, : logits.shape[-1]].to(logits.device))
        return _output(logits, past_key_values, labels, return_dict)

    def _two_passes(self, shared: dict[str, Any], past: PairCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        def run(name: str) -> torch.Tensor:
            model, theirs = getattr(self, name), getattr(past, name, None)
            here = {key: _to(value, model.device) for key, value in shared.items() if key in self._arguments[name]}
            return model(past_key_values=theirs, **here).logits

        # An accelerator works on while the host goes to the next model, so the one that blocks comes last.
        if self.ref.device.type == "cpu" != self.aligned.device.type:
            aligned = run("aligned")
            return run("ref"), aligned
        return run("ref"), run("aligned")

    def _one_pass(self, shared: dict[str, Any], past: RowsCache | None) -> tuple[torch.Tensor, torch.Tensor]:
        ids = shared["input_ids"]
        twice = {key: _twice(value, len(ids)) for key, value in shared.items() if key in self._arguments["rows"]}
        strength = torch.zeros(2 * len(ids), dtype=self.rows.dtype, device=ids.device)
        strength[len(ids) :] = 1
        inner = None if past is None else past.inner
        with self.rows.dera_strength.of(strength, ids.shape[1]):
            ref, aligned = self.rows(past_key_values=inner, **twice).logits.chunk(2)
        return ref, aligned

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        lam: Lam | None = None,
        speculation: Speculation | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` at λ.

        Args:
            lam: one λ or one per sequence of the batch; None takes the default.
            speculation: how `assistant_model`, a merged model, drafts, and what came of it. The output is the same.
            kwargs: all of `generate`'s arguments. A `PlausibilityMask` among `logits_processor` sees the aligned model.
        """
        masks = [p for p in kwargs.get("logits_processor") or () if isinstance(p, PlausibilityMask)]
        if masks:
            if kwargs.get("logits_to_keep", 1) != 1:
                raise DeraError("PlausibilityMask looks at the last token of a pass; leave logits_to_keep out")
            mine = max(masks, key=lambda mask: mask.alpha).for_one_call()  # the strictest implies the others
            others = [p for p in kwargs["logits_processor"] if not isinstance(p, PlausibilityMask)]
            kwargs |= {"plausibility": mine, "logits_processor": type(kwargs["logits_processor"])([mine, *others])}
        if speculation is not None:
            if kwargs.get("assistant_model") is None:
                raise DeraError("speculation says how a draft is used; pass the draft as assistant_model")
            rows = kwargs["assistant_model"].config.get_text_config().vocab_size
            if rows != self.config.vocab_size:
                raise DeraError(f"the draft has {rows} vocabulary rows, the pair {self.config.vocab_size} in common; decode "
                                "without a draft, or bring one of the same size")  # fmt: skip
            kwargs["speculation"] = speculation
        return super().generate(inputs, *args, lam=lam, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key != "speculation"})

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        past = model_kwargs.get("past_key_values")
        self._check_cache(past)
        if past is not None or generation_config.use_cache is False:
            return

        def make(model: PreTrainedModel, times: int) -> Cache:
            theirs: dict[str, Any] = {}
            model._prepare_cache_for_generation(
                generation_config, theirs, generation_mode, times * batch_size, max_cache_length
            )
            if "past_key_values" not in theirs:
                raise DeraError(f"{type(model).__name__} keeps no cache of keys and values; pass use_cache=False")
            return theirs["past_key_values"]

        model_kwargs["past_key_values"] = self._new_cache(make)

    def _new_cache(self, make: Callable[[PreTrainedModel, int], Cache]) -> PairCache | RowsCache:
        """An empty cache for both models; `make(model, n)` gives one model's, for n times the batch."""
        if self.rows is not None:
            return RowsCache(make(self.rows, 2))
        return PairCache(make(self.ref, 1), make(self.aligned, 1))

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, known: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own, except that assisted decoding, too, reads only what is new of a cached conversation."""
        if known and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - known
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    def _get_candidate_generator(
        self, generation_config: Any, *args: Any, model_kwargs: dict[str, Any], assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        if known := model_kwargs["past_key_values"].get_seq_length():
            model_kwargs["known"] = known
            if kwargs["input_ids"].shape[1] <= known:
                raise DeraError("with a draft, pass the whole conversation as input_ids, not only what is new of it")
        if generation_config.assistant_ensemble_weight is not None:
            raise DeraError("assistant_ensemble_weight samples from a blend with the draft, which is not exact DeRa")
        # A draft goes through the same processors, but the mask, which sees the logits of what both models read.
        processors = kwargs.pop("logits_processor")
        processors = type(processors)(p for p in processors if not isinstance(p, PlausibilityMask))
        if (speculation := model_kwargs.pop("speculation", None)) is not None and assistant_model is not None:
            return MergedDraft(
                assistant_model, speculation, generation_config, processors,
                model_kwargs["past_key_values"], model_kwargs.get("attention_mask"), float(model_kwargs["lam"][0]),
            )  # fmt: skip
        ours = () if isinstance(assistant_model, DialForCausalLM) else ("lam",)  # other draft models know no λ
        theirs = {key: value for key, value in model_kwargs.items() if key not in (*ours, "plausibility")}
        return super()._get_candidate_generator(
            generation_config, *args, logits_processor=processors, model_kwargs=theirs, assistant_model=assistant_model,
            **kwargs,
        )  # fmt: skip

    def _check_cache(self, past: Any) -> None:
        if past is not None and not isinstance(past, RowsCache if self.rows is not None else PairCache):
            raise DeraError(
                f"a {type(past).__name__} holds other keys and values than exact DeRa's of both models; leave "
                "past_key_values out, or pass the cache that an earlier call of this model returned"
            )

    def dial(self) -> DialForCausalLM:
        """θ_ref + λΔ over this mixture's own weights, λ for each row. Raises DeraError where the pair shares no weights."""
        if self.rows is None:
            raise DeraError("only models that share their weights (an adapter and its base) merge with a λ for each row")
        return DialForCausalLM(self.rows, self.lam, self.config.vocab_size)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.ref.get_input_embeddings()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save what this mixture is made of: references to both models, and λ. No weights.

        Args:
            save_directory: gets config.json and generation_config.json. Local models are named relative to it.
            push_to_hub: upload the directory too, as transformers does.
            kwargs: passed on (`repo_id`, `token`, …).

        Raises:
            DeraError: the mixture was made of two model objects, so that nothing says where they come from.
        """
        if self.config.pair is None:
            raise DeraError("only a mixture made by ModelPair.exact() knows where its models come from; save them yourself")
        config = copy.deepcopy(self.config)
        config.text_config._name_or_path = ""  # a path on this machine says nothing to others
        for key, name in config.pair.items():
            if isinstance(name, str) and Path(name).is_dir():
                if push_to_hub:
                    raise DeraError(f"{name} is a local directory, which nobody else could load; push that to the Hub first")
                config.pair[key] = os.path.relpath(Path(name).resolve(), Path(save_directory).resolve())
        config.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.generation_config.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *args: Any, config: DeraConfig | None = None, **kwargs: Any
    ) -> DeraForCausalLM:
        """Load a mixture that `save_pretrained` wrote: a directory or a Hub id.

        Args:
            kwargs: as for `ModelPair.exact`: `dtype`, `device`, `quantization_config`, …; `lam` replaces the saved λ.
        """
        hub = {key: kwargs.pop(key) for key in ("revision", "token", "cache_dir") if key in kwargs}
        if "torch_dtype" in kwargs:  # transformers' older name for it
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        config = config or DeraConfig.from_pretrained(name, **hub)
        trust = bool(kwargs.pop("trust_remote_code", False))
        folder = Source.locate(os.fspath(name), hub.get("revision"), trust_remote_code=trust).folder
        pair = config.open_pair(folder, trust)
        return pair.exact(kwargs.pop("lam", config.lam), **kwargs)


class DialForCausalLM(_LambdaModel):
    """θ_ref + λΔ of a pair over one set of base weights, with a λ for each sequence of the batch.

    One model serves many λ in one forward pass: `generate(**inputs, lam=[0.0, 0.5, 2.0])`. It computes
    W·x + λ·scale·B·A·x where `ModelPair.merged` computes (W + λ·scale·B·A)·x; nothing is rounded to a storage dtype.

    Args:
        rows: from `rows.in_rows`; `ModelPair.dial` makes one.
        lam: the default λ.
        vocab_size: rows of the vocabulary that are given.
    """

    def __init__(self, rows: PreTrainedModel, lam: float = 1.0, vocab_size: int | None = None) -> None:
        super().__init__(rows, lam, vocab_size or rows.config.vocab_size)
        self.rows = rows
        self._arguments = frozenset(inspect.signature(rows.forward).parameters)
        self.eval()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Lam | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of θ_ref + λΔ, (batch, kept tokens, vocabulary), in the model's dtype. Arguments as for any model."""
        strength: Strength = self.rows.dera_strength
        given = dict(attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)
        given = {key: value for key, value in given.items() if key in self._arguments}
        lams = self._lams(lam, len(input_ids)).to(input_ids.device)
        with strength.of(lams, input_ids.shape[1]):
            output = self.rows(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, **given)
        return _output(output.logits[..., : self.config.vocab_size], output.past_key_values, labels, return_dict)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.rows.get_input_embeddings()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(inner, device) for key, inner in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _twice(value: Any, batch: int) -> Any:
    """What belongs to each sequence, for the sequences as reference rows and again as aligned rows."""
    if isinstance(value, dict):
        return {key: _twice(inner, batch) for key, inner in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch:
        return torch.cat([value, value])
    return value


def mix(ref: torch.Tensor, aligned: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """(1-λ)·h_ref + λ·h_aligned in float32.

    Args:
        ref, aligned: logits (batch, tokens, vocabulary), any float dtype; the rows that both have are mixed.
        lam: (batch,).
    """
    rows = min(ref.shape[-1], aligned.shape[-1])
    ref = ref[..., :rows].float()
    aligned = aligned[..., :rows].to(ref.device).float()  # one copy, in the dtype that they came in
    lam = lam[:, None, None]
    # Equal logits stay equal at every λ, infinite ones included (a token that both models mask).
    return torch.where(ref == aligned, ref, (1 - lam) * ref + lam * aligned)


AutoModelForCausalLM.register(DeraConfig, DeraForCausalLM)
