"""What a PEFT adapter does to the tensors of a checkpoint: a low-rank sum, or a replacement.

An adapter names modules of the model in memory (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), a
checkpoint names tensors on disk. `Architecture`, the empty model that transformers builds from the config, says which
is which, which tensors are tied, and which layers store their weight transposed (GPT-2's Conv1D).
"""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import doors
from .checkpoint import Checkpoint, load_json, slices
from .errors import DeraError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Types of which PEFT merges a module from the adapter's tensors and that module's weight alone. The others have no weights
# to merge (prompts), or derive what they do from the base when they are loaded (OSF, PSOFT, FRoD, AdaMSS).
_THROUGH_PEFT = frozenset(
    "LORA ADALORA LOHA LOKR IA3 OFT BOFT VERA PVERA RANDLORA HRA FOURIERFT WAVEFT MISS VBLORA SHIRA LN_TUNING C3A DELORA "
    "GRALORA HIRA GLORA UNILORA TINYLORA ROAD DEFT PEANUT BEFT TRAINABLE_TOKENS".split()
)
# What LoRA configs say that our own sum s·BA does not cover, and PEFT's merge does.
_MORE_THAN_LOW_RANK = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
# What may be left at `init_lora_weights` without the base having been changed when the adapter was made.
_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_SUFFIX = re.compile(
    r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|base_layer\.weight|weight|bias)$"
)


# The base's embeddings, stored beside the adapter by `save_embedding_layers`.
_COPY = re.compile(r"(\.base_layer|embed_tokens|lm_head|wte|embed_in|embed_out)\.weight$")


# Matches patterns in a process of its own, because Python's re cannot be stopped.
_TRY = "import json, re, sys; ps, ns = json.load(sys.stdin); [re.match(p, n) for p in ps for n in ns]"
_PATIENCE = 10  # seconds


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


@dataclass(frozen=True, eq=False)
class ThroughPeft:
    """A parameter of a module that PEFT merges: DoRA, OFT, IA³ and whatever else is no plain sum s·BA."""

    modules: PeftModules
    module: str
    parameter: str

    def apply(self, rows: torch.Tensor, start: int, stop: int) -> None:
        merged = self.modules.merged(self.module)[self.parameter]
        rows.copy_(merged.reshape(-1, *rows.shape[1:])[start:stop])


class PeftModules:
    """The adapted modules of a model that has no weights: PEFT merges each when its base weight is put in.

    The model is built of zeros that take no memory, so what is held is the adapter, and one module at a time.

    Args:
        adapter: whose modules.
        read_base: gives the whole base tensor of a parameter, by its name in memory, in float32.
    """

    def __init__(self, adapter: Adapter, read_base: Callable[[str], torch.Tensor], model: PreTrainedModel) -> None:
        self._read_base = read_base
        self._adapter = adapter
        self._lock = Lock()
        self._latest: tuple[str, dict[str, torch.Tensor]] | None = None
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        _hollow(model)
        root = adapter.load_onto(model, "cpu").get_base_model()
        self.modules: dict[str, torch.nn.Module] = {}
        for name, module in root.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in self.modules)
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
                self.modules[name] = module

    def parameters(self) -> Iterator[tuple[str, str]]:
        """(module, parameter) of everything that the adapter may change."""
        for name, module in self.modules.items():
            for parameter, _ in _base_of(module).named_parameters():
                yield name, parameter

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of one module with the adapter in them, float32. Raises DeraError where PEFT cannot merge it."""
        with self._lock:  # the slices of one tensor are asked for by several threads, one after another
            if self._latest is None or self._latest[0] != name:
                self._latest = None
                self._latest = (name, self._merge(name))
            return self._latest[1]

    def _merge(self, name: str) -> dict[str, torch.Tensor]:
        module = self.modules[name]
        weights = {
            id(hollow): torch.nn.Parameter(self._read_base(f"{name}.{parameter}"), requires_grad=False)
            for parameter, hollow in _base_of(module).named_parameters()
        }
        twin = copy.deepcopy(module, dict(weights))
        try:
            if hasattr(twin, "unload_and_optionally_merge_module"):
                done = twin.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                twin.merge()
                done = twin.get_base_layer()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise DeraError(f"{self._adapter.folder}: PEFT cannot merge {name}: {error}; decode exactly") from error
        return {parameter: merged.detach().float() for parameter, merged in done.named_parameters()}


def _base_of(module: Any) -> torch.nn.Module:
    doors.check("adapters", module)
    if hasattr(module, "token_adapter"):
        return module.token_adapter.get_base_layer()
    return module.original_module if hasattr(module, "original_module") else module.get_base_layer()


def _hollow(model: torch.nn.Module) -> None:
    """Put zeros that share one element in the place of all parameters and buffers."""
    for module in model.modules():
        every = {"recurse": False, "remove_duplicate": False}
        tensors = [*module.named_parameters(**every), *module.named_buffers(**every)]
        for name, tensor in tensors:
            zeros = torch.zeros((), dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
            hollow = zeros.expand(tensor.shape)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(module, name, torch.nn.Parameter(hollow, requires_grad=False) if is_parameter else hollow)


@dataclass(frozen=True)
class Architecture:
    """The model that a config describes, without weights.

    Attributes:
        shapes: parameter and buffer names in memory → shape.
        tied: name → the name that it shares its tensor with (`lm_head.weight` → `model.embed_tokens.weight`).
        prefix: `base_model_prefix`, which some checkpoints leave out (`transformer.` in GPT-2's).
        transposed: modules that store their weight as (in, out).
        linear: linear modules, the head left out.
        model_class: transformers' class.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    prefix: str
    transposed: frozenset[str]
    linear: tuple[str, ...]
    model_class: type

    @classmethod
    def of(cls, folder: Path, trust_remote_code: bool = False) -> Architecture:
        """Build from `folder/config.json`. Raises DeraError where transformers does not know the architecture."""
        from transformers.pytorch_utils import Conv1D

        model = empty_model(folder, trust_remote_code)
        if not trust_remote_code:  # a checkpoint's own code may never have set what is asked for
            doors.check("models", model)
        head = model.get_output_embeddings()
        return cls(
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            dict(getattr(model, "all_tied_weights_keys", None) or {}),
            f"{model.base_model_prefix}.",
            frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
            tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head),
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


def empty_model(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that `folder/config.json` describes, on the meta device. Raises DeraError where transformers cannot."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise DeraError(f"transformers cannot build the model that {folder}/config.json describes: {error}") from error


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
    def trained_on(self) -> str | None:
        """The quantisation of the base that it was trained on, where its config records one that we know."""
        settings = self.config.get("quantization_config")
        if not isinstance(settings, dict) or not settings.get("load_in_4bit"):
            return None
        double = "-double" if settings.get("bnb_4bit_use_double_quant") else ""
        return f"{settings.get('bnb_4bit_quant_type', 'fp4')}{double}"

    @property
    def kind(self) -> str:
        """What to call it: `LORA r=16`, say."""
        rank = f" r={self.config['r']}" if self.config["peft_type"] == "LORA" and "r" in self.config else ""
        return f"{self.config['peft_type']}{rank}"

    @property
    def changes_base_at_load(self) -> bool:
        """PiSSA, OLoRA, LoftQ and their kind, unless converted, rewrite the base weights when PEFT loads them."""
        return self.config.get("init_lora_weights", True) not in _HARMLESS_INIT

    @property
    def brings_base_tensors(self) -> bool:
        """`save_embedding_layers` puts the base's embeddings beside the adapter; PEFT writes them into the base."""
        return any(_COPY.search(key) for key in self.checkpoint.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether all that it does are sums s·BA and tensors that were trained whole."""
        return self.config["peft_type"] == "LORA" and not any(self.config.get(key) for key in _MORE_THAN_LOW_RANK)

    def _why_unmergeable(self) -> str | None:
        config = self.config
        if config["peft_type"] not in _THROUGH_PEFT:
            return f"{config['peft_type']} adapters are not merged"
        for key, what in (
            ("use_qalora", "QA-LoRA"),
            ("alora_invocation_tokens", "activated LoRA"),
            ("layer_replication", "layer replication"),
            ("ensure_weight_tying", "ensure_weight_tying"),
            ("use_bdlora", "BD-LoRA"),
            ("arrow_config", "Arrow"),
        ):
            if config.get(key):
                return f"LoRA with {what} is not merged"
        if self.changes_base_at_load:
            return f"LoRA with init_lora_weights={config['init_lora_weights']!r} changes the base when it is loaded"
        return None

    def _check_patterns(self, names: Iterable[str]) -> None:
        """Refuse a pattern that takes for ever on these module names: some regular expressions do, by design or not."""
        config = self.config
        patterns = [value for key in ("target_modules", "exclude_modules") if isinstance(value := config.get(key), str)]
        patterns += [key for name in ("rank_pattern", "alpha_pattern") for key in config.get(name) or {}]
        doubtful = [pattern for pattern in patterns if re.search(r"[+*{]", pattern)]
        if not doubtful:
            return
        work = json.dumps([[rf"(.*\.)?({pattern})$" for pattern in doubtful], sorted(names)])
        try:
            subprocess.run([sys.executable, "-I", "-c", _TRY], input=work.encode(), timeout=_PATIENCE, check=True,
                           capture_output=True)  # fmt: skip
        except subprocess.TimeoutExpired:
            what = f"has a pattern that takes for ever to match: {doubtful[0]!r}"
            raise DeraError(f"{self.folder}/adapter_config.json {what}") from None
        except subprocess.CalledProcessError:
            raise DeraError(f"{self.folder}/adapter_config.json has a pattern that is none: {doubtful[0]!r}") from None

    def load_onto(self, model: PreTrainedModel, device: str | torch.device) -> PeftModel:
        """PEFT's own model of a base and this adapter.

        Raises:
            DeraError: PEFT cannot load it, would leave a module at the base in silence, or it has no weights to mix.
        """
        from peft import PeftModel, get_peft_model_state_dict

        doors.check("adapters")
        stored = self.checkpoint.tensors.keys()  # before PEFT reads: pickles need permission
        self._check_patterns(name for name, _ in model.named_modules())
        try:
            adapted = PeftModel.from_pretrained(model, self.folder, torch_device=str(device))
        except (ValueError, OSError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise DeraError(f"PEFT cannot load {self.folder}: {error}") from error
        if adapted.active_peft_config.is_prompt_learning:
            raise DeraError(f"{self.folder} is a {self.config['peft_type']} adapter, which has no weights to mix")
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        copies = {key for key in stored if _COPY.search(key)} & adapted.state_dict().keys()
        if odd := sorted(expected ^ (stored - copies)):
            where = "lacks" if odd[0] in expected else "has a key that the base has no place for:"
            raise DeraError(f"{self.folder} {where} {odd[0]}; PEFT would silently use the base there")
        return adapted

    def bind(
        self, architecture: Architecture, read_base: Callable[[str], torch.Tensor], build: Callable[[], PreTrainedModel]
    ) -> dict[str, list[Piece]]:
        """What this adapter does, by parameter name in memory.

        Args:
            architecture: of the base.
            read_base: gives the whole base tensor of a parameter in float32.
            build: makes the empty model.

        Raises:
            DeraError: the adapter cannot be merged, does not fit the architecture, or its file does not match its
                config: an unknown key, half of a pair, a rank other than stated, a value that is not finite.
        """
        if self.unmergeable:
            raise DeraError(f"{self.folder}: {self.unmergeable}; decode it exactly, or merge it with PEFT first")
        for key, info in self.checkpoint.tensors.items():
            if info.dtype.is_floating_point and not all(
                self.checkpoint.read(key, *rows).float().isfinite().all() for rows in slices(info)
            ):
                raise DeraError(f"{self.folder}: tensor {key} holds NaN or infinity; the adapter is broken")
        if not self.checkpoint.tensors:
            raise DeraError(f"{self.folder} holds no tensors; the adapter changes nothing")
        pieces: dict[str, list[Piece]] = {}
        if self.is_plain:
            self._check_patterns({name.rpartition(".")[0] for name in architecture.shapes})
            modules: dict[str, dict[str, str]] = {}
            for key in self.checkpoint.tensors:
                found = _SUFFIX.search(key)
                if not key.startswith(_PREFIX) or not found:
                    raise DeraError(f"{self.folder}: key {key!r} is none that a LoRA adapter has")
                modules.setdefault(key[len(_PREFIX) : found.start()], {})[found.group(1)] = key
            for module, keys in modules.items():
                for name, piece in self._pieces(module, keys, architecture):
                    pieces.setdefault(name, []).append(piece)
        else:
            adapted = PeftModules(self, read_base, build())
            for module, parameter in adapted.parameters():
                name = f"{module}.{parameter}"
                if not self._is_tied_copy(module, name, architecture, adapted):
                    pieces[name] = [ThroughPeft(adapted, module, parameter)]
        return pieces

    def _is_tied_copy(self, module: str, name: str, architecture: Architecture, adapted: PeftModules) -> bool:
        """Trained tokens of tied embeddings: PEFT changes both ends alike, and the output keeps one tensor."""
        owner = architecture.owner(name)
        both = (adapted.modules.get(end.removesuffix(".weight")) for end in (name, owner) if end)
        return owner is not None and all(hasattr(end, "token_adapter") for end in both)

    @property
    def keeps_ties(self) -> bool:
        """Whether a change of one end of a tie is meant for the other too."""
        return bool(self.config.get("trainable_token_indices"))

    def _pieces(self, module: str, keys: dict[str, str], architecture: Architecture) -> list[tuple[str, Piece]]:
        weight = f"{module}.weight"
        pieces: list[tuple[str, Piece]] = []
        for copied in ("base_layer.weight", "weight"):  # first: the sum is on top of it
            trained = copied == "weight" and self._saved_whole(module, "weight")
            if copied in keys and not trained and _COPY.search(keys[copied]):
                self._fits(weight, self.checkpoint.tensors[keys[copied]].shape, architecture)
                pieces.append((weight, Replacement(self.checkpoint, keys.pop(copied))))
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
        ends = tuple(self.config.get("modules_to_save") or ())  # PEFT's rule: "norm" is every norm, "mlp" all within
        parts = module.split(".")
        saved = any(".".join(parts[: count + 1]).endswith(ends) for count in range(len(parts)))
        return saved or (suffix == "bias" and self.config.get("bias", "none") != "none")
