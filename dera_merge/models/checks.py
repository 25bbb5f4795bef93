"""Whether two models belong together, as far as their configs say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import DeraError, warn
from .damage import check_adapter, check_full
from .kinds import config_of
from .side import Side
from .trust import NOTHING, Trust

# Keys that give the weights their meaning without changing a shape.
_SAME_MEANING = (
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "head_dim",
    "hidden_act",
    "activation_function",
)
# Keys that may differ between two checkpoints of one model without changing what it computes.
_MAY_DIFFER = re.compile(
    r"transformers_version|_name_or_path|use_cache|.*token_id|vocab_size|max_position_embeddings|.*dropout.*|.*pdrop"
    r"|initializer.*|dtype|torch_dtype|architectures|tie_word_embeddings|pretraining_tp|quantization_config|auto_map"
    r"|task_specific_params|_attn_.*|return_dict|output_.*|unsloth.*"
)


def check_configs(ref: Side, aligned: Side, trust: Trust = NOTHING) -> None:
    """Warn where two configs differ in what may matter. Raises DeraError where they are of different models.

    Releases of transformers write different keys for one model, and spell some otherwise. So what two files say is
    compared first, which takes no time, and where that differs, what transformers makes of them. Of a text model beside
    a wrapped one it is what both say of the text decoder.
    """
    in_ref, in_aligned = (_flat(side.config) for side in (ref, aligned))
    if _differing(in_ref, in_aligned):
        mixed = len({"text_config" in side.config for side in (ref, aligned)}) == 2
        built = [_as_built(side, trust, mixed) for side in (ref, aligned)]
        if built[0] is not None and built[1] is not None:
            in_ref, in_aligned = (_flat(config) for config in built)
    keys = [key for key in in_ref | in_aligned if key.rpartition(".")[2] in _SAME_MEANING]
    for key in ("architectures", "model_type", *keys):
        if in_ref.get(key) != in_aligned.get(key):
            raise DeraError(
                f"the two are different models: {key} is {in_ref.get(key)!r} in {ref.base.name} "
                f"and {in_aligned.get(key)!r} in {aligned.base.name}"
            )
    if differing := _differing(in_ref, in_aligned):
        key = differing[0]
        warn(f"config.json differs in {', '.join(differing)} ({key}: {in_ref.get(key)!r} in REF, "
             f"{in_aligned.get(key)!r} in ALIGNED); a merged checkpoint takes REF's")  # fmt: skip


def check_files(side: Side) -> None:
    """Warn of what an adapter asks for and nobody does. Raises DeraError where a side was not saved as it should be."""
    check_full(side.base.name, side.checkpoint)
    if side.adapter:
        check_adapter(side.source.name, side.adapter.config, side.adapter.checkpoint)


def check_apart(ref: Side, aligned: Side) -> None:
    """Raise DeraError where both sides are one model: Δ = 0, and every λ would be the reference."""
    if bool(ref.adapter) != bool(aligned.adapter):
        return
    if ref.adapter and aligned.adapter:
        same = ref.adapter.settings == aligned.adapter.settings
        same = same and ref.adapter.checkpoint.is_copy_of(aligned.adapter.checkpoint)
    else:
        same = True
    if same and ref.checkpoint.is_copy_of(aligned.checkpoint):
        unread = aligned.checkpoints[-1].unread()
        beside = f" ({unread[0].name} beside them is not read)" if unread else ""
        raise DeraError(f"{ref.source.name} and {aligned.source.name} have the same weights{beside}: Δ = 0, and every "
                        "λ is the reference; give the model that was trained")  # fmt: skip


def _differing(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The keys in which two configs differ and that may change what a model computes."""
    keys = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
    return [key for key in keys if not any(map(_MAY_DIFFER.fullmatch, key.split(".")))]


def _as_built(side: Side, trust: Trust, text: bool) -> dict[str, Any] | None:
    """A config, or its text decoder's, with all that transformers fills in; None where it does not know the model."""
    try:
        config = config_of(side.base.folder, trust)
        return config.get_text_config(decoder=True).to_dict() | {"architectures": None} if text else config.to_dict()
    except (DeraError, ValueError, AttributeError):
        return None


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """A config with those of its parts (`text_config`, `vision_config`) laid open: `text_config.hidden_act`, say."""
    flat = {}
    for key, value in _with_one_rope(config).items():
        if isinstance(value, dict) and key.endswith("_config"):
            flat |= {f"{key}.{inner}": part for inner, part in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _with_one_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its rotary embedding under one key; transformers 4 and 5 spell it differently."""
    config = dict(config)
    theta, scaling = config.pop("rope_theta", None), config.pop("rope_scaling", None)
    rope = dict(config.pop("rope_parameters", None) or scaling or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", theta)
    return {**config, "rope": rope} if rope["rope_theta"] is not None or len(rope) > 2 else config


def base_quantization_of(sides: Sequence[Side], asked: str | None) -> str | None:
    """What the adapters' base was quantised to when they were trained; None where nothing says so.

    Args:
        sides: the reference and each aligned model.
        asked: what the user says, `"none"` included; None leaves it to what the adapters' configs record.

    Raises:
        DeraError: it is asked for and there are no adapters, or they were trained on different bases.
    """
    ref, *aligned = sides
    if asked and asked != "none" and not ref.adapter and not all(side.adapter for side in aligned):
        raise DeraError("--base-quantization is for adapters, whose base was quantised when they were trained")
    if asked:
        return asked
    adapters = [side.adapter for side in sides if side.adapter]
    recorded = {kind for adapter in adapters if (kind := adapter.trained_on)}
    if len(recorded) > 1:
        raise DeraError(f"the adapters were trained on bases quantised differently ({', '.join(sorted(recorded))})")
    for adapter in adapters:
        if not recorded and re.search(r"4-?bit|nf4|qlora", f"{adapter.base_name} {adapter.folder.name}", re.I):
            warn(f"{adapter.folder} looks like QLoRA, trained on a 4-bit base; --base-quantization nf4 (or nf4-double) "
                 "merges onto that base, none onto the full one and hides this line")  # fmt: skip
    return next(iter(recorded), None)
