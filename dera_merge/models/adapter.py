"""A PEFT adapter on disk, and what it does to the tensors of a checkpoint.

An adapter names modules of the model in memory (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`), a
checkpoint names tensors on disk. `Architecture` says which is which, which tensors are tied, and which layers store
their weight transposed (GPT-2's Conv1D).
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, KeysView
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeraError
from ..files.atomic import load_json
from ..files.checkpoint import Checkpoint, slices
from ..files.places import instead
from . import doors
from .architecture import LOADING, Architecture
from .damage import COPY, PREFIX, missing_modules, same_place
from .pieces import LowRank, PeftModules, Piece, Replacement

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Types of which PEFT merges a module from the adapter's tensors and that module's weight alone. The others have no
# weights to merge (prompts), or derive what they do from the base when they are loaded (OSF, PSOFT, FRoD, AdaMSS).
_THROUGH_PEFT = frozenset(
    "LORA ADALORA LOHA LOKR IA3 OFT BOFT VERA PVERA RANDLORA HRA FOURIERFT WAVEFT MISS VBLORA SHIRA LN_TUNING C3A "
    "DELORA GRALORA HIRA GLORA UNILORA TINYLORA ROAD DEFT PEANUT BEFT TRAINABLE_TOKENS".split()
)
# Settings that make LoRA more than a sum s·BA; PEFT merges such modules.
_MORE_THAN_LOW_RANK = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
# Values of `init_lora_weights` with which the base was not changed when the adapter was made.
_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")
_KINDS: dict[str, Any] = {  # of settings that are looked at
    "base_model_name_or_path": str, "r": int, "target_modules": list | str, "exclude_modules": list | str,
    "modules_to_save": list, "rank_pattern": dict, "alpha_pattern": dict, "peft_version": str,
}  # fmt: skip
_SUFFIX = re.compile(
    r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|base_layer\.weight|weight|bias)$"
)
# Matches patterns in a process of its own, because Python's re cannot be stopped.
_TRY = "import json, re, sys; ps, ns = json.load(sys.stdin); [re.match(p, n) for p in ps for n in ns]"
_PATIENCE = 10  # seconds


@dataclass
class Adapter:
    """A PEFT adapter on disk: its config, its tensors, and what it does to a base checkpoint.

    Attributes:
        folder: where it lies.
        allow_pickle: read `.bin` files where there is no safetensors file.
        config: its adapter_config.json.
        unmergeable: why it has no weight-space form here (then exact decoding, through PEFT, still works), or None.
    """

    folder: Path
    allow_pickle: bool = False
    config: dict[str, Any] = field(init=False)
    unmergeable: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.config = load_json(self.folder / "adapter_config.json")
        if not isinstance(self.config, dict) or not isinstance(self.config.get("peft_type"), str):
            raise DeraError(f"{self.folder}/adapter_config.json names no peft_type{instead(self.folder)}")
        for key, kind in _KINDS.items():
            if not isinstance(value := self.config.get(key), kind | None):
                raise DeraError(f"{self.folder}/adapter_config.json: {key} is {value!r}, which PEFT does not take")
        self.unmergeable = self._why_unmergeable()

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The adapter's tensors."""
        return Checkpoint(self.folder, "adapter_model", self.allow_pickle)

    @property
    def base_name(self) -> str | None:
        """The base that its config names."""
        return self.config.get("base_model_name_or_path")

    def named_places(self) -> list[Path]:
        """Directories that the name of its base may mean: relative to the adapter, then to the working directory."""
        places = [self.folder / self.base_name, Path(self.base_name)] if self.base_name else []
        return [place for place in places if place.is_dir()]

    @property
    def is_sum_on_layers(self) -> bool:
        """Whether all that it does are sums s·BA, so that PEFT can have it beside another one on one set of layers."""
        other = self.config.get("modules_to_save") or self.config.get("bias", "none") != "none"
        return self.is_plain and not other and not self.changes_base_at_load and not self.brings_base_tensors

    @property
    def settings(self) -> dict[str, Any]:
        """What its config says of what it computes."""
        irrelevant = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
        return {key: value for key, value in self.config.items() if key not in irrelevant}

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
        """Its type, and rank if any, for messages: `LORA r=16`, say."""
        rank = f" r={self.config['r']}" if self.config["peft_type"] == "LORA" and "r" in self.config else ""
        return f"{self.config['peft_type']}{rank}"

    @property
    def changes_base_at_load(self) -> bool:
        """Whether PEFT rewrites the base weights when it loads this: PiSSA, OLoRA, LoftQ, … that were not converted."""
        return self.config.get("init_lora_weights", True) not in _HARMLESS_INIT

    @property
    def brings_base_tensors(self) -> bool:
        """Whether it brings the base's embeddings (`save_embedding_layers`), which PEFT writes into the base."""
        return any(COPY.search(key) for key in self.checkpoint.tensors)

    @cached_property
    def keys(self) -> KeysView[str]:
        """The keys of its tensors that count.

        Of embeddings that grew and were trained whole, PEFT stores each three times: plainly, which counts, and under
        the two names of its wrapper's parts.
        """
        keys = self.checkpoint.tensors.keys()
        parts = {key: re.sub(r"\.(modules_to_save|original_module)\.", ".", key) for key in keys}
        return dict.fromkeys(key for key in keys if parts[key] == key or parts[key] not in keys).keys()

    @cached_property
    def vocabulary_rows(self) -> int | None:
        """Rows of the embeddings that it brings whole, more or fewer than the base's; None: it brings none."""
        tensors = self.checkpoint.tensors
        return max((info.rows for key, info in tensors.items() if COPY.search(key)), default=None)

    def resized(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with as many rows of the vocabulary as this adapter's embeddings have, in place."""
        rows = self.vocabulary_rows
        if rows is not None and model.get_input_embeddings().weight.shape[0] != rows:
            with LOADING:
                model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    @property
    def is_plain(self) -> bool:
        """Whether all that it does are sums s·BA and tensors that were trained whole."""
        return self.config["peft_type"] == "LORA" and not any(self.config.get(key) for key in _MORE_THAN_LOW_RANK)

    def _why_unmergeable(self) -> str | None:
        config = self.config
        if config["peft_type"] not in _THROUGH_PEFT:
            return f"{config['peft_type']} adapters are not merged"
        for key, variant in (
            ("use_qalora", "QA-LoRA"),
            ("alora_invocation_tokens", "activated LoRA"),
            ("layer_replication", "layer replication"),
            ("ensure_weight_tying", "ensure_weight_tying"),
            ("use_bdlora", "BD-LoRA"),
            ("arrow_config", "Arrow"),
        ):
            if config.get(key):
                return f"LoRA with {variant} is not merged"
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
            problem = f"has a pattern that takes for ever to match: {doubtful[0]!r}"
            raise DeraError(f"{self.folder}/adapter_config.json {problem}") from None
        except subprocess.CalledProcessError:
            raise DeraError(f"{self.folder}/adapter_config.json has a pattern that is none: {doubtful[0]!r}") from None

    def load_onto(self, model: PreTrainedModel | PeftModel, device: str | torch.device) -> PeftModel:
        """PEFT's own model of a base and this adapter.

        Args:
            model: the base; or PEFT's model of it with an adapter, which then acts together with this one.
            device: where the adapter goes.

        Raises:
            DeraError: PEFT cannot load it, would leave a module at the base in silence, or it has no weights to mix.
        """
        from peft import PeftModel, get_peft_model_state_dict

        doors.check("adapters")
        stored = self.keys  # before PEFT reads: pickles need permission
        self._check_patterns(name for name, _ in model.named_modules())
        try:
            with LOADING, warnings.catch_warnings():
                # PEFT asks transformers for a name that is going to be another; nothing that a user could change.
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
                if isinstance(model, PeftModel):
                    adapted, name = model, "on top"
                    adapted.load_adapter(self.folder, name, torch_device=str(device))
                    adapted.base_model.set_adapter([*adapted.active_adapters, name], inference_mode=True)
                else:
                    name = "default"
                    adapted = PeftModel.from_pretrained(model, self.folder, torch_device=str(device))
        except (ValueError, OSError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise DeraError(f"PEFT cannot load {self.folder}: {error}") from error
        if adapted.peft_config[name].is_prompt_learning:
            raise DeraError(f"{self.folder} is a {self.config['peft_type']} adapter, which has no weights to mix")
        expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False).keys()
        copies = {key for key in stored if COPY.search(key)} & adapted.state_dict().keys()
        if odd := sorted(expected ^ (self._as_peft_reads(adapted) - copies)):
            problem = "has a key that the base has no place for:" if odd[0] not in expected else "lacks"
            if odd[0] in stored:
                problem = "is read by PEFT under names of another release of transformers, which loses"
            raise DeraError(f"{self.folder} {problem} {odd[0]}; PEFT would silently use the base there")
        return adapted

    def _as_peft_reads(self, model: PeftModel | PreTrainedModel) -> set[str]:
        """The names that PEFT makes of those in the file, which may be those of another release of transformers."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        shapes = {key: torch.empty(self.checkpoint.tensors[key].shape, device="meta") for key in self.keys}
        if get_checkpoint_conversion_mapping(model.config.model_type) is None:
            return set(shapes)
        from peft import PeftType
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        kind = SimpleNamespace(peft_type=PeftType(self.config["peft_type"]))  # of the config it reads this alone
        try:
            return set(convert_peft_adapter_state_dict_for_transformers(model, kind, shapes))
        except (ValueError, RuntimeError):
            return set(shapes)

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
        if self.is_plain and self._as_peft_reads(architecture.model) == self.keys:
            self._check_patterns({name.rpartition(".")[0] for name in architecture.shapes})
            modules = self._modules()
            for module, keys in modules.items():
                for name, piece in self._pieces(module, keys, architecture):
                    pieces.setdefault(name, []).append(piece)
            if lacking := missing_modules(self.config, modules.keys(), architecture.linear, architecture.shapes):
                raise DeraError(f"{self.folder} lacks tensors of {len(lacking)} modules that its config names "
                                f"({lacking[0]}), which would stay the base's; save it again")  # fmt: skip
        else:  # PEFT knows what it does to the base, and the names that transformers 4 had for modules
            model = self.resized(build())
            written = self.brings_base_tensors
            adapted = PeftModules(self.folder, lambda model: self.load_onto(model, "cpu"), read_base, model, written)
            pieces |= {name: [piece] for name, piece in adapted.pieces()}
            for name, key in self._copies():
                if name in pieces:
                    raise DeraError(f"{self.folder} brings the base's {name} and changes it; decode it exactly")
                self._fits(name, self.checkpoint.tensors[key].shape, architecture)
                pieces[name] = [Replacement(self.checkpoint, key)]
        return pieces

    def _copies(self) -> Iterator[tuple[str, str]]:
        """The base's embeddings that it brings and did not train: (parameter name, key)."""
        for key in sorted(filter(COPY.search, self.keys)):
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            if not self._saved_whole(name.removesuffix(".weight"), "weight"):
                yield name, key

    def _modules(self) -> dict[str, dict[str, str]]:
        """The modules of a plain adapter: what follows their name in a key → the key."""
        modules: dict[str, dict[str, str]] = {}
        for key in self.keys:
            suffix = _SUFFIX.search(key)
            if not key.startswith(PREFIX) or not suffix:
                raise DeraError(f"{self.folder}: key {key!r} is none that a LoRA adapter has")
            modules.setdefault(key[len(PREFIX) : suffix.start()], {})[suffix.group(1)] = key
        return modules

    def _pieces(self, module: str, keys: dict[str, str], architecture: Architecture) -> list[tuple[str, Piece]]:
        """What is done to a module: (parameter name, piece). `keys`: what follows its name → the adapter's key."""
        weight = f"{module}.weight"
        pieces: list[tuple[str, Piece]] = []
        for copied in ("base_layer.weight", "weight"):  # first: the sum is on top of it
            trained = copied == "weight" and self._saved_whole(module, "weight")
            if copied in keys and not trained and COPY.search(keys[copied]):
                self._fits(weight, self.checkpoint.tensors[keys[copied]].shape, architecture)
                pieces.append((weight, Replacement(self.checkpoint, keys.pop(copied))))
        for a, b in self._take_factors(module, keys):
            pieces.append((weight, self._low_rank(module, a, b, architecture)))
        for suffix, key in keys.items():
            if suffix not in ("weight", "bias") or not self._saved_whole(module, suffix):
                raise DeraError(f"{self.folder}: key {key} is not merged yet; decode it exactly, or merge it with PEFT")
            name = f"{module}.{suffix}"
            self._fits(name, self.checkpoint.tensors[key].shape, architecture)
            pieces.append((name, Replacement(self.checkpoint, key)))
        return pieces

    def check_alone(self) -> None:
        """Check of a plain adapter what needs no base: pairs of factors, their shapes, ranks, scales.

        Raises:
            DeraError: its file does not match its config.
        """
        for module, keys in self._modules().items():
            for a, b in self._take_factors(module, keys):
                self._scale(module, a, b)

    def _take_factors(self, module: str, keys: dict[str, str]) -> list[tuple[str, str]]:
        """The keys of a module's factors A and B, which leave `keys`."""
        found = []
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if a not in keys and b not in keys:
                continue
            if a not in keys or b not in keys:
                raise DeraError(
                    f"{self.folder}: module {module} has {a if a in keys else b} but no {b if a in keys else a}"
                )
            found.append((keys.pop(a), keys.pop(b)))
        return found

    def _low_rank(self, module: str, a: str, b: str, architecture: Architecture) -> LowRank:
        """The sum s·BA of the factors under the keys `a` and `b`, after checks of shape, rank and scale."""
        scale = self._scale(module, a, b)
        into, out = self.checkpoint.tensors[a].shape[1], self.checkpoint.tensors[b].shape[0]
        transposed = "lora_embedding" in a or module in architecture.transposed
        self._fits(f"{module}.weight", (into, out) if transposed else (out, into), architecture)
        return LowRank(self.checkpoint, a, b, scale, transposed)

    def _scale(self, module: str, a: str, b: str) -> float:
        """The scale s of s·BA. Raises DeraError where the factors do not multiply, or are not as the config says."""
        shape_a, shape_b = self.checkpoint.tensors[a].shape, self.checkpoint.tensors[b].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_b[1] != shape_a[0]:
            raise DeraError(
                f"{self.folder}: {module} has A of shape {shape_a} and B of {shape_b}, which do not multiply"
            )
        rank = shape_a[0]
        stated = self._pattern("rank_pattern", module, self.config.get("r"))
        if rank < 1:
            raise DeraError(f"{self.folder}: {module} has rank 0, so it changes nothing; save the adapter again")
        if rank != stated:
            raise DeraError(f"{self.folder}: {module} has rank {rank}, but adapter_config.json says {stated}")
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha"))
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise DeraError(f"{self.folder}: lora_alpha is {alpha!r}, expected a number")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _fits(self, name: str, shape: tuple[int, ...], architecture: Architecture) -> None:
        """Raise DeraError where the base has no parameter of this name and shape."""
        if name not in architecture.shapes:
            twin = same_place(name, architecture.shapes)
            why = f"the base's is {twin}, so rename the adapter's keys" if twin else "is it for another base?"
            raise DeraError(f"{self.folder} changes {name}, which the base model does not have; {why}")
        grown = shape[:1] == (self.vocabulary_rows,) and shape[1:] == architecture.shapes[name][1:]
        if shape != architecture.shapes[name] and not (grown and COPY.search(name)):
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
        """Whether a module's weight or bias was trained whole."""
        ends = tuple(self.config.get("modules_to_save") or ())  # PEFT's rule: "norm" is every norm, "mlp" all within
        parts = module.split(".")
        saved = any(".".join(parts[: count + 1]).endswith(ends) for count in range(len(parts)))
        return saved or (suffix == "bias" and self.config.get("bias", "none") != "none")
