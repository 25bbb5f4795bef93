"""An adapter: whether it changes anything, is whole, and fits its base, and which programs take it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from ..errors import DeraError, DeraWarning
from ..measuring.inspection import inspect_pair
from ..models.adapter import Adapter
from ..models.damage import find_idle, why_misnamed, why_unknown
from ..models.pair import Pair
from ..models.source import Source
from ..models.trust import Trust
from . import stored
from .findings import Findings

Tell = Callable[[int, int], None] | None
# Settings that vLLM (0.32) refuses, or does not read, so that it would compute another model.
_NOT_IN_VLLM = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "alpha_pattern": "alpha_pattern",
    "rank_pattern": "rank_pattern",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "target_parameters",
}
_VLLM_RANKS, _VLLM_DEFAULT = (32, 64, 128, 256, 320, 512), 16  # values of --max-lora-rank above its default
# Settings that llama.cpp's converter stops at, or does not read: it takes pairs of A and B, and lora_alpha alone.
_NOT_IN_LLAMACPP = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "use_rslora": "rsLoRA's scale",
    "alpha_pattern": "alpha_pattern",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "target_parameters",
}


def check_adapter(findings: Findings, source: Source, base: str | None, trust: Trust, progress: Tell) -> None:
    """Examine an adapter, and with its base whether it fits and what a merge would lose.

    Args:
        findings: where it is written down.
        source: the adapter's directory.
        base: its base, as typed; None takes the one that its config names, where that is a directory.
        trust: what may be read and run of the files.
        progress: called with (tensors read, tensors in all).
    """
    try:
        adapter = Adapter(source.folder, trust.pickle)
    except DeraError as error:
        return findings.broken("adapter_config.json", str(error).replace("\n", " "), "write it as PEFT does")
    if (source.folder / "config.json").is_file() and any(source.folder.glob("model*.safetensors")):
        findings.warn(
            "adapter_config.json",
            "a full model lies beside the adapter; transformers and PEFT read the adapter",
            "keep them in two directories",
        )
    if odd := why_unknown(adapter.config):
        findings.reason("adapter_config.json", f"it {odd}", broken=False)
    _check_programs(findings, adapter)
    home = base or _named_base(findings, adapter)
    checkpoint = stored.open_weights(findings, source.folder, "adapter_model", trust)
    if checkpoint is None:
        return None
    if adapter.brings_base_tensors:
        findings.stop(
            "llama.cpp", "it does not take the embeddings that are stored beside the adapter; merge the model"
        )
    stored.check_files(findings, checkpoint, "adapter_model")
    stored.check_values(findings, checkpoint, None)
    if reason := why_misnamed(checkpoint.tensors):
        findings.reason("adapter_model", reason)
    elif (idle := find_idle(adapter.config, checkpoint)) and not idle.all:
        findings.warn(
            "adapter_model", f"a part changes nothing: {idle.why}", "if that was to be trained, save it again"
        )
    elif idle:
        findings.broken(
            "adapter_model", f"it changes nothing: {idle.why}", "save it again after training; gather first under ZeRO"
        )
    if findings.any_broken:
        return None
    if home is not None:
        _check_fit(findings, source, home, trust, bool(base), progress)
    elif adapter.is_plain and not adapter.unmergeable:
        with findings.refusals("adapter_model"):
            adapter.check_alone()
    return None


def _check_programs(findings: Findings, adapter: Adapter) -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, __version__

    config, kind = adapter.config, adapter.config["peft_type"]
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        findings.broken(
            "adapter_config.json",
            f"PEFT {__version__} does not know the type {kind}",
            "install the PEFT that it was made with",
        )
    rank = max(n for n in (0, config.get("r"), *(config.get("rank_pattern") or {}).values()) if isinstance(n, int))
    if kind == "LORA" and rank > _VLLM_RANKS[-1]:
        findings.stop("vLLM", f"it takes ranks up to {_VLLM_RANKS[-1]}, and this has {rank}; cut it: merge --rank")
    elif kind == "LORA" and rank > _VLLM_DEFAULT:
        findings.needs["vLLM"] = f"--max-lora-rank {next(size for size in _VLLM_RANKS if size >= rank)}"
    for program, settings in (("vLLM", _NOT_IN_VLLM), ("llama.cpp", _NOT_IN_LLAMACPP)):
        if kind != "LORA":
            findings.stop(program, f"it takes LoRA, and this is {kind}; merge writes a full model of it")
        elif odd := next((name for key, name in settings.items() if config.get(key)), None):
            findings.stop(program, f"it does not take {odd}; merge --format adapter folds it in, or merge the model")
        elif config.get("bias", "none") != "none":
            findings.stop(program, "it does not take trained biases; merge writes a full model of it")


def _named_base(findings: Findings, adapter: Adapter) -> str | None:
    """The base that the config names, where it is a directory here; says where it can be none at all."""
    name = adapter.base_name
    if not name:
        findings.warn("adapter_config.json", "it does not say what model it adapts", "set base_model_name_or_path")
        return None
    for place in (adapter.folder / name, Path(name).expanduser()):
        if place.is_dir():
            return str(place) if (place / "config.json").is_file() else None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        findings.warn(
            "adapter_config.json", f"its base {name} is not there", "name it by its Hub id, or by where it lies now"
        )
    return None


def _check_fit(findings: Findings, source: Source, home: str, trust: Trust, whole: bool, progress: Tell) -> None:
    """Whether the adapter fits its base; with `whole`, reading all of the base, what a merge of them would lose."""
    with warnings.catch_warnings(), findings.refusals("adapter_model"):
        warnings.simplefilter("ignore", DeraWarning)  # what may be meant so is said by the checks here
        pair = Pair.from_pretrained(home, source.folder, allow_pickle=trust.pickle, trust_remote_code=trust.code)
        if pair.aligned.adapter is None or pair.aligned.adapter.unmergeable:
            return
        if not whole:
            _ = pair.names
            return
        result = inspect_pair(pair, progress=progress)
        if result["problem"]:
            raise DeraError(result["problem"])
        if result["doubt"]:
            findings.reason(home, result["doubt"], broken=False)
        elif lost := [name for name in result["lost"] if name in result["tensors"]]:
            kept = result["tensors"][lost[0]]["kept"]
            findings.warn(
                home,
                f"at λ=1 a merge in its dtypes keeps {kept:.1%} of the change of {lost[0]}, and less than 90 % "
                f"of {len(lost)} of {len(result['tensors'])} tensors",
                "merge with --dtype float32",
            )
