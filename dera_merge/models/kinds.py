"""Which kinds of model are taken."""

from __future__ import annotations

from typing import Any

from ..errors import DeraError
from .source import Source


def check_kind(source: Source, config: dict[str, Any]) -> None:
    """Raise DeraError where a config is not that of a causal text model."""
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
