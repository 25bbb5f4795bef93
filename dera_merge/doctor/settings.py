"""The small files beside the weights: whether each is what its name says, and the tensors what config.json says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DeraError
from ..files.atomic import load_json
from ..files.checkpoint import REAL, Checkpoint
from ..models.source import TOKENIZER_FILES
from .findings import AGAIN, Findings

_COMPANIONS = ("generation_config.json", *(name for name in TOKENIZER_FILES if name.endswith(".json")))
_OTHER_QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# What quantisers name their tensors, where the dtype alone does not tell.
_PACKED = re.compile(r"(qweight|qzeros|weight_packed|_blocks|SCB|absmax|quant_map|weight_scale(_inv)?)$")
_MASK = re.compile(r"(masked_bias|attn\.bias|attention\.bias|position_ids|inv_freq)$")  # buffers of old checkpoints


def check_links(findings: Findings, folder: Path) -> None:
    """Links that lead nowhere, as a cache leaves them of which blobs were removed."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            findings.broken(file.name, "it is a link to a file that is not there", "fetch it again")


def check_companions(findings: Findings, folder: Path) -> None:
    """JSON that is none, or is not what its name says."""
    for name in _COMPANIONS:
        if not (folder / name).is_file():
            continue
        try:
            content = load_json(folder / name)
        except DeraError as error:
            findings.broken(name, str(error).replace("\n", " "), AGAIN)
            continue
        if not isinstance(content, dict) or (name == "tokenizer.json" and "model" not in content):
            findings.broken(name, "it is JSON, but not what its name says", "put the file of this model there")


def check_config(findings: Findings, folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """config.json against the tensors and the files beside it: quantisation, dtype, code."""
    _check_quantisation(findings, folder, config, checkpoint)
    _check_code(findings, folder, config)


def packed_tensor(checkpoint: Checkpoint) -> str | None:
    """The name of a tensor that quantisation made; None where all are plain."""
    for name, info in checkpoint.tensors.items():
        plain = info.dtype in REAL or str(info.dtype) in ("torch.bool", "torch.int64") or _MASK.search(name)
        if _PACKED.search(name) or not plain:
            return name
    return None


def _check_quantisation(findings: Findings, folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    packed, stated = packed_tensor(checkpoint), dict(_quantisations(config))
    if packed is None:
        for place, settings in stated.items():
            method = settings.get("quant_method", "quantised") if isinstance(settings, dict) else settings
            findings.broken("config.json", f"{place} says {method}, and no tensor is quantised", f"remove {place}")
        for name in _OTHER_QUANTISERS:
            if (folder / name).is_file():
                findings.warn(name, "it is left of a quantised model, and no tensor is quantised", "remove it")
        _check_dtype(findings, config, checkpoint)
        return
    if "bitsandbytes" in str(stated.get("quantization_config")):
        findings.stop("llama.cpp", "its converter does not read bitsandbytes; give the model in full precision")
    if "quantization_config" not in stated and not any((folder / name).is_file() for name in _OTHER_QUANTISERS):
        kind = str(checkpoint.tensors[packed].dtype).removeprefix("torch.")
        inner = next(iter(stated), None)
        what = "states none" if inner is None else f"states it as {inner}, where transformers does not look"
        findings.broken(
            packed,
            f"it is quantised ({kind}), and config.json {what}",
            "put quantization_config at the top of config.json, as the quantiser wrote it",
        )


def _quantisations(settings: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every `quantization_config` that is set in a config, nested ones included, and where it is."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key == "quantization_config" and value:
            yield place + key, value
        else:
            yield from _quantisations(value, f"{place}{key}.")


def _check_dtype(findings: Findings, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in REAL:
            counts[str(info.dtype).removeprefix("torch.")] += info.numel
    stated = config.get("dtype") or config.get("torch_dtype")
    if not counts or not isinstance(stated, str) or stated == "auto":
        return
    stored = counts.most_common(1)[0][0]
    if stated.removeprefix("torch.") != stored:
        findings.warn(
            "config.json",
            f"it says dtype {stated}, which programs load as, and the weights are {stored}",
            f'set "dtype": "{stored}"',
        )


def _check_code(findings: Findings, folder: Path, config: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    entries = config.get("auto_map")
    for name in sorted(set(entries.values())) if isinstance(entries, dict) else ():
        file = f"{str(name).rpartition('.')[0]}.py"
        if "--" in str(name) or (folder / file).is_file():
            continue
        if config.get("model_type") in CONFIG_MAPPING:
            findings.warn("config.json", f"auto_map names {file}, which is not there", "remove auto_map")
        else:
            findings.broken("config.json", f"auto_map names {file}, which is not there", "copy it from the base model")
        return
