"""The small files beside the weights: whether each is what its name says, and the tensors what config.json says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DeraError
from ..files.checkpoint import REAL, Checkpoint
from ..merging.companions import problem_of
from ..models.ends import generation_settings
from ..models.quantized import quantised_tensor
from ..models.source import GENERATION, TOKENIZER_FILES
from .findings import AGAIN, Findings

_OTHER_QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def check_links(findings: Findings, folder: Path) -> None:
    """Links that lead nowhere, as a cache leaves them of which blobs were removed."""
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            findings.broken(file.name, "it is a link to a file that is not there", "fetch it again")


def check_companions(findings: Findings, folder: Path) -> None:
    """Files of the tokenizer and of generation that cannot be what their names say."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file() and (problem := problem_of(folder / name)):
            findings.broken(name, problem.replace("\n", " "), AGAIN)
    try:
        generation_settings(folder)
    except DeraError as error:
        findings.broken(GENERATION, str(error).removeprefix(f"{folder / GENERATION} ").replace("\n", " "), AGAIN)


def check_config(findings: Findings, folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    """config.json against the tensors and the files beside it: quantisation, dtype, code."""
    _check_quantisation(findings, folder, config, checkpoint)
    _check_code(findings, folder, config)


def _check_quantisation(findings: Findings, folder: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
    packed, stated = quantised_tensor(checkpoint.tensors), dict(_quantisations(config))
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
