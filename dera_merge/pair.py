"""A reference and an aligned model that belong together.

`ModelPair.from_pretrained` finds both (directories or Hub ids, full checkpoints or adapters), checks that they fit, and
gives each tensor of either side by the name that the merged checkpoint will have. Nothing here loads a model before
`exact` or `merged` is called.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import lambdas
from .checkpoint import REAL, Buffers, Checkpoint, TensorInfo, load_json, slices
from .delta import Adapter, Architecture, Piece, Replacement, empty_model
from .errors import DeraError, DeraWarning
from .quantisation import Requantised

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .curve import Curve
    from .exact import DeraForCausalLM, DialForCausalLM
    from .rounding import Rounding

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")

_CONTEXT = ("max_position_embeddings", "n_positions")

# Keys that give the weights their meaning without changing a shape.
_SAME_MEANING = ("num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "hidden_act", "activation_function")
# Keys that may differ between two checkpoints of one model without changing what it computes.
_MAY_DIFFER = re.compile(
    r"transformers_version|_name_or_path|use_cache|.*token_id|vocab_size|max_position_embeddings|.*dropout.*|.*pdrop"
    r"|initializer.*|dtype|torch_dtype|architectures|tie_word_embeddings|pretraining_tp|quantization_config|auto_map"
    r"|task_specific_params|_attn_.*|return_dict|output_.*|unsloth.*"
)


@dataclass(frozen=True)
class Source:
    """Where one argument leads: `name` as it was typed, the local `folder`, the commit if it came from the Hub."""

    name: str
    folder: Path
    revision: str | None = None

    @classmethod
    def locate(
        cls, name: str, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
    ) -> Source:
        """Find a local directory, or download `id` or `id@revision` from the Hub.

        Raises:
            DeraError: neither a directory nor a repository that can be reached.
        """
        folder = Path(name).expanduser()
        if folder.is_dir():
            return cls(name, folder.resolve())
        if folder.exists():
            raise DeraError(f"{name} is a file; give the directory that holds config.json or adapter_config.json")
        repo, _, typed = name.partition("@")
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", repo):
            raise DeraError(f"there is no directory {name}")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        patterns += ["*.bin"] * allow_pickle + ["*.py"] * trust_remote_code
        try:
            path = snapshot_download(repo, revision=typed or revision, allow_patterns=patterns)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DeraError(f"{name} is no local directory, and could not be had from the Hub: {reason}") from error
        return cls(name, Path(path).resolve(), Path(path).name)

    @property
    def pinned(self) -> str:
        """The local folder, or the Hub id with the commit."""
        return f"{self.name.partition('@')[0]}@{self.revision}" if self.revision else str(self.folder)

    @property
    def is_adapter(self) -> bool:
        if (self.folder / "adapter_config.json").is_file():
            return True
        if (self.folder / "config.json").is_file():
            return False
        raise DeraError(f"{self.name} holds neither config.json nor adapter_config.json; is it a model directory?")

    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in _VOCABULARY_FILES)


@dataclass
class Side:
    """One of the two models: a base checkpoint and, maybe, an adapter on it.

    A tensor's effective rows are its `base_rows`, then changed in place by `adapt`.
    """

    source: Source
    base: Source
    adapter: Adapter | None
    checkpoint: Checkpoint
    config: dict[str, Any]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)  # by output name
    key: dict[str, str] = field(default_factory=dict)  # output name → name in the checkpoint
    requantised: Requantised | None = None  # --base-quantization

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[self.key[name]]

    @property
    def quantisation(self) -> str | None:
        """How the checkpoint says that it is quantised: `fp8`, `gptq`, …"""
        settings = self.config.get("quantization_config")
        if not settings:
            return None
        return str(settings.get("quant_method", "quantised") if isinstance(settings, dict) else settings)

    def base_rows(
        self, name: str, start: int, stop: int, out: torch.Tensor, buffers: Buffers, key: str | None = None
    ) -> None:
        """Rows [start, stop) of the base tensor, any adapter left out, in `out`'s dtype. `key`: its name as stored."""
        key = key or self.key[name]
        info = self.checkpoint.tensors[key]
        if self.requantised is not None and key in self.requantised:
            out.copy_(self.requantised.rows(key, start, stop))
        elif info.dtype == out.dtype:
            self.checkpoint.read(key, start, stop, out)
        else:
            out.copy_(self.checkpoint.read(key, start, stop, buffers.take("stored", tuple(out.shape), info.dtype)))

    def is_stored_as(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the effective weights are just the stored ones, in this dtype."""
        requantised = self.requantised is not None and self.key[name] in self.requantised
        return self.info(name).dtype == dtype and name not in self.pieces and not requantised

    def adapt(self, name: str, start: int, stop: int, rows: torch.Tensor) -> None:
        """Make of the base's rows [start, stop) this side's effective ones, in place."""
        for piece in self.pieces.get(name, ()):
            piece.apply(rows, start, stop)


class ModelPair:
    """A reference model and an aligned model, or several; make one with `from_pretrained`.

    With several aligned models λ is a vector: h_ref + Σ λ_k·(h_k - h_ref) exactly, θ_ref + Σ λ_k·Δ_k in weight space.

    Attributes:
        ref, aligned: the two sides; with several aligned models, the first of them.
        others: for each further aligned model, a pair of it and the same reference.
        unties: whether θ(λ) has two tensors where REF's config says that one is shared (known once `tensors` is).
    """

    def __init__(
        self,
        ref: Side,
        aligned: Side,
        *,
        base_quantization: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        others: Sequence[ModelPair] = (),
    ) -> None:
        self.ref = ref
        self.aligned = aligned
        self.others = tuple(others)
        self.base_quantization = base_quantization or self._recorded_quantisation()
        if base_quantization and base_quantization != "none" and not (ref.adapter or aligned.adapter):
            raise DeraError("--base-quantization is for adapters, whose base was quantised when they were trained")
        self.allow_pickle = allow_pickle
        self.trust_remote_code = trust_remote_code
        self.unties = False
        self._check_configs()
        self._check_tokenizers()

    @classmethod
    def from_pretrained(
        cls,
        ref: str | os.PathLike[str],
        aligned: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        base: str | os.PathLike[str] | None = None,
        base_quantization: str | None = None,
        ref_revision: str | None = None,
        aligned_revision: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> ModelPair:
        """Open a pair. Each side is a full checkpoint or a PEFT adapter, a local directory or a Hub id (`id@revision`).

        Args:
            ref: the reference (SFT) model.
            aligned: the aligned (DPO, RLHF, …) model, or several. An adapter beside a full `ref` applies to `ref`.
            base: the base model of adapters, where the one that their config names is not to be used.
            base_quantization: what the adapters' base was quantised to when they were trained: `"nf4"`, `"nf4-double"`
                (QLoRA's), `"fp4"`, `"fp4-double"`; the reference is then dequant(base). None takes what the adapter's
                config records, `"none"` the base as it is.
            ref_revision, aligned_revision: Hub revisions; several aligned models name theirs as `id@revision`.
            allow_pickle: read `.bin` files where there is no safetensors file (never without `weights_only=True`).
            trust_remote_code: let transformers run code that comes with the checkpoints.

        Raises:
            DeraError: one of the two cannot be found or read, or they do not belong together.
        """
        options = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        others: list[ModelPair] = []
        if not isinstance(aligned, str | os.PathLike):
            if not aligned:
                raise DeraError("no aligned model is given")
            aligned, *more = aligned
            if more and aligned_revision:
                raise DeraError("aligned_revision is for one aligned model; write several as id@revision")
            how = {"base": base, "base_quantization": base_quantization, "ref_revision": ref_revision, **options}
            others = [cls.from_pretrained(ref, each, **how) for each in more]
        ref_source = Source.locate(os.fspath(ref), ref_revision, **options)
        aligned_source = Source.locate(os.fspath(aligned), aligned_revision, **options)
        given = Source.locate(os.fspath(base), **options) if base is not None else None
        if given and given.is_adapter:
            raise DeraError(f"--base {given.name} is an adapter; give the full model that the adapters were trained on")

        opened: dict[Path, Checkpoint] = {}

        def open_side(source: Source, beside: Source | None) -> Side:
            adapter, home = None, source
            if source.is_adapter:
                adapter = Adapter(source.folder, allow_pickle)
                home = given or (_same_base(adapter, beside) if beside else _named_base(adapter, source, options))
            config = load_config(home)
            _check_causal(home, config)
            if home.folder not in opened:
                opened[home.folder] = Checkpoint(home.folder, allow_pickle=allow_pickle)
            return Side(source, home, adapter, opened[home.folder], config)

        ref_side = open_side(ref_source, None)
        aligned_side = open_side(aligned_source, None if ref_source.is_adapter else ref_source)
        return cls(ref_side, aligned_side, base_quantization=base_quantization, **options, others=others)

    # What the two have in common

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.ref, self.aligned

    @property
    def pairs(self) -> tuple[ModelPair, ...]:
        """A pair for each aligned model, this one first."""
        return self, *self.others

    @property
    def every_side(self) -> tuple[Side, ...]:
        """The reference and all aligned models."""
        return self.ref, *(pair.aligned for pair in self.pairs)

    @property
    def aligned_name(self) -> str:
        """What reports call the aligned model, or all of them."""
        return " + ".join(pair.aligned.source.name for pair in self.pairs)

    def known(self, lams: Iterable[Any]) -> list[lambdas.Lam]:
        """λ as a program gives them, a number or a vector each, as this pair takes them.

        Raises:
            ValueError: not finite, a vector of another length than there are aligned models, or two with one name.
        """
        values = [lambdas.known(lam, len(self.pairs)) for lam in lams]
        lambdas.check_names(values)
        return values

    def ends(self) -> list[lambdas.Lam]:
        """λ of the reference and of each aligned model alone."""
        if not self.others:
            return [0.0, 1.0]
        count = range(len(self.pairs))
        return [lambdas.Vector([float(k == number) for k in count]) for number in range(-1, len(self.pairs))]

    def only_pair(self, what: str) -> None:
        """Raise DeraError where there are several aligned models, which `what` is not for."""
        if self.others:
            raise DeraError(f"{what} for one aligned model; there are {len(self.pairs)}")

    @property
    def shared_base(self) -> bool:
        """All sides stand on the same base checkpoint: LoRA adapters."""
        return len({side.checkpoint.folder for side in self.every_side}) == 1

    @cached_property
    def architecture(self) -> Architecture:
        return Architecture.of(self.ref.base.folder, self.trust_remote_code)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of θ(λ), in REF's names, shapes and dtypes.

        Raises:
            DeraError: the two sides' weights cannot be put in correspondence, or are quantised.
        """
        for side, other in ((self.ref, self.aligned), (self.aligned, self.ref)):
            if side.quantisation and not other.quantisation:
                raise DeraError(f"{side.base.name} is quantised ({side.quantisation}) and {other.base.name} is not; "
                                "θ_ref + λΔ needs dense weights, give those")  # fmt: skip
        stored = self.ref.checkpoint.tensors
        ties = [side.config.get("tie_word_embeddings") for side in self.sides]
        spelled = ties[0] != ties[1] or (ties[0] and {"lm_head.weight", "embed_out.weight"} & stored.keys())
        same = stored.keys() == self.aligned.checkpoint.tensors.keys()
        if same and not spelled and not any(side.adapter for side in self.sides):
            for side in self.sides:
                side.key = {name: name for name in stored}
        else:
            self._match_names()
        tensors = {name: self.ref.info(name) for name in self.ref.key}
        for name, info in tensors.items():
            self._check_tensor(name, info, self.aligned.info(name))
        for other in self.others:
            if odd := sorted(tensors.keys() ^ other.tensors.keys()):
                names = f"{other.aligned.source.name} and {self.aligned.source.name}"
                raise DeraError(f"{names} tie embeddings differently ({odd[0]}); they cannot be merged, decode exactly")
            self.unties = self.unties or other.unties
        return tensors

    def adapts(self, name: str) -> bool:
        """Whether an adapter changes all of this tensor, so that losing the whole of it is a fault and not rounding."""
        pieces = [piece for side in self.every_side for piece in side.pieces.get(name, ())]
        return any(not isinstance(piece, Replacement) for piece in pieces)

    def is_opaque(self, name: str) -> bool:
        """Whether a tensor is no plain array of weights, but quantised or a scale that belongs to quantised ones.

        It must be the same on both sides, and its bits stay.
        """
        return self.ref.info(name).dtype not in REAL or name.rpartition(".")[0] in self._quantised_modules

    @cached_property
    def _quantised_modules(self) -> set[str]:
        """Modules of a quantised checkpoint of which a tensor is not stored as real numbers."""
        stored = self.ref.checkpoint.tensors if self.ref.config.get("quantization_config") else {}
        return {name.rpartition(".")[0] for name, info in stored.items() if info.dtype not in REAL}

    def is_same(self, name: str) -> bool:
        """Whether all sides are one tensor, so that θ(λ) is its stored bits at every λ."""
        ref, aligned = self.ref.info(name), self.aligned.info(name)
        changed = name in self.ref.pieces or name in self.aligned.pieces
        same = self.is_opaque(name) or (ref is aligned and not changed)
        return same and all(other.is_same(name) for other in self.others)

    def _match_names(self) -> None:
        """Find each tensor on both sides where names differ, tensors are tied, or an adapter speaks in module names."""
        architecture = self.architecture
        aligned = architecture if self.shared_base else Architecture.of(self.aligned.base.folder, self.trust_remote_code)

        def home(side: Side, name: str) -> str | None:
            """The stored tensor that is `name` on this side: its own, or the one that it is tied to."""
            stored, owner = side.checkpoint.tensors, (aligned if side is self.aligned else architecture).owner(name)
            return architecture.stored_name(name, stored) or (architecture.stored_name(owner, stored) if owner else None)

        def output_name(name: str) -> str:
            return architecture.stored_name(name, self.ref.checkpoint.tensors) or name

        def find(side: Side, name: str) -> str:
            """The stored tensor that an adapter changes."""
            for place in (self.ref, side):
                key = home(place, name)
                if key is None:
                    how = "in packed, quantised form" if place.quantisation else "under another name"
                    raise DeraError(
                        f"{side.source.name} changes {name}, which {place.base.name} stores {how} "
                        "(transformers converts it on load); that is not merged, decode exactly"
                    )
                if place.checkpoint.tensors[key].dtype not in REAL:
                    kind = str(place.checkpoint.tensors[key].dtype).removeprefix("torch.")
                    raise DeraError(
                        f"{side.source.name} changes {name}, which {place.base.name} stores quantised ({kind}); "
                        "merge onto the dense base instead"
                    )
            return key

        if self.base_quantization not in (None, "none"):
            if architecture.transposed:
                raise DeraError("--base-quantization does not know layers that store their weight transposed (Conv1D)")
            for side in self.sides:
                stored = side.checkpoint.tensors
                linear = {architecture.stored_name(f"{module}.weight", stored) for module in architecture.linear}
                side.requantised = Requantised(side.checkpoint, linear - {None}, self.base_quantization)
        for side in self.sides:
            if side.adapter is None:
                continue

            def read_base(name: str, side: Side = side) -> torch.Tensor:
                key = find(side, name)
                info = side.checkpoint.tensors[key]
                out = torch.empty((info.rows, *info.row_shape), dtype=torch.float32)
                side.base_rows(name, 0, info.rows, out, Buffers(), key)
                return out.view(info.shape)

            build = partial(empty_model, side.base.folder, self.trust_remote_code)
            for name, pieces in side.adapter.bind(architecture, read_base, build).items():
                find(side, name)
                side.pieces[output_name(name)] = pieces
        # Ends of a tie that are no longer one tensor. Trained tokens change both ends alike.
        parted = {name for side in self.sides if not (side.adapter and side.adapter.keeps_ties) for name in side.pieces}

        names = dict.fromkeys([*self.ref.checkpoint.tensors, *map(output_name, self.aligned.checkpoint.tensors)])
        for name, owner in architecture.tied.items():
            if parted & {output_name(name), output_name(owner)}:
                names[output_name(name)] = None  # changed on one end, the two are no longer one tensor
        for name in names:
            keys = [home(side, name) for side in self.sides]
            for side, other, key in zip(self.sides, reversed(self.sides), keys, strict=True):
                if key is None:
                    raise DeraError(f"{side.base.name} has no tensor {name}, which {other.base.name} has")
            self.ref.key[name], self.aligned.key[name] = keys[0] or "", keys[1] or ""
            if owner := architecture.owner(name):
                changed = {name, output_name(owner)} & parted
                if not changed and self._are_equal(name, [home(side, owner) for side in self.sides]):
                    del self.ref.key[name], self.aligned.key[name]
                else:
                    self.unties = True

    def _are_equal(self, name: str, owners: list[str | None]) -> bool:
        """Whether each side stores under `name` what it stores as the owner of the tie, so that one may be left out."""
        return all(
            owner is not None and (side.key[name] == owner or _equal(side.checkpoint, side.key[name], owner))
            for side, owner in zip(self.sides, owners, strict=True)
        )

    def _check_tensor(self, name: str, ref: TensorInfo, aligned: TensorInfo) -> None:
        if ref.shape != aligned.shape and not self._is_padding(ref, aligned):
            raise DeraError(
                f"tensor {name} is {list(ref.shape)} in {self.ref.base.name} and {list(aligned.shape)} in "
                f"{self.aligned.base.name}; the two are not the same architecture"
            )
        if self.is_opaque(name) or aligned.dtype not in REAL:
            same = ref.dtype == aligned.dtype and ref.shape == aligned.shape
            for start, stop in slices(ref) if same and ref is not aligned else ():
                same = same and torch.equal(*(side.checkpoint.read(side.key[name], start, stop) for side in self.sides))
            if not same:
                quantised = self.ref.quantisation or self.aligned.quantisation
                what = f"belongs to a quantised layer ({quantised})" if quantised else f"has dtype {ref.dtype}"
                raise DeraError(f"tensor {name} {what} and differs between the two; θ_ref + λΔ needs dense weights")

    def _is_padding(self, ref: TensorInfo, aligned: TensorInfo) -> bool:
        """A vocabulary matrix of which one side has more rows than the other."""
        sizes = [side.config.get("vocab_size") for side in self.sides]
        return ref.shape[1:] == aligned.shape[1:] and [ref.shape[0], aligned.shape[0]] == sizes

    @cached_property
    def new_tokens(self) -> bool:
        """Whether ALIGNED's tokenizer uses rows of the vocabulary that REF does not have."""
        if any(other.new_tokens for other in self.others):
            return True
        rows = [side.config.get("vocab_size") for side in self.sides]
        if None in rows or rows[1] <= rows[0]:
            return False
        return max(self.tokenizer.get_vocab().values()) >= rows[0]

    def _recorded_quantisation(self) -> str | None:
        """What the adapters' configs say of the base that they were trained on; warns where they only look like QLoRA."""
        adapters = [side.adapter for side in self.sides if side.adapter]
        recorded = {kind for adapter in adapters if (kind := adapter.trained_on)}
        if len(recorded) > 1:
            raise DeraError(f"the two adapters were trained on bases quantised differently ({', '.join(sorted(recorded))})")
        for adapter in adapters:
            if not recorded and re.search(r"4-?bit|nf4|qlora", f"{adapter.base_name} {adapter.folder.name}", re.I):
                warn(f"{adapter.folder} looks like QLoRA, trained on a 4-bit base; --base-quantization nf4 (or nf4-double) "
                     "merges onto that base, none onto the full one and hides this line")  # fmt: skip
        return next(iter(recorded), None)

    # Checks that need no weights

    def _check_configs(self) -> None:
        ref, aligned = (_with_one_rope(side.config) for side in self.sides)
        for key in ("architectures", "model_type", *_SAME_MEANING):
            if ref.get(key) != aligned.get(key):
                raise DeraError(
                    f"the two are different models: {key} is {ref.get(key)!r} in {self.ref.base.name} "
                    f"and {aligned.get(key)!r} in {self.aligned.base.name}"
                )
        differing = sorted(
            key for key in ref.keys() | aligned.keys() if ref.get(key) != aligned.get(key) and not _MAY_DIFFER.fullmatch(key)
        )
        if differing:
            key = differing[0]
            warn(f"config.json differs in {', '.join(differing)} ({key}: {ref.get(key)!r} in REF, "
                 f"{aligned.get(key)!r} in ALIGNED); a merged checkpoint takes REF's")  # fmt: skip

    def _check_tokenizers(self) -> None:
        folders = [folder for side in self.sides if (folder := self._tokenizer_home(side))]
        if len(set(folders)) < 2:
            return
        ref, aligned = folders
        if not any(_same_file(ref / name, aligned / name) for name in _VOCABULARY_FILES):
            ours, theirs = (self._load_tokenizer(folder).get_vocab() for folder in (ref, aligned))
            ours = dict(sorted(ours.items(), key=lambda item: item[1]))
            for token, index in ours.items():
                if theirs.get(token, index) != index:
                    raise DeraError(f"the tokenizers disagree: {token!r} is {index} in REF and {theirs[token]} in ALIGNED")
            names = {index: token for token, index in theirs.items()}
            for token, index in ours.items():
                if (name := names.get(index, token)) != token:
                    raise DeraError(f"the tokenizers disagree: id {index} is {token!r} in REF and {name!r} in ALIGNED")
        if _chat_template(ref) != _chat_template(aligned):
            warn("the chat templates differ; ALIGNED's is used for both")

    def _tokenizer_home(self, side: Side) -> Path | None:
        return next((source.folder for source in (side.source, side.base) if source.has_tokenizer()), None)

    # Tokenizer, generation config

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer and chat template come from: ALIGNED if it brings them, else REF."""
        for source in (self.aligned.source, self.ref.source, self.aligned.base, self.ref.base):
            if source.has_tokenizer():
                return source.folder
        raise DeraError(f"neither {self.ref.source.name} nor {self.aligned.source.name} brings a tokenizer")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left as generation needs it."""
        tokenizer = self._load_tokenizer(self.tokenizer_folder)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or next(iter(tokenizer.get_vocab()))
        return tokenizer

    def _load_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        from transformers import AutoConfig, AutoTokenizer

        config = AutoConfig.from_pretrained(self.ref.base.folder, trust_remote_code=self.trust_remote_code)
        try:
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise DeraError(f"the tokenizer in {folder} cannot be loaded: {error}") from error

    @property
    def generation_folder(self) -> Path | None:
        """Where generation_config.json comes from: ALIGNED if it brings one, else REF."""
        for source in (self.aligned.source, self.ref.source, self.ref.base):
            if (source.folder / "generation_config.json").is_file():
                return source.folder
        return None

    def generation_config(self) -> GenerationConfig | None:
        from transformers import GenerationConfig

        folder = self.generation_folder
        return GenerationConfig.from_pretrained(folder) if folder else None

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that all models have."""
        return min(side.config["vocab_size"] for side in self.every_side if side.config.get("vocab_size"))

    @property
    def context_length(self) -> int | None:
        """How many tokens all models take; None where their configs do not say."""
        return min((side.config[key] for side in self.every_side for key in _CONTEXT if side.config.get(key)), default=None)

    # Loading

    def _load(
        self, dtype: torch.dtype | str, devices: tuple[torch.device, torch.device], **kwargs: Any
    ) -> tuple[PreTrainedModel, list[PreTrainedModel], PreTrainedModel | None]:
        """All models in evaluation mode, and all as rows of one where they share a base on one device."""
        from .rows import in_rows

        bases: dict[tuple[Path, torch.device], PreTrainedModel] = {}
        quantised = kwargs.get("quantization_config") is not None
        for pair in self.pairs:
            if pair.base_quantization not in (None, "none") and not quantised:
                _ = pair.tensors  # decides what is quantised

        def load(side: Side, device: torch.device) -> PreTrainedModel:
            folder = side.base.folder
            if (folder, device) not in bases:
                model = load_model(
                    folder, dtype, device, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code, **kwargs
                )
                if side.requantised and not quantised:
                    _put(side.requantised, model, self.architecture)
                bases[folder, device] = model
            base = bases[folder, device]
            return _with_adapter(base, side.adapter, device) if side.adapter else base

        ref, *aligned = (load(side, devices[side is not self.ref]) for side in self.every_side)
        together = len(bases) == 1 and not any(ref is model for model in aligned)
        rows = in_rows(next(iter(bases.values())), ref, *aligned) if together else None
        if rows is not None and len(aligned) == 1:
            aligned = [rows]  # outside of `DeraForCausalLM` it acts as the aligned model
        return ref, aligned, rows

    def exact(
        self,
        lam: float | Sequence[float] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        **kwargs: Any,
    ) -> DeraForCausalLM:
        """Exact DeRa at λ as one transformers model: (1-λ)·h_ref + λ·h_aligned (Liu et al., 2024).

        An adapter and its base are held once and decoded in one forward pass, as two rows of a batch.

        Args:
            lam: the default λ, any finite number (default 1), or one for each aligned model (default: as much of each);
                `generate(..., lam=…)` overrides it per call or per sequence.
            dtype: compute dtype; default float32 on CPU and the checkpoint's dtype elsewhere.
            device: where the two models go; two devices put the reference on the first and the aligned model on the second.
            kwargs: passed to transformers' `from_pretrained`: `quantization_config` loads both models quantised,
                `device_map` spreads each over devices (`device` is then not used), `attn_implementation`, ….

        Raises:
            DeraError: ALIGNED's tokenizer uses tokens that REF does not have, or the models cannot be loaded.
        """
        from .exact import DeraForCausalLM

        if self.new_tokens:
            raise DeraError("ALIGNED's tokenizer has tokens that REF has no embedding for; use ALIGNED alone (λ=1)")
        places = [device, device] if isinstance(device, str | torch.device) else list(device)
        if len(places) != 2:
            raise DeraError(f"exact DeRa runs two models; {len(places)} devices were given, expected one or two")
        devices = torch.device(places[0]), torch.device(places[1])
        if dtype is None:
            dtype = torch.float32 if devices[0].type == devices[1].type == "cpu" else "auto"
        if lam is None:
            lam = 1.0 if not self.others else [1 / len(self.pairs)] * len(self.pairs)
        ref, aligned, rows = self._load(dtype, devices, **kwargs)
        model = DeraForCausalLM(ref, aligned, lam=lam, rows=rows)
        model.config.pair = self._opened_as()
        if config := self.generation_config():
            model.generation_config = config
        return model

    def dial(self, lam: float | Sequence[float] | None = None, **kwargs: Any) -> DialForCausalLM:
        """θ_ref + λΔ of an adapter pair over one set of weights, with a λ for each sequence of a batch.

        Args:
            lam: the default λ.
            kwargs: as for `exact`: `dtype`, `device`, `quantization_config`, ….

        Raises:
            DeraError: the two sides do not share their weights, or the model cannot be loaded.
        """
        exact = self.exact(lam, **kwargs)
        model = exact.dial()
        model.generation_config = exact.generation_config
        return model

    def _opened_as(self) -> dict[str, Any]:
        """What `from_pretrained` needs to open this pair again."""
        homes = {side.base.folder: side.base for side in self.every_side if side.adapter}
        names = {"ref": self.ref.source, "aligned": self.aligned.source, "base": next(iter(homes.values()), None)}
        if homes.keys() == {self.ref.source.folder}:  # an adapter beside its base
            names["base"] = None
        opened: dict[str, Any] = {key: source.pinned for key, source in names.items() if source}
        if self.others:
            opened["aligned"] = [pair.aligned.source.pinned for pair in self.pairs]
        if self.base_quantization:
            opened["base_quantization"] = self.base_quantization
        return opened

    def merged(
        self,
        lam: float | Sequence[float],
        *,
        dtype: torch.dtype | str | None = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        compute_dtype: torch.dtype | str | None = None,
        path: str | os.PathLike[str] | Curve | None = None,
    ) -> PreTrainedModel:
        """θ_ref + λΔ as a live transformers model; `model.set_lam(λ)` turns it in place. See `dera_merge.dial`."""
        from .dial import live

        return live(
            self, lam, dtype=dtype, rounding=rounding, seed=seed, device=device, compute_dtype=compute_dtype, path=path
        )

    def merge(
        self,
        out: str | os.PathLike[str],
        lams: Sequence[float | Sequence[float]],
        *,
        format: Literal["full", "adapter"] = "full",
        **kwargs: Any,
    ) -> list[Path]:
        """Write θ_ref + λΔ without loading a model: as ordinary checkpoints, or λΔ as PEFT adapters over the base.

        See `dera_merge.merge.merge` and `dera_merge.adapter.merge_adapters`.
        """
        from .adapter import merge_adapters
        from .merge import merge

        return (merge_adapters if format == "adapter" else merge)(self, out, lams, **kwargs)

    def export_exact(self, out: str | os.PathLike[str], lam: float = 1.0, **kwargs: Any) -> dict[str, Any]:
        """Both models in one directory, for serving exact DeRa with vLLM. See `dera_merge.export.export_exact`."""
        from .export import export_exact

        return export_exact(self, out, lam, **kwargs)


def warn(message: str) -> None:
    warnings.warn(message, DeraWarning, stacklevel=3)


def load_model(
    folder: Path,
    dtype: torch.dtype | str,
    device: str | torch.device,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal model from a directory, in evaluation mode; refuses one that transformers would fill with random weights."""
    from transformers import AutoModelForCausalLM

    quantised = kwargs.get("quantization_config") or load_json(folder / "config.json").get("quantization_config")
    if quantised and "device_map" not in kwargs:
        kwargs["device_map"] = {"": device}  # quantised weights are made where they stay
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except (ValueError, OSError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        raise DeraError(f"transformers cannot load {folder}: {error}") from error
    if missing := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise DeraError(f"{folder} lacks tensor {missing[0]} ({len(missing)} in all); transformers would make it up")
    return (model if "device_map" in kwargs else model.to(device)).eval()


def _with_adapter(base: PreTrainedModel, adapter: Adapter, device: str | torch.device) -> PreTrainedModel:
    """The base model with an adapter in it, unmerged: PEFT's own forward. The base weights stay shared."""
    from .rows import second_tree

    if getattr(base.config, "quantization_config", None) is not None:
        if adapter.changes_base_at_load or adapter.brings_base_tensors:
            raise DeraError(f"{adapter.folder} changes the base when it is loaded; that needs a base which is not quantised")
        return adapter.load_onto(second_tree(base), device).get_base_model().eval()
    # A second module tree over the same storages. The Parameter objects are new, so that an adapter which assigns to
    # `.data` cannot reach the reference; what is written in place (by PiSSA and its kind, or embeddings that came with
    # the adapter) gets a copy.
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    if adapter.changes_base_at_load:
        written = {id(p) for p in base.parameters()}
    else:
        written = {id(p) for end in ends for p in end.parameters() if adapter.brings_base_tensors}
    twins = {
        id(p): torch.nn.Parameter(p.data.clone() if id(p) in written else p.data, requires_grad=False)
        for p in base.parameters()
    }
    model = copy.deepcopy(base, memo=dict(twins))
    return adapter.load_onto(model, device).get_base_model().eval()


def _put(weights: Requantised, model: PreTrainedModel, architecture: Architecture) -> None:
    """Replace a loaded model's weights by their requantised ones."""
    parameters = model.state_dict()  # shares memory with the model
    for key in weights.keys:
        if (place := architecture.stored_name(key, parameters)) is None:
            raise DeraError(f"transformers stores {key} under another name, so its quantised form cannot be put in")
        parameters[place].copy_(weights.rows(key, 0, None))


def _named_base(adapter: Adapter, source: Source, options: dict[str, bool]) -> Source:
    """The base that an adapter's config names: relative to the adapter, then to the working directory, then a Hub id."""
    name = adapter.base_name
    if not name:
        raise DeraError(f"{source.name} does not say what model it adapts; pass --base")
    beside = source.folder / name
    base = Source.locate(str(beside) if beside.is_dir() else name, **options)
    if base.is_adapter:
        raise DeraError(f"{source.name} adapts {name}, which is an adapter itself; merge that first, or pass --base")
    return Source(name, base.folder, base.revision)


def _same_base(adapter: Adapter, ref: Source) -> Source:
    """REF as the base of an aligned adapter; warns where the adapter's config does not name it."""
    name = adapter.base_name
    places = [adapter.folder / name, Path(name)] if name else []
    if name != ref.name and not any(place.is_dir() and place.resolve() == ref.folder for place in places):
        warn(f"the adapter {adapter.folder} names {name or 'no model'} as its base; it is applied to REF ({ref.name})")
    return ref


def _with_one_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its rotary embedding under one key; transformers 4 and 5 spell it differently."""
    config = dict(config)
    theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None)
    rope = dict(config.pop("rope_parameters", None) or scaling or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", theta)
    return {**config, "rope": rope} if rope["rope_theta"] is not None or len(rope) > 2 else config


def load_config(source: Source) -> dict[str, Any]:
    """A checkpoint's config.json. Raises DeraError where it is not an object with a list of architectures."""
    config = load_json(source.folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("architectures") or [], list):
        raise DeraError(f"{source.name}/config.json is not the config of a transformers model")
    for key in ("vocab_size", *_CONTEXT):
        if not isinstance(config.get(key), int | None):
            raise DeraError(f"{source.name}/config.json: {key} is {config[key]!r}, expected a whole number")
    return config


def _check_causal(source: Source, config: dict[str, Any]) -> None:
    names = config.get("architectures") or []
    name = names[0] if names else "a model that names no architecture"
    if any(key in config for key in ("vision_config", "audio_config", "vision_tower")):
        kind = "a multimodal (vision-language or audio) model"
    elif config.get("is_encoder_decoder"):
        kind = "an encoder-decoder model"
    elif not str(name).endswith(("ForCausalLM", "LMHeadModel")):
        kind = "not a causal language model"
    else:
        return
    raise DeraError(f"{source.name} is {name}, {kind}; dera-merge takes causal text models only")


def _chat_template(folder: Path) -> str | None:
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := load_json(folder / name).get("chat_template")):
            return str(template)
    return None


def _same_file(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    infos = checkpoint.tensors[one], checkpoint.tensors[other]
    if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
        return False
    return all(torch.equal(checkpoint.read(one, *r), checkpoint.read(other, *r)) for r in slices(infos[0]))

