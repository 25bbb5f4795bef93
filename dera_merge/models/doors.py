"""What this package uses of other libraries that they do not promise to keep: one table, each entry with its reason.

A release may rename any of these. `tests/models/test_doors.py` asks the installed libraries for each, and `check`
does so when a feature is used, so that nobody gets a wrong text, or a message that blames a model, where a library has
changed. Attributes that only instances have are checked where a feature has such an object at hand, else by the test
alone. What a library documents is not listed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from ..errors import DeraError

Use = Literal[
    "exact decoding", "adapters", "models", "compare", "exact DeRa in vLLM", "Model Runner V2", "benchmarks", "tests"
]  # fmt: skip
# Oldest and newest release that the tests ran with: the floors of pyproject.toml and the pins of constraints*.txt. Of
# vLLM they ran with one only.
TESTED = {
    "transformers": ("5.19.0", "5.24.0"),
    "peft": ("0.20.0", "0.21.2"),
    "torch": ("2.7.0", "2.13.0"),
    "vllm": ("0.32.0", "0.32.0"),
    "lm_eval": ("0.4.12", "0.4.13"),
}


@dataclass(frozen=True)
class Door:
    """One name of another library.

    Attributes:
        use: the feature that stops without it; `"tests"`: none does, tests and scripts alone need it.
        owner: where the name is: a module, or `module:Class`.
        name: of a class, function, method or attribute.
        why: what it is needed for.
        takes: arguments that we pass or receive by these names; `a|b` is one that was renamed.
        instance: whether only instances have it, not the class.
    """

    use: Use
    owner: str
    name: str
    why: str
    takes: tuple[str, ...] = ()
    instance: bool = False

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0].partition(":")[0]

    def find_owner(self) -> Any:
        """The module or class. Raises ImportError or AttributeError where it is gone."""
        module, _, name = self.owner.partition(":")
        imported = import_module(module)
        return getattr(imported, name) if name else imported

    def missing(self, *instances: Any) -> str | None:
        """What of it is gone, in words; None if it is there. `instances`: objects on which to look for attributes."""
        place = f"{self.owner.partition(':')[2] or self.owner}.{self.name}"
        try:
            owner = self.find_owner()
            holders = [instance for instance in instances if isinstance(instance, owner)] if self.instance else [owner]
            values = [getattr(holder, self.name) for holder in holders]
        except (ImportError, AttributeError):
            return place
        for value in values if self.takes else ():
            arguments = inspect.signature(getattr(value, "__func__", value)).parameters
            if gone := [names for names in self.takes if not set(names.split("|")) & arguments.keys()]:
                return f"the argument {gone[0].replace('|', ' or ')} of {place}"
        return None


_GENERATION = "transformers:GenerationMixin"
_MODEL = "transformers:PreTrainedModel"
_BATCHES = "it would decode the mixture as one model; it is refused under this name"
_ASKED = "the reference's own is asked: architectures answer in their own way"
_LOOK = "each model looks at images with its own tower"
_DECLARED = "declares which kinds of attention the models inside may have"
_OUTPUT = "transformers.modeling_outputs:CausalLMOutputWithPast"
_CACHE = "transformers.cache_utils:Cache"
_WRAPPER = "peft.utils.other:AuxiliaryTrainingWrapper"
_SAVED = "peft.utils.other:ModulesToSaveWrapper"
_PARAMETER_LORA = "peft.tuners.lora:ParamWrapper"
_LORA = "peft.tuners.lora:LoraLayer"
_LOADING = "transformers.core_model_loading"
_EMPTY = "tensors to fill that were made without memory"
_PARAMETER = "vllm.model_executor.parameter:ModelWeightParameter"
DOORS: tuple[Door, ...] = (
    Door("exact decoding", _GENERATION, "_prepare_cache_for_generation", "generate gets the caches of all models here",
         ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")),
    Door("exact decoding", _GENERATION, "_get_candidate_generator", "a draft gets no λ; our own draft is put in here",
         ("generation_config", "input_ids", "logits_processor", "model_kwargs", "assistant_model")),
    Door("exact decoding", _GENERATION, "_supports_default_dynamic_cache", "tells models with a cache of their own"),
    Door("exact decoding", _GENERATION, "_validate_model_kwargs", _ASKED, ("model_kwargs",)),
    Door("exact decoding", _GENERATION, "_prepare_position_ids_for_generation", _ASKED,
         ("inputs_tensor", "model_kwargs")),
    Door("exact decoding", _GENERATION, "_expand_inputs_for_generation", _ASKED, ("expand_size", "input_ids")),
    Door("exact decoding", _GENERATION, "_update_model_kwargs_for_generation", _ASKED, ("outputs", "model_kwargs")),
    Door("exact decoding", _GENERATION, "_supports_logits_to_keep", _ASKED),
    Door("exact decoding", _MODEL, "_is_stateful", _ASKED),
    Door("exact decoding", _GENERATION, "_maybe_prepare_encoder_kwargs_for_generation", _LOOK,
         ("inputs_tensor", "model_kwargs")),
    Door("exact decoding", _GENERATION, "_expand_multimodal_outputs", _LOOK, ("expand_size",)),
    Door("exact decoding", _GENERATION, "_get_logits_processor", "guidance runs the mixture once more, at the call's λ",
         ("model_kwargs",)),
    Door("exact decoding", _GENERATION, "generate_batch", _BATCHES),
    Door("exact decoding", _GENERATION, "init_continuous_batching", _BATCHES),
    Door("exact decoding", _GENERATION, "continuous_batching_context_manager", _BATCHES),
    Door("exact decoding", _MODEL, "_supports_sdpa", _DECLARED),
    Door("exact decoding", _MODEL, "_supports_flash_attn", _DECLARED),
    Door("exact decoding", _MODEL, "_supports_flex_attn", _DECLARED),
    Door("exact decoding", _MODEL, "_supports_attention_backend", _DECLARED),
    Door("exact decoding", "transformers:PreTrainedConfig", "_attn_implementation", "which attention the models have"),
    Door("exact decoding", _OUTPUT, "__init__", "hands the cache to generate", ("logits", "cache|past_key_values")),
    Door("exact decoding", _CACHE, "__init__", "one cache of several models' layers", ("layers",)),
    Door("exact decoding", _CACHE, "layers", "one cache of several models' layers", instance=True),
    Door("exact decoding", _CACHE, "is_compileable", "keeps generate from making masks as for one model"),
    Door("exact decoding", _CACHE, "is_linear", "which layers have masks"),
    Door("exact decoding", "transformers.masking_utils", "create_masks_for_generate",
         "masks of a compiled step, for each model and the rows that it gets",
         ("config", "inputs_embeds", "attention_mask", "cache|past_key_values", "position_ids")),
    Door("exact decoding", _GENERATION, "_valid_auto_compile_criteria", "each model inside says whether it compiles",
         ("model_kwargs", "generation_config")),
    Door("exact decoding", _CACHE, "activate_past_recording", "caches that can be rolled back"),
    Door("exact decoding", "transformers.cache_utils:DynamicLayer", "keys", "a draft's cache is made of the pair's",
         instance=True),
    Door("tests", "transformers:CompileConfig", "_compile_all_devices", "compiles on a CPU within generate"),
    Door("models", _MODEL, "all_tied_weights_keys", "which tensors an architecture shares", instance=True),
    Door("models", "transformers.conversion_mapping", "get_model_conversion_mapping", "how files become memory",
         ("model",)),
    Door("models", "transformers.conversion_mapping", "get_checkpoint_conversion_mapping", "whether a class has any"),
    Door("models", _LOADING, "rename_source_key", "the name in memory of a tensor in the files"),
    Door("models", _LOADING, "dot_natural_key", "the order in which experts are stacked"),
    Door("models", _LOADING, "WeightRenaming", "tells names that change from tensors that do"),
    Door("models", f"{_LOADING}:WeightConverter", "add_tensor", "what transformers makes of stored tensors"),
    Door("models", f"{_LOADING}:WeightConverter", "convert", "what transformers makes of stored tensors",
         ("model", "config")),
    Door("models", f"{_LOADING}:WeightConverter", "source_patterns", "which tensors it takes"),
    Door("models", f"{_LOADING}:WeightConverter", "target_patterns", "whether it makes one tensor or several"),
    Door("compare", "torch.nn:Module", "_modules", "a model with a stand-in for its decoder", instance=True),
    Door("adapters", "peft.tuners.tuners_utils", "BaseTunerLayer", "the modules that an adapter changes"),
    Door("adapters", "peft.utils.other", "AuxiliaryTrainingWrapper", "the modules that an adapter changes"),
    Door("adapters", _WRAPPER, "unload_and_optionally_merge_module", "merges one module",
         ("merge", "safe_merge", "adapter_names")),
    Door("adapters", _SAVED, "original_module", "the base of a module", instance=True),
    Door("adapters", _SAVED, "modules_to_save", "modules that were trained whole", instance=True),
    Door("adapters", "peft.utils.other:TrainableTokensWrapper", "token_adapter", "the base of trained tokens",
         instance=True),
    Door("adapters", "peft.tuners.lora", "ParamWrapper", "LoRA on a parameter, which is no linear layer"),
    Door("adapters", _PARAMETER_LORA, "parameter_name", "which parameter it is", instance=True),
    Door("adapters", _PARAMETER_LORA, "num_experts", "how many matrices the parameter is", instance=True),
    Door("adapters", _PARAMETER_LORA, "get_param", "whether the parameter is one matrix or several"),
    Door("adapters", "peft.utils.transformers_weight_conversion", "convert_peft_adapter_state_dict_for_transformers",
         "adapters saved under transformers 4's names"),
    Door("adapters", _LORA, "lora_A", "the factors of a layer", instance=True),
    Door("adapters", _LORA, "lora_B", "the factors of a layer", instance=True),
    Door("adapters", _LORA, "scaling", "the scale of a layer", instance=True),
    Door("adapters", _LORA, "lora_variant", "tells DoRA and its kind from plain sums", instance=True),
    Door("adapters", _LORA, "lora_bias", "tells a trained bias from plain sums", instance=True),
    Door("exact DeRa in vLLM", "vllm.forward_context", "get_forward_context", "where requests begin in a pass"),
    Door("exact DeRa in vLLM", "vllm.model_executor.models.utils", "init_vllm_registered_model", "makes the models",
         ("vllm_config", "hf_config", "prefix")),
    Door("exact DeRa in vLLM", "vllm.model_executor.layers.linear", "LinearMethodBase", "what an adapted layer does"),
    Door("exact DeRa in vLLM", "vllm.model_executor.parameter", "ModelWeightParameter", "cuts an adapter for a rank"),
    Door("exact DeRa in vLLM", _PARAMETER, "_weight_loader", "tells where a model loads a tensor", instance=True),
    Door("exact DeRa in vLLM", "vllm.config:CompilationConfig", "static_forward_context", "λ by row, for the model",
         instance=True),
    Door("exact DeRa in vLLM", "torch.nn:Module", "_parameters", _EMPTY, instance=True),
    Door("exact DeRa in vLLM", "torch.nn:Module", "_buffers", _EMPTY, instance=True),
    Door("benchmarks", "lm_eval.models.huggingface:HFLM", "_loglikelihood_tokens", "all λ are answered at once here",
         ("requests", "disable_tqdm", "override_bs")),
    Door("Model Runner V2", "vllm.v1.worker.gpu.model_states.default", "DefaultModelState", "λ by request"),
)  # fmt: skip


def of(use: Use) -> Iterator[Door]:
    """The entries of one feature."""
    return (door for door in DOORS if door.use == use)


def check(use: Use, *instances: Any) -> None:
    """Raise DeraError where the installed libraries lack a name that a feature needs.

    Args:
        use: the feature.
        instances: objects whose attributes are asked for, beside what classes and modules have.
    """
    for door in of(use):
        if gone := door.missing(*instances):
            oldest, newest = TESTED[door.library]
            raise DeraError(
                f"{use} needs {gone} ({door.why}), which {door.library} {_installed(door.library)} does not have; "
                f"tested with {oldest} to {newest}: pip install '{door.library}>={oldest},<={newest}'"
            )


def _installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # vLLM's builds go by several names
        return getattr(import_module(library), "__version__", "of an unknown version")
