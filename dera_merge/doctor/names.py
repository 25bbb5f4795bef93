"""A checkpoint's tensors against the class that its config names, by transformers' own loading, without memory.

transformers knows what it renames, fuses, ties and leaves out. So it loads tensors without values, and says which it
lacks and which it has no place for.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

from ..errors import DeraError
from ..files.checkpoint import Checkpoint, slices
from ..models.architecture import LOADING, Architecture
from ..models.damage import is_value_head, same_place, why_wrapped
from ..models.source import Source
from ..models.trust import Trust
from .findings import Findings

_HEADS = ("lm_head.weight", "embed_out.weight")
_MTP = re.compile(r"(^|\.)(mtp|nextn)[._]")
_MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def build_config(findings: Findings, source: Source, config: dict[str, Any], trust: Trust) -> Any:
    """transformers' config object; None where it makes none of config.json, with a finding."""
    from transformers import AutoConfig, __version__

    kind = config.get("model_type")
    try:
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust.code)
    except Exception as error:  # whatever a config's own code or checks raise
        if "auto_map" in config and not trust.code:
            findings.warn(
                "config.json",
                f"{kind} is a model with code of its own, so names were not checked",
                "pass --trust-remote-code if you trust it",
            )
            findings.stop("transformers", "its code must be allowed to run: trust_remote_code=True")
        elif kind is None or "does not recognize" in str(error):
            findings.broken(
                "config.json",
                f"transformers {__version__} does not know the model type {kind!r}",
                "install the transformers that it was made with, or correct model_type",
            )
        else:
            first = str(error).strip().partition("\n")[0]
            findings.broken("config.json", f"transformers cannot read it: {first}", "correct it")
        return None


def check_names(
    findings: Findings, source: Source, config: dict[str, Any], built: Any, checkpoint: Checkpoint, trust: Trust
) -> None:
    """Missing and unexpected tensors, other prefixes, wrong shapes, heads and MTP layers.

    Args:
        findings: where it is written down.
        source: the directory.
        config: its config.json.
        built: transformers' config object.
        checkpoint: its tensors.
        trust: what may be read and run of the files.
    """
    stored = checkpoint.tensors
    if reason := why_wrapped(stored):
        return findings.reason("weights", reason)
    report = _load(findings, config, built, checkpoint, trust)
    if report is None:
        return None
    # Packed tensors have other names and shapes than those that they stand for: the module is what is compared.
    packed = {name.rpartition(".")[0] for name in stored} if built_quantised(config) else set()
    missing = sorted(name for name in report["missing_keys"] if name.rpartition(".")[0] not in packed)
    unexpected = sorted(name for name in report["unexpected_keys"] if name.rpartition(".")[0] not in packed)
    mismatched = [] if packed else sorted(report["mismatched_keys"], key=str)
    if mismatched:
        name, have, want = mismatched[0]
        sizes = "vocab_size" if list(have)[1:] == list(want)[1:] else "its sizes"
        findings.broken(
            name,
            f"it is {list(have)} in the file and {list(want)} by config.json ({len(mismatched)} in all)",
            f"correct {sizes} in config.json, or save it again",
        )
    moved = _moved(missing, unexpected)
    if moved:
        mine, theirs = moved
        findings.broken(
            "weights",
            f"names lie under another prefix: {mine} where the class has {theirs}",
            "rename them, or name the class that they are of in architectures",
        )
    elif missing:
        _say_missing(findings, missing, stored, config)
    if not moved:
        _say_unexpected(findings, unexpected, stored, config)
    _check_mtp(findings, stored, config)
    _check_tie(findings, source, checkpoint, trust)
    return None


def built_quantised(config: dict[str, Any]) -> bool:
    """Whether transformers would load the checkpoint as a quantised one."""
    return bool(config.get("quantization_config"))


def _load(findings: Findings, config: dict[str, Any], built: Any, checkpoint: Checkpoint, trust: Trust) -> Any:
    """What transformers' loading reports of tensors without values; None where it cannot load, with a finding."""
    import transformers

    name = (config.get("architectures") or [None])[0]
    if name is None:
        findings.warn(
            "config.json",
            "it names no architectures; vLLM and llama.cpp ask for them",
            'add "architectures": ["…ForCausalLM"]',
        )
        findings.stop("vLLM", "config.json names no architectures")
        findings.stop("llama.cpp", "config.json names no architectures")
    loader = getattr(transformers, name, None) if name else transformers.AutoModelForCausalLM
    if loader is None and trust.code and "auto_map" in config:
        loader = transformers.AutoModelForCausalLM
    if loader is None:
        findings.broken(
            "config.json",
            f"transformers {transformers.__version__} has no class {name}",
            "correct architectures, or install the transformers that it was made with",
        )
        return None
    state = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in checkpoint.tensors.items()}
    if built_quantised(config):
        del built.quantization_config
    more = {"trust_remote_code": trust.code} if loader is transformers.AutoModelForCausalLM else {}
    try:
        with LOADING:
            _, report = loader.from_pretrained(
                None,
                config=built,
                state_dict=state,
                output_loading_info=True,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                **more,
            )
    except Exception as error:  # whatever a class makes of settings and tensors that do not fit it
        first = str(error).strip().partition("\n")[0]
        findings.broken(
            "weights",
            f"transformers cannot load them into {name}: {first}",
            "compare config.json with the model that it was made of",
        )
        return None
    return report


def _moved(missing: Collection[str], unexpected: Collection[str]) -> tuple[str, str] | None:
    """A stored name and the one that the class has for it, where they differ in what is before the layers."""
    for name in unexpected:
        if found := same_place(name, missing):
            return name, found
    return None


def _say_missing(findings: Findings, missing: list[str], stored: Collection[str], config: dict[str, Any]) -> None:
    deepest = max((int(number) for name in stored for number in _LAYER.findall(name)), default=-1)
    beyond = [name for name in missing if any(int(n) > deepest for n in _LAYER.findall(name))]
    count = f"{missing[0]} ({len(missing)} in all)" if len(missing) > 1 else missing[0]
    if set(missing) <= set(_HEADS):
        findings.broken(
            missing[0],
            "it is missing, and config.json does not tie it to the embeddings",
            'set "tie_word_embeddings": true if they were one, else save it again with its head',
        )
    elif len(beyond) == len(missing):
        findings.broken(
            "config.json",
            f"it has more layers than the weights, which end with layer {deepest}",
            "correct num_hidden_layers, or fetch the missing weights",
        )
    else:
        findings.broken("weights", f"they lack {count}, which would be made up at random", "fetch or save them again")


def _say_unexpected(findings: Findings, unexpected: list[str], stored: Collection[str], config: dict[str, Any]) -> None:
    layers = config.get("num_hidden_layers")
    beyond = [
        name for name in unexpected if isinstance(layers, int) and any(int(n) >= layers for n in _LAYER.findall(name))
    ]
    heads = [name for name in unexpected if is_value_head(name)]
    others = [name for name in unexpected if name not in {*heads, *beyond} and not _MTP.search(name)]
    if heads:
        findings.warn(
            heads[0],
            "a value head lies beside the language model; vLLM and llama.cpp stop at it",
            "remove it, or merge with dera-merge, which leaves it out",
        )
    if beyond and not _mtp_layers(config):
        findings.broken(
            "config.json",
            f"it says num_hidden_layers={layers}, and there are tensors beyond ({beyond[0]})",
            "correct num_hidden_layers, or remove them",
        )
    if others:
        findings.warn(
            others[0],
            f"the class has no place for it ({len(others)} such tensors), so it is not used",
            "remove it, or name the class that it is of in architectures",
        )
    for name in (heads + others)[:1]:
        findings.stop("vLLM", f"its loader stops at {name}, which the class does not have")
        findings.stop("llama.cpp", f"its converter stops at {name}, which it cannot map")


def _mtp_layers(config: dict[str, Any]) -> int:
    """How many layers for multi-token prediction a config announces."""
    return max((value for key in _MTP_LAYERS if isinstance(value := config.get(key), int)), default=0)


def _check_mtp(findings: Findings, stored: Collection[str], config: dict[str, Any]) -> None:
    announced, layers = _mtp_layers(config), config.get("num_hidden_layers")
    held = any(
        _MTP.search(name) or (isinstance(layers, int) and any(int(n) >= layers for n in _LAYER.findall(name)))
        for name in stored
    )
    if announced and not held:
        key = next(key for key in _MTP_LAYERS if config.get(key))
        findings.warn(
            "config.json",
            f"it announces {key}={announced}, and the weights have no such layers",
            f"set {key} to 0, or copy the layers from the base; engines that draft with them fail",
        )
    if held and not announced and (name := next(filter(_MTP.search, stored), None)):
        findings.warn(
            name,
            "it belongs to layers for multi-token prediction, which config.json does not announce",
            "set num_nextn_predict_layers as in the base, or remove them",
        )


def _check_tie(findings: Findings, source: Source, checkpoint: Checkpoint, trust: Trust) -> None:
    """Tensors that config.json ties to others, the head to the embeddings say, and that differ from them."""
    if not any(name.endswith(_HEADS) for name in checkpoint.tensors):
        return
    try:
        architecture = Architecture.of(source.folder, trust)
    except DeraError:  # no causal model; what else is wrong has been said
        return
    layout = architecture.layout(checkpoint.tensors)
    for name, owner in architecture.tied.items():
        ends = layout.name(name), layout.name(owner)
        if ends[0] is None or ends[1] is None or ends[0] == ends[1]:
            continue
        infos = [checkpoint.tensors[end] for end in ends]
        same = infos[0].shape == infos[1].shape and all(
            torch.equal(*(checkpoint.read(end, *rows) for end in ends)) for rows in slices(infos[0])
        )
        if not same:
            findings.broken(
                ends[0],
                f"config.json ties it to {ends[1]}, and the two differ; vLLM and llama.cpp leave it out",
                'set "tie_word_embeddings": false',
            )
