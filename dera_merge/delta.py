"""What a PEFT adapter does to the tensors of a checkpoint: a low-rank sum, or a replacement.

An adapter names modules of the model in memory (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), a
checkpoint names tensors on disk. `Architecture`, the empty model that transformers builds from the config, says which
is which, which tensors are tied, and which layers store their weight transposed (GPT-2's Conv1D).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from .checkpoint import Checkpoint, load_json
from .errors import DeraError

# What may be left at `init_lora_weights` without the base having been changed when the adapter was made.
_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_SUFFIX = re.compile(
    r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?"
    r"|lora_[AB]\.bias|token_adapter\..*|base_layer\.weight|weight|bias)$"
)


class Piece(Protocol):
    """One thing that an adapter does to one tensor."""

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> None:
        """Change the tensor's rows [start, stop), float32 or float64, in place from without the adapter to with it."""
        ...


@dataclass(frozen=True)
class LowRank:
    """scale·B·A, or its transpose for layers that store (in, out): LoRA (Hu et al., 2021, eq. 3)."""

    adapter: Checkpoint
    a: str
    b: str
    scale: float
    transposed: bool

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> None:
        right = _factor(self.adapter, self.b if self.transposed else self.a, rows.dtype)
        if self.transposed:
            left, right = _factor(self.adapter, self.a, rows.dtype)[:, start:stop].T, right.T
        else:
            left = self.adapter.read(self.b, start, stop).to(rows.dtype)
        rows.addmm_(left, right, alpha=self.scale)


@lru_cache(maxsize=4)  # the slices of one tensor come one after another, and each needs the whole factor
def _factor(adapter: Checkpoint, key: str, dtype: torch.dtype) -> torch.Tensor:
    return adapter.read_whole(key).to(dtype)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained whole: `modules_to_save`, or biases with `bias="all"`."""

    adapter: Checkpoint
    key: str

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> None:
        rows.copy_(self.adapter.read(self.key, start, stop))


@dataclass(frozen=True)
class Architecture:
    """The model that a config describes, without weights.

    Attributes:
        shapes: parameter and buffer names in memory → shape.
        tied: name → the name that it shares its tensor with (`lm_head.weight` → `model.embed_tokens.weight`).
        prefix: `base_model_prefix`, which some checkpoints leave out (`transformer.` in GPT-2's).
        transposed: modules that store their weight as (in, out).
        model_class: transformers' class.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    prefix: str
    transposed: frozenset[str]
    model_class: type

    @classmethod
    def of(cls, folder: Path, trust_remote_code: bool = False) -> Architecture:
        """Build from `folder/config.json`. Raises DeraError where transformers does not know the architecture."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, OSError, KeyError, AttributeError, TypeError, ImportError) as error:
            raise DeraError(f"transformers cannot build the model that {folder}/config.json describes: {error}") from error
        return cls(
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            dict(getattr(model, "all_tied_weights_keys", None) or {}),
            f"{model.base_model_prefix}.",
            frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
            type(model),
        )

    def stored_name(self, name: str, stored: Any) -> str | None:
        """The name in `stored` of the tensor `name`, with or without the base model's prefix; None if there is none."""
        for candidate in (name, f"{self.prefix}{name}", name.removeprefix(self.prefix)):
            if candidate in stored:
                return candidate
        return None

    def owner(self, name: str) -> str | None:
        """The tensor that `name` shares by the config, or None."""
        return self.tied.get(name) or self.tied.get(f"{self.prefix}{name}")


@dataclass
class Adapter:
    """A PEFT adapter on disk: its config, its tensors, and what it does to a base checkpoint.

    Attributes:
        unmergeable: why it has no weight-space form here (then exact decoding, through PEFT, still works), or None.
    """

    folder: Path
    allow_pickle: bool = False
    config: dict[str, Any] = field(init=False)
    unmergeable: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.config = load_json(self.folder / "adapter_config.json")
        if not isinstance(self.config, dict) or "peft_type" not in self.config:
            raise DeraError(f"{self.folder}/adapter_config.json names no peft_type; is this a PEFT adapter?")
        self.unmergeable = self._why_unmergeable()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder, "adapter_model", self.allow_pickle)

    @property
    def base_name(self) -> str | None:
        return self.config.get("base_model_name_or_path")

    @property
    def kind(self) -> str:
        """What to call it: `LORA r=16`, say."""
        rank = f" r={self.config['r']}" if self.config["peft_type"] == "LORA" and "r" in self.config else ""
        return f"{self.config['peft_type']}{rank}"

    @property
    def changes_base_at_load(self) -> bool:
        """PiSSA, OLoRA, LoftQ and their kind, unless converted, rewrite the base weights when PEFT loads them."""
        return self.config.get("init_lora_weights", True) not in _HARMLESS_INIT

    def _why_unmergeable(self) -> str | None:
        config = self.config
        if config["peft_type"] != "LORA":
            return f"{config['peft_type']} adapters are not merged yet"
        for key, what in (
            ("use_dora", "DoRA"),
            ("use_qalora", "QA-LoRA"),
            ("alora_invocation_tokens", "activated LoRA"),
            ("layer_replication", "layer replication"),
            ("lora_bias", "lora_bias"),
            ("trainable_token_indices", "trainable_token_indices"),
            ("target_parameters", "target_parameters"),
            ("ensure_weight_tying", "ensure_weight_tying"),
            ("use_bdlora", "BD-LoRA"),
            ("arrow_config", "Arrow"),
        ):
            if config.get(key):
                return f"LoRA with {what} is not merged yet"
        if self.changes_base_at_load:
            return f"LoRA with init_lora_weights={config['init_lora_weights']!r} changes the base when it is loaded"
        return None

    def bind(self, architecture: Architecture) -> dict[str, list[Piece]]:
        """What this adapter does, by parameter name in memory.

        Raises:
            DeraError: the adapter cannot be merged, does not fit the architecture, or its file does not match its
                config: an unknown key, half of a pair, a rank other than stated, a value that is not finite.
        """
        if self.unmergeable:
            raise DeraError(f"{self.folder}: {self.unmergeable}; decode it exactly, or merge it with PEFT first")
        modules: dict[str, dict[str, str]] = {}
        for key in self.checkpoint.tensors:
            found = _SUFFIX.search(key)
            if not key.startswith(_PREFIX) or not found:
                raise DeraError(f"{self.folder}: key {key!r} is none that a LoRA adapter has")
            modules.setdefault(key[len(_PREFIX) : found.start()], {})[found.group(1)] = key
            if not torch.isfinite(self.checkpoint.read_whole(key).float()).all():
                raise DeraError(f"{self.folder}: tensor {key} holds NaN or infinity; the adapter is broken")
        pieces: dict[str, list[Piece]] = {}
        for module, keys in modules.items():
            for name, piece in self._pieces(module, keys, architecture):
                pieces.setdefault(name, []).append(piece)
        if not pieces:
            raise DeraError(f"{self.folder} holds no tensors; the adapter changes nothing")
        return pieces

    def _pieces(self, module: str, keys: dict[str, str], architecture: Architecture) -> list[tuple[str, Piece]]:
        weight = f"{module}.weight"
        pieces: list[tuple[str, Piece]] = []
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if a not in keys and b not in keys:
                continue
            if a not in keys or b not in keys:
                raise DeraError(f"{self.folder}: module {module} has {a if a in keys else b} but no {b if a in keys else a}")
            pieces.append((weight, self._low_rank(module, keys.pop(a), keys.pop(b), architecture)))
        for suffix, key in keys.items():
            if suffix not in ("weight", "bias") or not self._saved_whole(module, suffix):
                raise DeraError(f"{self.folder}: key {key} is not merged yet; decode it exactly, or merge it with PEFT")
            name = f"{module}.{suffix}"
            self._fits(name, self.checkpoint.tensors[key].shape, architecture)
            pieces.append((name, Replacement(self.checkpoint, key)))
        return pieces

    def _low_rank(self, module: str, a: str, b: str, architecture: Architecture) -> LowRank:
        shape_a, shape_b = self.checkpoint.tensors[a].shape, self.checkpoint.tensors[b].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_b[1] != shape_a[0]:
            raise DeraError(f"{self.folder}: {module} has A of shape {shape_a} and B of {shape_b}, which do not multiply")
        (rank, into), (out, _) = shape_a, shape_b
        stated = self._pattern("rank_pattern", module, self.config.get("r"))
        if rank != stated:
            raise DeraError(f"{self.folder}: {module} has rank {rank}, but adapter_config.json says {stated}")
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise DeraError(f"{self.folder}: lora_alpha is {alpha!r}, expected a number")
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        transposed = "lora_embedding" in a or module in architecture.transposed
        self._fits(f"{module}.weight", (into, out) if transposed else (out, into), architecture)
        return LowRank(self.checkpoint, a, b, scale, transposed)

    def _fits(self, name: str, shape: tuple[int, ...], architecture: Architecture) -> None:
        if name not in architecture.shapes:
            raise DeraError(f"{self.folder} changes {name}, which the base model does not have; is it for another base?")
        if shape != architecture.shapes[name]:
            raise DeraError(
                f"{self.folder} does not fit the base: {name} is {list(architecture.shapes[name])} there, "
                f"the adapter's change has {list(shape)}"
            )

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first pattern that matches the module's end."""
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def _saved_whole(self, module: str, suffix: str) -> bool:
        saved = any(module == m or module.endswith(f".{m}") for m in self.config.get("modules_to_save") or ())
        return saved or (suffix == "bias" and self.config.get("bias", "none") != "none")
