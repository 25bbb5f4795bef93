"""What training and saving do to a model's files when they go wrong: told from names, shapes and an adapter's factors.

Every check is a function of a checkpoint or of settings, and says what to do. Those that `Pair` makes raise; `doctor`
asks for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DeraError, warn
from ..files.checkpoint import Checkpoint, TensorInfo, slices

# Heads of PPO and of reward training that are no part of the language model.
_VALUE_HEAD = re.compile(r"(v_head|value_head|ilql_heads)\.")
# Heads in the place of the one that makes tokens.
_OTHER_HEAD = re.compile(r"(^|\.)(score|classifier|qa_outputs)\.(modules_to_save\.)?(weight|bias|dense\.weight)$")
# What wrappers put before the names of everything inside of them, and what takes it away again.
_WRAPPERS = {
    "_orig_mod.": "torch.compile; save model._orig_mod",
    "module.": "DistributedDataParallel or DeepSpeed; save model.module",
    "_forward_module.": "Lightning; save its model",
    "_fsdp_wrapped_module.": "FSDP; gather a full state dict before saving",
    "_checkpoint_wrapped_module.": "activation checkpointing; save the model inside",
    "pretrained_model.": "a model with a value head (TRL's PPO); save model.pretrained_model",
    "base_model.model.": "PEFT; save_pretrained of the PeftModel makes an adapter, merge_and_unload a model",
    "policy.": "a trainer; save its model",
    "actor.": "a trainer; save its model",
}
_INSIDE = re.compile(r"\.(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|_flat_param")
_UNMERGED = re.compile(r"\.(base_layer|lora_[AB]|lora_embedding_[AB])(\.|$)")
_NAMED = re.compile(
    r"\.(lora_[AB]\.\w+\.weight|modules_to_save\.\w+\.(weight|bias)"
    r"|(lora_embedding_[AB]|(hada|lokr)_w[12](_[ab])?|ia3_l)\.\w+(\.weight)?)$"
)
_OWN = re.compile(r"(^|\.)(lora_|hada_|lokr_|ia3_l|oft_)")

PREFIX = "base_model.model."  # of an adapter's keys

# Types of which a module does nothing where one of its factors is zero (1 for IA3), as it is when training begins.
_IDLE = {"LORA": 0.0, "ADALORA": 0.0, "LOHA": 0.0, "LOKR": 0.0, "OFT": 0.0, "MISS": 0.0, "C3A": 0.0, "IA3": 1.0}
_FACTOR = re.compile(r"lora_(A|B|E|embedding_A|embedding_B)$|(hada|lokr)_w[12]|oft_R$|miss_block$|c3a_kernel$|ia3_l$")
# The base's embeddings, stored beside the adapter by `save_embedding_layers`.
COPY = re.compile(r"(\.base_layer|embed_tokens|lm_head|wte|embed_in|embed_out)\.weight$")
# Settings of LoRA that merging knows: that change nothing in what an adapter computes, or are looked at.
_KNOWN = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config "
    "trainable_token_indices eva_config corda_config lora_ga_config use_dora velora_config alora_invocation_tokens "
    "use_qalora qalora_group_size monteclora_config layer_replication runtime_config lora_bias target_parameters "
    "use_bdlora arrow_config kasa_config ensure_weight_tying quantization_config".split()
)


# Checkpoints


def is_value_head(name: str) -> bool:
    """Whether a tensor belongs to the head of a value function."""
    return bool(_VALUE_HEAD.match(name))


def leave_out_value_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the head of PPO's value function, which no language model has; says so."""
    if heads := sorted(filter(is_value_head, checkpoint.tensors)):
        warn(f"{checkpoint.folder} has a value head ({heads[0].partition('.')[0]}, {len(heads)} tensors), which no "
             "language model uses; it is left out")  # fmt: skip
        for name in heads:
            del checkpoint.tensors[name]
    return checkpoint


def why_empty(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why some tensors hold nothing, and what to do; None where all hold something."""
    empty = [name for name, info in tensors.items() if not info.numel]
    if not empty:
        return None
    shape = list(tensors[empty[0]].shape)
    if shape != [0]:
        return f"{empty[0]} has shape {shape}, so it holds nothing; save it again"
    return (
        f"{len(empty)} of its {len(tensors)} tensors are empty ({empty[0]} has shape [0]): this was saved under "
        "DeepSpeed ZeRO-3 without gathering the parameters; run its zero_to_fp32.py on the training checkpoint, or "
        "train with stage3_gather_16bit_weights_on_model_save"
    )


def why_wrapped(names: Collection[str]) -> str | None:
    """Why a full checkpoint's names are none that transformers reads, and what to do; None where none looks so."""
    own = [name for name in names if not is_value_head(name)]
    for prefix, origin in _WRAPPERS.items():
        if own and all(name.startswith(prefix) for name in own):
            return f"all its names begin with {prefix}, which is left by {origin}"
    if inside := next(filter(_INSIDE.search, own), None):
        return f"its tensors are named as inside of a wrapper ({inside}); save the model that is inside"
    if unmerged := next(filter(_UNMERGED.search, own), None):
        return (f"it holds an adapter that is not merged ({unmerged}); save_pretrained of the PeftModel makes an "
                "adapter, merge_and_unload a model")  # fmt: skip
    return None


def check_full(name: str, checkpoint: Checkpoint) -> None:
    """Raise DeraError where a full checkpoint was saved in a way that nothing reads."""
    if reason := why_empty(checkpoint.tensors) or why_wrapped(checkpoint.tensors):
        raise DeraError(f"{name}: {reason}")


# Adapters


def why_misnamed(keys: Collection[str]) -> str | None:
    """Why an adapter's keys are none that PEFT reads, and what to do; None where they look as they should."""
    if named := next(filter(_NAMED.search, keys), None):
        return (f"its keys have an adapter's name inside ({named}), so it is a state_dict(); PEFT reads what "
                "save_pretrained writes, and the base in the place of this")  # fmt: skip
    if twice := next((key for key in keys if key.startswith(2 * PREFIX)), None):
        return f"its keys begin twice with {PREFIX} ({twice}): a PeftModel of a PeftModel; save the inner one"
    if inside := next(filter(_INSIDE.search, keys), None):
        return f"its keys are named as inside of a wrapper ({inside}); save_pretrained of the model that is inside"
    if any(map(_OWN.search, keys)) and not any(key.startswith("base_model.") for key in keys):
        return (f"its keys do not begin with {PREFIX} ({next(iter(keys))}), so PEFT reads none of them; "
                "save it with save_pretrained of the PeftModel")  # fmt: skip
    return None


@dataclass(frozen=True)
class Idle:
    """What of an adapter changes nothing, whatever the base: `all` of it or a part, and `why`."""

    all: bool
    why: str


def find_idle(config: Mapping[str, Any], checkpoint: Checkpoint) -> Idle | None:
    """What of an adapter changes nothing; None where all of it changes something, or that cannot be told.

    Args:
        config: its adapter_config.json.
        checkpoint: its tensors.
    """
    if (idle := _IDLE.get(config["peft_type"])) is None or config.get("use_dora"):
        return None
    factors: dict[str, list[str]] = {}
    saved = config.get("modules_to_save") or ()
    trained_whole = False
    for key in checkpoint.tensors:
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        if _FACTOR.match(factor):
            factors.setdefault(module, []).append(key)
        else:
            trained_whole = trained_whole or factor in saved or not COPY.search(key)
    if factors and config.get("lora_alpha") == 0 and not config.get("alpha_pattern"):
        return Idle(not trained_whole, "its lora_alpha is 0")
    untouched = [found for keys in factors.values() if (found := _find_all(checkpoint, keys, idle))]
    if not untouched:
        return None
    kinds = " and ".join(sorted({key.removesuffix(".weight").rpartition(".")[2] for key in untouched}))
    value, whole = "one" if idle else "zero", len(untouched) == len(factors)
    if whole:
        return Idle(not trained_whole, f"all {len(factors)} of its {kinds} are {value}")
    return Idle(False, f"{kinds} of {len(untouched)} of its {len(factors)} modules are {value} ({untouched[0]})")


def _find_all(checkpoint: Checkpoint, keys: Iterable[str], value: float) -> str | None:
    """The first tensor that holds numbers of which each is `value`."""
    for key in keys:
        info = checkpoint.tensors[key]
        parts = [(0, 1), *slices(info)] if info.numel else []  # one row says it of most tensors
        if parts and all((checkpoint.read(key, *rows).float() == value).all() for rows in parts):
            return key
    return None


def missing_modules(
    config: Mapping[str, Any], held: Collection[str], linear: Iterable[str], names: Iterable[str]
) -> list[str]:
    """Modules of the base that an adapter's config names and its file has no tensors of; PEFT leaves the base there.

    Args:
        config: its adapter_config.json.
        held: the modules that it has tensors of.
        linear: the base's linear modules.
        names: of the base's tensors.
    """
    targets, saved = config.get("target_modules"), config.get("modules_to_save") or ()
    chosen = any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules"))
    ends = tuple(f".{target}" for target in targets) if isinstance(targets, list) and not chosen else ()
    lacking = [module for module in linear if f".{module}".endswith(ends) and module not in held]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    for name in saved:
        mine = [module for module in modules if f".{module}".endswith(f".{name}")]
        if mine and not any(f".{name}." in f".{module}." for module in held):
            lacking += mine
    return lacking


def same_place(name: str, names: Collection[str]) -> str | None:
    """The base's tensor that an adapter may mean by a name under another prefix; None where no layer ends like it."""
    parts = name.split(".")
    for first in range(1, len(parts)):
        tail = ".".join(parts[first:])
        if not any(part.isdecimal() for part in parts[first:]):
            return None
        if found := next((other for other in names if f".{other}".endswith(f".{tail}")), None):
            return found
    return None


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """Settings of an adapter that are on and that the installed PEFT does not know, and so leaves out."""
    on = [key for key, value in config.items() if value not in (None, False, 0, "", [], {})]
    odd = [key for key in on if key not in _KNOWN]
    if not odd and config["peft_type"] == "LORA":
        return []
    from dataclasses import fields

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(config["peft_type"])
    known = {field.name for field in fields(kind)} | {"quantization_config"} if kind else set(on)
    return sorted(key for key in odd if key not in known)


def why_no_language_model(config: Mapping[str, Any], keys: Collection[str]) -> str | None:
    """Why an adapter is of a model that writes no text, by the head that it brings; None where it brings none."""
    head = next((key for key in keys if _OTHER_HEAD.search(key)), None)
    kind = config.get("task_type") or "no task_type"
    return f"it brings a head that scores ({head}; {kind}), so it is of a reward model or classifier" if head else None


def why_unknown(config: Mapping[str, Any]) -> str | None:
    """That an adapter's config asks for what nobody does, and what to do; None where it does not."""
    if not (odd := unknown_settings(config)):
        return None
    return (f"sets {odd[0]}={str(config[odd[0]])[:40]}, which the installed PEFT does not know and leaves out; "
            f"install the PEFT that it was made with ({config.get('peft_version', 'a newer one')})")  # fmt: skip


def check_adapter(name: str, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Warn of settings that nobody knows. Raises DeraError where an adapter changes nothing, or was not saved whole."""
    if odd := why_unknown(config):
        warn(f"{name} {odd}")
    keys = checkpoint.tensors.keys()
    reason = why_empty(checkpoint.tensors) or why_misnamed(keys) or why_no_language_model(config, keys)
    if reason:
        raise DeraError(f"{name}: {reason}")
    idle = find_idle(config, checkpoint)
    if idle and idle.all:
        raise DeraError(
            f"{name} changes nothing: {idle.why}; the training was not saved, or there was none. Save it again"
        )
    if idle:
        warn(f"{name} leaves a part as it is: {idle.why}; if that was to be trained, save it again")
