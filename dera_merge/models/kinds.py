"""Which kinds of model are taken, and which of transformers' classes is a config's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError
from .source import Source
from .trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_kind(source: Source, config: dict[str, Any]) -> None:
    """Raise DeraError where a config is not that of a decoder that writes text, alone or with images as input."""
    names = config.get("architectures") or []
    name = str(names[0]) if names else "a model that names no architecture"
    if config.get("is_encoder_decoder") or name == "VisionEncoderDecoderModel":
        kind = "an encoder-decoder model"
    elif "Diffusion" in name:
        kind = "a diffusion model"
    elif is_text_decoder(name) or is_wrapped(name, config.get("model_type")):
        return
    elif any(key in config for key in ("audio_config", "audio_encoder_config", "encoder_config", "codec_config")):
        kind = "an audio model"
    else:
        kind = "not a causal language model"
    raise DeraError(
        f"{source.name} is {name}, {kind}; dera-merge takes decoders that write text, with or without images as input"
    )


def is_text_decoder(name: str) -> bool:
    """Whether a class is a causal language model by its name."""
    return name.endswith(("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "BertGenerationDecoder"))


def is_wrapped(name: str, model_type: str | None) -> bool:
    """Whether transformers knows a class as a text decoder that also reads images.

    Args:
        name: of the class, maybe an older one for it (`…ForConditionalGeneration`).
        model_type: of its config.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    return name in CLASSES.values() or (name.endswith("ForConditionalGeneration") and model_type in CLASSES)


def sees_images(config: dict[str, Any]) -> bool:
    """Whether a config is of a class that wraps a text decoder and reads images too."""
    name = str((config.get("architectures") or [""])[0])
    return is_wrapped(name, config.get("model_type")) and not is_text_decoder(name)


def model_class(config: PreTrainedConfig) -> Any:
    """What loads the class that a config's `architectures` names: an Auto class of transformers, or the class itself.

    Some classes (`Emu3ForCausalLM`, `MllamaForCausalLM`) have no place in any of the Auto classes' tables.
    """
    import transformers

    name = (config.architectures or [""])[0]
    if sees_images({"architectures": config.architectures, "model_type": config.model_type}):
        auto, classes = transformers.AutoModelForImageTextToText, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    else:
        auto, classes = transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    known = type(config) in classes or hasattr(config, "auto_map")
    return auto if known else getattr(transformers, name, auto)


def config_of(folder: Path, trust: Trust) -> PreTrainedConfig:
    """transformers' config of the model in a folder. Raises DeraError where it makes none of config.json."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust.code)
    except Exception as error:  # whatever a config's own code or checks raise
        raise DeraError(f"transformers cannot load {folder}: {error}") from error


def text_config(folder: Path, config: dict[str, Any], trust: Trust) -> dict[str, Any]:
    """What a config says of the text decoder: all of it, or of a wrapped model the part that is the decoder's.

    Args:
        folder: where `config` lies.
        config: config.json.
        trust: whether code that comes with it may run.
    """
    nested = [key for key, value in config.items() if isinstance(value, dict) and key.endswith("_config")]
    if not set(nested) - {"quantization_config"}:
        return config
    try:
        return config_of(folder, trust).get_text_config(decoder=True).to_dict()
    except (DeraError, ValueError, AttributeError):
        inner = config.get("text_config")
        return config | inner if isinstance(inner, dict) else config
