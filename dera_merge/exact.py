"""Exact decoding-time realignment (DeRa) as one transformers model.

    h_λ(x, y<t) = (1-λ)·h_ref(x, y<t) + λ·h_aligned(x, y<t)            Liu et al., ICML 2024
    h_λ(x, y<t) = h_ref(x, y<t) + Σ λ_k·(h_k - h_ref)(x, y<t)          with several aligned models

`DeraForCausalLM.forward` runs the models on the same tokens and mixes their logits in float32; everything else
(sampling, beams, padding, streaming, stopping) is transformers' own `generate`, which sees one model with one cache.
The two models of a LoRA pair are two rows of one batch over one set of weights (see `rows.py`): one forward pass.
λ travels with the call, as a tensor of one value per sequence: nothing is set on the object while it decodes, so calls
and threads cannot see each other's λ. Exact decoding's caches do not depend on λ: a conversation may go on with another.

`DialForCausalLM` is the other thing that one set of weights with an adapter can be: θ_ref + λΔ, with a λ for each row.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import caches, doors
from .caches import PairCache, RowsCache
from .configuration import DeraConfig
from .errors import DeraError
from .lambdas import Vector, known, numbers
from .pair import Source
from .plausibility import PlausibilityMask
from .rows import Strength
from .speculation import MergedDraft, Speculation

Lam = float | Sequence[float] | Sequence[Sequence[float]] | torch.Tensor


class _LambdaModel(PreTrainedModel, GenerationMixin):
    """What the two kinds of model have in common: λ as an argument of `generate` and `forward`."""

    config_class = DeraConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, like: PreTrainedModel, lam: float | Sequence[float], vocab_size: int, models: int = 1) -> None:
        doors.check("exact decoding")
        text_config = copy.deepcopy(like.config)
        text_config.vocab_size = vocab_size
        super().__init__(DeraConfig(text_config, dtype=like.dtype, attn_implementation=like.config._attn_implementation))
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
        configs = (args[0] if args else kwargs.get("generation_config"), self.generation_config)
        scales = [kwargs.get("guidance_scale"), *(config.guidance_scale for config in configs if config is not None)]
        if next((scale for scale in scales if scale is not None), 1) != 1:
            raise DeraError("guidance_scale would call the mixture without its λ; it is not supported")
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        lam = lam.tolist() if isinstance(lam, torch.Tensor) else lam
        lams = self._lams(lam, 1 if ids is None else len(ids)).to(self.device)
        if (cache := caches.given(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))) is not None:
            kwargs[caches.CACHE] = cache
        return super().generate(inputs, *args, lam=lams, **kwargs)

    def _lams(self, lam: Lam | None, batch: int) -> torch.Tensor:
        """λ as a float32 tensor, (batch,) or, with several aligned models, (batch, models): a tensor, because `generate`
        repeats tensors for beams and samples.
        """
        lam = self.lam if lam is None else lam
        # A tensor is not looked at here, at each step (an accelerator would be waited for); `generate` has looked once.
        looked = isinstance(lam, torch.Tensor)
        try:
            values = torch.as_tensor(lam if looked or not hasattr(lam, "__iter__") else list(lam), dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"λ {lam!r} is no number, and no list of numbers: {error}") from None
        if not looked and not values.isfinite().all():
            raise ValueError(f"λ must be finite, not {lam}")
        one = () if self.models == 1 else (self.models,)
        if tuple(values.shape) not in (one, (batch, *one)):
            each = "" if self.models == 1 else f", each of {self.models} numbers"
            raise ValueError(f"lam has shape {tuple(values.shape)}, expected one λ or {batch}, one per sequence{each}")
        return values.expand(batch, *one)

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
    output = CausalLMOutputWithPast(loss=loss, logits=logits, **{caches.CACHE: past})
    return output.to_tuple() if return_dict is False else output


class DeraForCausalLM(_LambdaModel):
    """Two causal models, or more, that decode as one.

    Args:
        ref: the reference model.
        aligned: the aligned model, or several, over the same token ids. Vocabularies padded differently are mixed on their
            common rows. The models may be on different devices; the mixed logits are on the reference's.
        lam: the default λ: any finite number. 0 is the reference, 1 the aligned model. With several, a number for each.
        rows: all models over one set of weights, as `ModelPair.exact` makes of adapters: then one pass serves all.

    Example:
        >>> model = DeraForCausalLM(ref, aligned, lam=0.5)
        >>> model.generate(**inputs)                     # λ = 0.5
        >>> model.generate(**inputs, lam=[0.0, 2.0])     # λ per sequence of the batch

    Raises:
        ValueError: λ is not finite (a tensor given to `forward` is not looked at), or has another length than the batch.
        DeraError: what is asked for would not be exact: another kind of cache, `generate_batch`, guidance, `inputs_embeds`.
    """

    def __init__(
        self,
        ref: PreTrainedModel,
        aligned: PreTrainedModel | Sequence[PreTrainedModel],
        lam: float | Sequence[float] = 1.0,
        rows: PreTrainedModel | None = None,
    ) -> None:
        aligned = [aligned] if isinstance(aligned, PreTrainedModel) else list(aligned)
        super().__init__(ref, lam, min(model.config.vocab_size for model in (ref, *aligned)), len(aligned))
        self.generation_config = copy.deepcopy(aligned[0].generation_config)
        self.config.architectures = [type(self).__name__]  # what serving engines look for
        self.ref = ref
        self.aligned = aligned[0]
        self.others = torch.nn.ModuleList(aligned[1:])
        self.rows = rows
        self._arguments = [caches.arguments_of(model) for model in self.sides]
        self._arguments_of_rows = frozenset() if rows is None else caches.arguments_of(rows)
        self.eval()

    @property
    def sides(self) -> tuple[PreTrainedModel, ...]:
        """The reference and each aligned model."""
        return self.ref, self.aligned, *self.others

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: PairCache | RowsCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Lam | None = None,
        plausibility: PlausibilityMask | None = None,
        return_dict: bool | None = None,
        past_key_values: PairCache | RowsCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Mixed logits, shape (batch, kept tokens, vocabulary), float32.

        Args:
            input_ids: (batch, tokens).
            attention_mask, position_ids, use_cache, logits_to_keep: as for any causal model.
            cache: what an earlier call returned; `past_key_values` is its older name.
            labels: (batch, tokens); gives `loss`, the mean cross-entropy in nats per token.
            lam: λ, one for all or one per sequence; None takes the default.
            plausibility: the mask of this call, which wants to see the aligned model's logits.
            return_dict: False gives a tuple.
        """
        cache = caches.given(cache, past_key_values)
        self._check_cache(cache)
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise DeraError("a mixture has no attentions or hidden states of its own; ask model.ref or model.aligned")
        if cache is None and use_cache:
            cache = self._new_cache()

        shared = dict(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        run = self._a_pass_each if self.rows is None else self._one_pass
        ref, *aligned = run(shared, cache)
        logits = mix(ref, aligned, self._lams(lam, len(input_ids)).to(ref.device))
        if plausibility is not None:
            kept = logits_to_keep if isinstance(logits_to_keep, int) else 0  # which not every architecture heeds
            plausibility.watch(aligned[0][:, -kept:, : logits.shape[-1]].to(logits.device))
        return _output(logits, cache, labels, return_dict)

    def _a_pass_each(self, shared: dict[str, Any], cache: PairCache | None) -> list[torch.Tensor]:
        logits: dict[int, torch.Tensor] = {}
        # An accelerator works on while the host goes to the next model, so those that block come last.
        order = sorted(range(len(self.sides)), key=lambda number: self.sides[number].device.type == "cpu")
        for number in order:
            model = self.sides[number]
            theirs = None if cache is None else cache.caches[number]
            names = self._arguments[number]
            here = {key: _to(value, model.device) for key, value in shared.items() if key in names}
            logits[number] = _run(model, names, here, theirs).logits
        return [logits[number] for number in range(len(order))]

    def _one_pass(self, shared: dict[str, Any], cache: RowsCache | None) -> list[torch.Tensor]:
        ids, sides = shared["input_ids"], len(self.sides)
        names = self._arguments_of_rows
        each = {key: _repeated(value, len(ids), sides) for key, value in shared.items() if key in names}
        shares = torch.eye(sides, dtype=self.rows.dtype, device=ids.device)[:, 1:].repeat_interleave(len(ids), 0)
        inner = None if cache is None else cache.inner
        with self.rows.dera_strength.of(shares if sides > 2 else shares[:, 0], ids.shape[1]):
            return list(_run(self.rows, names, each, inner).logits.chunk(sides))

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
            if self.models > 1:
                raise DeraError("PlausibilityMask looks at one aligned model; there are several")
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

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """The caches of all models. `args`, `kwargs`: what a later release adds, which no cache here looks at."""
        cache = model_kwargs.get(caches.CACHE)
        self._check_cache(cache)
        if cache is not None or generation_config.use_cache is False:
            return
        cache = model_kwargs[caches.CACHE] = self._new_cache(generation_config, max_cache_length)
        if generation_config.is_assistant:  # it will be rolled back
            cache.activate_past_recording()

    def _new_cache(self, *settings: Any) -> PairCache | RowsCache:
        """An empty cache for all models; settings as for `caches.empty`."""
        if self.rows is not None:
            return RowsCache(caches.empty(self.rows, *settings), len(self.sides))
        return PairCache(*(caches.empty(model, *settings) for model in self.sides))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        known: int = 0,
        speculation: Speculation | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, except that assisted decoding, too, reads only what is new of a cached conversation.

        `speculation` is named so that `generate` takes it; no forward pass looks at it.
        """
        if known and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - known
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    def _get_candidate_generator(
        self, generation_config: Any, *args: Any, model_kwargs: dict[str, Any], assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        cache = model_kwargs[caches.CACHE]
        if known := cache.get_seq_length():
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
                cache, model_kwargs.get("attention_mask"), model_kwargs["lam"][:1],
            )  # fmt: skip
        ours = () if isinstance(assistant_model, DialForCausalLM) else ("lam",)  # other draft models know no λ
        theirs = {key: value for key, value in model_kwargs.items() if key not in (*ours, "plausibility")}
        return super()._get_candidate_generator(
            generation_config, *args, logits_processor=processors, model_kwargs=theirs, assistant_model=assistant_model,
            **kwargs,
        )  # fmt: skip

    def _check_cache(self, cache: Any) -> None:
        if cache is not None and not isinstance(cache, RowsCache if self.rows is not None else PairCache):
            raise DeraError(
                f"a {type(cache).__name__} holds other keys and values than exact DeRa's of both models; leave "
                f"{caches.CACHE} out, or pass the cache that an earlier call of this model returned"
            )

    def dial(self) -> DialForCausalLM:
        """θ_ref + λΔ over this mixture's own weights, λ for each row. Raises DeraError where the pair shares no weights."""
        if self.rows is None:
            raise DeraError("only models that share their weights (an adapter and its base) merge with a λ for each row")
        return DialForCausalLM(self.rows, self.lam, self.config.vocab_size, self.models)

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
        config.text_config.name_or_path = ""  # a path on this machine says nothing to others

        def relative(name: Any) -> Any:
            if isinstance(name, list):
                return [relative(each) for each in name]
            if not isinstance(name, str) or not Path(name).is_dir():
                return name
            if push_to_hub:
                raise DeraError(f"{name} is a local directory, which nobody else could load; push that to the Hub first")
            return os.path.relpath(Path(name).resolve(), Path(save_directory).resolve())

        config.pair = {key: relative(name) for key, name in config.pair.items()}
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
    """θ_ref + λΔ over one set of base weights, with a λ for each sequence of the batch.

    One model serves many λ in one forward pass: `generate(**inputs, lam=[0.0, 0.5, 2.0])`. It computes
    W·x + λ·scale·B·A·x where `ModelPair.merged` computes (W + λ·scale·B·A)·x; nothing is rounded to a storage dtype.

    Args:
        rows: from `rows.in_rows`; `ModelPair.dial` makes one.
        lam: the default λ.
        vocab_size: rows of the vocabulary that are given.
        models: how many aligned models `rows` has.
    """

    def __init__(
        self, rows: PreTrainedModel, lam: float | Sequence[float] = 1.0, vocab_size: int | None = None, models: int = 1
    ) -> None:
        super().__init__(rows, lam, vocab_size or rows.config.vocab_size, models)
        self.rows = rows
        self._arguments = caches.arguments_of(rows)
        self.eval()

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Lam | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of θ_ref + λΔ, (batch, kept tokens, vocabulary), in the model's dtype. Arguments as for any model."""
        strength: Strength = self.rows.dera_strength
        cache = caches.given(cache, past_key_values)
        given = dict(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
            logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
        given = {key: value for key, value in given.items() if key in self._arguments}
        lams = self._lams(lam, len(input_ids)).to(input_ids.device)
        with strength.of(lams, input_ids.shape[1]):
            output = _run(self.rows, self._arguments, given, cache)
        logits, past = output.logits[..., : self.config.vocab_size], getattr(output, caches.CACHE, None)
        return _output(logits, past, labels, return_dict)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.rows.get_input_embeddings()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _to(inner, device) for key, inner in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _repeated(value: Any, batch: int, sides: int) -> Any:
    """What belongs to each sequence, for the sequences as the rows of each side, one side after another."""
    if isinstance(value, dict):
        return {key: _repeated(inner, batch, sides) for key, inner in value.items()}
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch:
        return torch.cat([value] * sides)
    return value


def _run(model: PreTrainedModel, names: frozenset[str], given: dict[str, Any], cache: Cache | None) -> Any:
    """A forward pass that gets its cache under the name that the model's forward, with arguments `names`, has for it.

    `given` is what is in `names`: an architecture without `position_ids`, say, derives its own.
    """
    return model(**given) if cache is None else model(**given, **{caches.name_among(names) or caches.CACHE: cache})


def mix(ref: torch.Tensor, aligned: torch.Tensor | Sequence[torch.Tensor], lam: torch.Tensor) -> torch.Tensor:
    """(1-Σ λ_k)·h_ref + Σ λ_k·h_k in float32.

    Args:
        ref: logits (batch, tokens, vocabulary), any float dtype.
        aligned: the same of the aligned model, or of each; the rows that all have are mixed.
        lam: (batch,), or with several aligned models (batch, models).
    """
    aligned = [aligned] if isinstance(aligned, torch.Tensor) else aligned
    rows = min(logits.shape[-1] for logits in (ref, *aligned))
    ref = ref[..., :rows].float()
    lam = lam.reshape(len(lam), -1, 1, 1)
    mixed, same = (1 - lam.sum(1)) * ref, None
    for each, logits in zip(lam.unbind(1), aligned, strict=True):
        logits = logits[..., :rows].to(ref.device).float()  # one copy, in the dtype that they came in
        mixed = mixed.addcmul_(each, logits)
        same = ref == logits if same is None else same & (ref == logits)
    # Equal logits stay equal at every λ, infinite ones included (a token that all models mask).
    return torch.where(same, ref, mixed)


AutoModelForCausalLM.register(DeraConfig, DeraForCausalLM)
