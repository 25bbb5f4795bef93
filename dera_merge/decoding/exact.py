"""Exact decoding-time realignment (DeRa) as one transformers model.

    h_λ(x, y<t) = (1-λ)·h_ref(x, y<t) + λ·h_aligned(x, y<t)            Liu et al., ICML 2024
    h_λ(x, y<t) = h_ref(x, y<t) + Σ λ_k·(h_k - h_ref)(x, y<t)          with several aligned models

`DeraForCausalLM.forward` runs the models on the same tokens and mixes their logits in float32; everything else
(sampling, beams, padding, streaming, stopping) is transformers' own `generate`, which sees one model with one cache.
The two models of a LoRA pair are two rows of one batch over one set of weights (see `decoding/rows.py`): one pass.
λ travels with the call, as a tensor of one value per sequence: nothing is set on the object while it decodes, so calls
and threads cannot see each other's λ. Exact decoding's caches do not depend on λ: a conversation may go on at
another λ.

`DialForCausalLM` is the other thing that one set of weights with an adapter can be: θ_ref + λΔ, with a λ for each row.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import DeraError
from ..models.pair import Pair
from ..models.source import Source
from ..models.trust import Trust
from . import caches, compiled, settings
from .caches import PairCache, RowsCache
from .config import DeraConfig
from .dial import DialForCausalLM
from .hooks import Sides, at, repeated, sees
from .lambda_model import Lam, LambdaModel, Passes, causal_output
from .load import load_sides
from .mix import mix, on_new_rows, shares_of
from .plausibility import PlausibilityMask
from .speculation import MergedDraft, Speculation


class DeraForCausalLM(LambdaModel):
    """Two causal models, or more, that decode as one.

    Args:
        ref: the reference model.
        aligned: the aligned model, or several, over the same token ids. Vocabularies padded differently are mixed on
            their common rows. The models may be on different devices; the mixed logits are on the reference's.
        lam: the default λ: any finite number. 0 is the reference, 1 the aligned model. With several, a number for each.
        rows: all models over one set of weights, as `ModelPair.exact` makes of adapters: then one pass serves all.
        as_configured: keep what the aligned model's generation config says of warpers, penalties and beams. Without it
            only end and padding tokens, lengths and the like are taken over, so that `generate` gives exact DeRa's
            texts unless its caller asks for something else.
        known_rows: of the vocabulary, that the reference really has; the further ones are new tokens of the aligned
            model, whose log-probabilities stand there (`mix.on_new_rows`). None: all.

    Attributes:
        left_out: what was not taken over, name → value.

    Example:
        >>> model = DeraForCausalLM(ref, aligned, lam=0.5)
        >>> model.generate(**inputs)                     # λ = 0.5
        >>> model.generate(**inputs, lam=[0.0, 2.0])     # λ per sequence of the batch

    Raises:
        ValueError: λ is not finite (a tensor given to `forward` is not looked at), or has another length than the
            batch.
        DeraError: what is asked for would not be exact: another kind of cache, `generate_batch`, `inputs_embeds`.
    """

    def __init__(
        self,
        ref: PreTrainedModel,
        aligned: PreTrainedModel | Sequence[PreTrainedModel],
        lam: float | Sequence[float] = 1.0,
        rows: PreTrainedModel | None = None,
        as_configured: bool = False,
        known_rows: int | None = None,
    ) -> None:
        aligned = [aligned] if isinstance(aligned, PreTrainedModel) else list(aligned)
        sizes = (model.config.get_text_config(decoder=True).vocab_size for model in (ref, *aligned))
        super().__init__(ref, lam, min(sizes), len(aligned))
        self._configure(aligned[0].generation_config, as_configured)
        self.config.architectures = [type(self).__name__]  # what serving engines look for
        self.ref = ref
        self.aligned = aligned[0]
        self.others = torch.nn.ModuleList(aligned[1:])
        self.rows = rows
        ref.dera_known_rows = known_rows
        self._passes = [Passes(model) for model in self.sides]
        self._pass_of_rows = None if rows is None else Passes(rows)
        self._room = 0  # tokens that caches of fixed size have room for
        self.eval()

    def _configure(self, config: GenerationConfig, as_configured: bool) -> None:
        """Take over a generation config, as it is or what of it leaves the distribution alone."""
        self.generation_config = copy.deepcopy(config) if as_configured else settings.plain(config)
        self.left_out = {} if as_configured else settings.changes(config)

    @property
    def sides(self) -> tuple[PreTrainedModel, ...]:
        """The reference and each aligned model."""
        return self.ref, self.aligned, *self.others

    @property
    def asked(self) -> PreTrainedModel:
        return self.ref

    @property
    def towers(self) -> tuple[PreTrainedModel, ...]:
        return self.sides

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
            attention_mask: as for any causal model.
            position_ids: likewise.
            use_cache: likewise.
            logits_to_keep: likewise.
            cache: what an earlier call returned; `past_key_values` is its older name.
            labels: (batch, tokens); gives `loss`, the mean cross-entropy in nats per token.
            lam: λ, one for all or one per sequence; None takes the default.
            plausibility: the mask of this call, which wants to see the aligned model's logits.
            return_dict: False gives a tuple.
        """
        cache = caches.given(cache, past_key_values)
        if isinstance(cache, Sides):  # a state that is no cache of transformers': xLSTM's
            kwargs[caches.CACHE], cache = cache, None
        self._check_cache(cache)
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise DeraError("a mixture has no attentions or hidden states of its own; ask model.ref or model.aligned")
        together = self.rows is not None and not sees(kwargs) and not isinstance(cache, PairCache)
        if cache is None and use_cache:
            cache = self._new_cache(together)
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "use_cache": bool(use_cache), "logits_to_keep": logits_to_keep,
        }  # fmt: skip
        (ref, *aligned), state = (self._one_pass if together else self._a_pass_each)(given, kwargs, cache)
        if self.ref.dera_known_rows is not None:
            ref, aligned[0] = on_new_rows(ref, aligned[0], self.ref.dera_known_rows)
        logits = mix([ref, *aligned], shares_of(self._lams(lam, len(input_ids)).to(ref.device)))
        if plausibility is not None:
            kept = logits_to_keep if isinstance(logits_to_keep, int) else 0  # which not every architecture heeds
            plausibility.watch(aligned[0][:, -kept:, : logits.shape[-1]].to(logits.device))
        return causal_output(logits, state.pop(caches.CACHE, cache), labels, return_dict, state)

    def _a_pass_each(
        self, given: dict[str, Any], more: dict[str, Any], cache: PairCache | None
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Logits of each model, run by itself on its device; and the state that all hand on, if not in `cache`."""
        outputs: dict[int, Any] = {}
        # An accelerator works on while the host goes to the next model, so those that block come last.
        order = sorted(range(len(self.sides)), key=lambda number: self.sides[number].device.type == "cpu")
        for number in order:
            model, inner = self.sides[number], None if cache is None else cache.caches[number]
            own = [at(_of(number, inputs), model) for inputs in (given, more)]
            outputs[number] = self._passes[number].run(*own, inner)
        ordered = [outputs[number] for number in range(len(order))]
        states = [passes.state(output) for passes, output in zip(self._passes, ordered, strict=True)]
        state: dict[str, Any] = {key: Sides(own[key] for own in states) for key in states[0]}
        own_caches = [output.get(caches.CACHE) for output in ordered]  # maybe of a kind of their own
        taken = (None,) * len(ordered) if cache is None else cache.caches
        if all(isinstance(own, Cache) and own is not inner for own, inner in zip(own_caches, taken, strict=True)):
            state[caches.CACHE] = PairCache(*own_caches)
        return [output.logits for output in ordered], state

    def _one_pass(
        self, given: dict[str, Any], more: dict[str, Any], cache: RowsCache | None
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """As `_a_pass_each`, from one pass over a batch that has every sequence once for each side."""
        ids, sides = given["input_ids"], len(self.sides)
        given, own = ({key: value[0] if isinstance(value, Sides) else repeated(key, value, len(ids), sides)
                       for key, value in inputs.items()} for inputs in (given, more))  # fmt: skip
        with self.rows.dera_strength.each(sides, sides * len(ids), ids.shape[1]):
            output = self._pass_of_rows.run(given, own, inner := None if cache is None else cache.inner)
        state: dict[str, Any] = {key: Sides([value]) for key, value in self._pass_of_rows.state(output).items()}
        own_cache = output.get(caches.CACHE)
        if isinstance(own_cache, Cache) and own_cache is not inner:
            state[caches.CACHE] = RowsCache(own_cache, sides)
        return list(output.logits.chunk(sides)), state

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
            strictest = max(masks, key=lambda mask: mask.alpha).for_one_call()  # which implies the others
            others = [p for p in kwargs["logits_processor"] if not isinstance(p, PlausibilityMask)]
            processors = type(kwargs["logits_processor"])([strictest, *others])
            kwargs |= {"plausibility": strictest, "logits_processor": processors}
        if speculation is not None:
            if kwargs.get("assistant_model") is None:
                raise DeraError("speculation says how a draft is used; pass the draft as assistant_model")
            rows = kwargs["assistant_model"].config.get_text_config().vocab_size
            if rows != self.config.vocab_size:
                raise DeraError(
                    f"the draft has {rows} vocabulary rows, the pair {self.config.vocab_size} in common; decode "
                    "without a draft, or bring one of the same size"
                )
            kwargs["speculation"] = speculation
        if "top_k" in kwargs:  # what a call asks for is its own
            return super().generate(inputs, *args, lam=lam, **kwargs)
        with settings.unremarked():
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
        together = self.rows is not None and not sees(model_kwargs)
        if caches.has_fixed_size(generation_config):
            # As transformers does: what was compiled for the longest call so far serves shorter ones.
            self._room = max_cache_length = max(self._room, max_cache_length, generation_config.max_cache_len or 0)
        if (cache := self._new_cache(together, generation_config, max_cache_length)) is None:
            return
        model_kwargs[caches.CACHE] = cache
        if generation_config.is_assistant:  # it will be rolled back
            cache.activate_past_recording()

    def _new_cache(self, together: bool, *settings: Any) -> PairCache | RowsCache | None:
        """An empty cache for all models, as rows of one or each by itself; settings and None as of `caches.empty`."""
        if together:
            inner = caches.empty(self.rows, *settings)
            return None if inner is None else RowsCache(inner, len(self.sides))
        inners = [caches.empty(model, *settings) for model in self.sides]
        return None if None in inners else PairCache(*inners)

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, next_sequence_length: int | None = None, known: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        """The reference's own, except that assisted decoding, too, reads only what is new of a cached conversation.

        `known`: tokens of it that were cached before an assisted call.
        """
        if known and next_sequence_length is None:
            next_sequence_length = input_ids.shape[1] - known
        inputs = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        parts, copies = self._running(inputs.get(caches.CACHE))
        return compiled.with_masks(inputs, parts, copies, kwargs.get("is_first_iteration", False)) if parts else inputs

    def _running(self, cache: PairCache | RowsCache | None) -> tuple[list[tuple[PreTrainedModel, Cache]], int]:
        if isinstance(cache, RowsCache):
            return [(self.rows, cache.inner)], len(self.sides)
        return list(zip(self.sides, cache.caches, strict=True)) if isinstance(cache, PairCache) else [], 1

    def _get_candidate_generator(
        self,
        generation_config: Any,
        *args: Any,
        model_kwargs: dict[str, Any],
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (cache := model_kwargs.get(caches.CACHE)) is None:
            raise DeraError(f"{type(self.ref).__name__} has no cache that could be rolled back; decode without a draft")
        if sees(model_kwargs):
            raise DeraError("a draft reads no images; decode without one")
        if generation_config.guidance_scale not in (None, 1):
            raise DeraError("guidance reads one token after another, so no draft can be checked; decode without one")
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
        unknown = () if isinstance(assistant_model, DialForCausalLM) else ("lam",)  # other draft models know no λ
        kept = {key: value for key, value in model_kwargs.items() if key not in (*unknown, "plausibility")}
        return super()._get_candidate_generator(
            generation_config, *args, logits_processor=processors, model_kwargs=kept, assistant_model=assistant_model,
            **kwargs,
        )  # fmt: skip

    def _check_cache(self, cache: Any) -> None:
        kinds = PairCache if self.rows is None else (PairCache, RowsCache)
        if cache is not None and not isinstance(cache, kinds):
            raise DeraError(
                f"a {type(cache).__name__} holds other keys and values than exact DeRa's of both models; leave "
                f"{caches.CACHE} out, or pass the cache that an earlier call of this model returned"
            )

    def dial(self) -> DialForCausalLM:
        """θ_ref + λΔ over this mixture's own weights, λ for each row. Raises DeraError where none are shared."""
        if self.rows is None:
            raise DeraError(
                "only an adapter and its base, which share their weights, merge with a λ for each row, and only where "
                "rows of a batch can be told apart (not with experts)"
            )
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
            raise DeraError(
                "only a mixture made by ModelPair.exact() knows where its models come from; save them yourself"
            )
        config = copy.deepcopy(self.config)
        config.text_config.name_or_path = ""  # a path on this machine says nothing to others

        def relative(name: Any) -> Any:
            if isinstance(name, list):
                return [relative(item) for item in name]
            if not isinstance(name, str) or not Path(name).is_dir():
                return name
            if push_to_hub:
                raise DeraError(
                    f"{name} is a local directory, which nobody else could load; push that to the Hub first"
                )
            return os.path.relpath(Path(name).resolve(), Path(save_directory).resolve())

        config.pair = {key: relative(name) for key, name in config.pair.items()}
        config.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        generation_config = copy.deepcopy(self.generation_config)
        generation_config.top_k = generation_config.top_k or None  # transformers saves none that is greedy and has one
        generation_config.save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

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
        trust = Trust(code=bool(kwargs.pop("trust_remote_code", False)))
        folder = Source.locate(name, hub.get("revision"), trust).folder
        return cls.from_pair(config.open_pair(folder, trust), kwargs.pop("lam", config.lam), **kwargs)

    @classmethod
    def from_pair(
        cls,
        pair: Pair,
        lam: float | Sequence[float] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        as_configured: bool = False,
        sides: Sequence[PreTrainedModel] | None = None,
        **kwargs: Any,
    ) -> DeraForCausalLM:
        """Load a pair's models as one mixture. An adapter and its base are held once, and decoded in one forward pass.

        Args:
            pair: the models.
            lam: the default λ, any finite number (default 1), or one for each aligned model (default: as much of each);
                `generate(..., lam=…)` overrides it per call or per sequence.
            dtype: compute dtype; default float32 on CPU and the checkpoint's dtype elsewhere.
            device: where the models go; two devices put the reference on the first and the aligned ones on the second.
            sides: the models, where they are loaded already.
            as_configured: as for the class; the generation config is that of ALIGNED's directory, else REF's.
            kwargs: passed to transformers' `from_pretrained`: `quantization_config` loads all models quantised,
                `device_map` spreads each over devices (`device` is then not used), `attn_implementation`, ….

        Raises:
            DeraError: ALIGNED's tokenizer uses tokens that REF does not have, or the models cannot be loaded.
        """
        pair.check_tokens(merged=False)
        places = [device, device] if isinstance(device, str | torch.device) else list(device)
        if len(places) != 2:
            raise DeraError(f"exact DeRa runs two models; {len(places)} devices were given, expected one or two")
        devices = torch.device(places[0]), torch.device(places[1])
        if dtype is None:
            dtype = torch.float32 if devices[0].type == devices[1].type == "cpu" else "auto"
        if lam is None:
            lam = 1.0 if pair.models == 1 else [1 / pair.models] * pair.models
        config = pair.generation_config()
        if sides is None:
            ref, aligned, rows = load_sides(pair, dtype, devices, **kwargs)
        else:
            ref, aligned, rows = sides[0], list(sides[1:]), None
        known = pair.ref.vocabulary_rows if pair.brings_tokens else None
        model = cls(ref, aligned, lam=lam, rows=rows, as_configured=as_configured, known_rows=known)
        model.config.pair = pair.opened_as()
        if config:
            model._configure(config, as_configured)
        return model


def _of(number: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of one model among those of all."""
    return {key: value[number] if isinstance(value, Sides) else value for key, value in inputs.items()}


AutoModelForCausalLM.register(DeraConfig, DeraForCausalLM)
