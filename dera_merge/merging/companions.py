"""What lies beside the weights: config, generation config, tokenizer, and code where it is trusted.

Each file must be what its name says, and nothing is copied that would be wrong in the output: settings of a
quantisation that the tensors do not have, code that does not come along, paths of the machine that a model was made on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import DeraError, warn
from ..files.atomic import json_bytes, load_json
from ..models.ends import Ending
from ..models.pair import Pair
from ..models.processor import processor_files
from ..models.source import GENERATION, TOKENIZER_FILES

# Paths of the machine that a config or a tokenizer was saved on.
_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
_LIMIT = 100_000_000  # bytes of a tokenizer's file
_TOKENIZER_KEYS = {
    "added_tokens_decoder", "backend", "bos_token", "chat_template", "clean_up_tokenization_spaces", "eos_token",
    "model_max_length", "pad_token", "tokenizer_class", "unk_token",
}  # fmt: skip


def _are_ids(told: dict[str, Any]) -> bool:
    return all(isinstance(number, int) for number in told.values())


_HOLDS: dict[str, Callable[[dict[str, Any]], bool]] = {  # what each JSON file has, if it is what its name says
    "tokenizer.json": lambda told: isinstance(told.get("model"), dict),
    "tokenizer_config.json": lambda told: not told or not _TOKENIZER_KEYS.isdisjoint(told),
    "special_tokens_map.json": lambda told: all(re.search(r"tokens?$", key) for key in told),
    "added_tokens.json": _are_ids,
    "vocab.json": _are_ids,
    "chat_template.json": lambda told: "chat_template" in told,
}


def companions(pair: Pair) -> dict[str, bytes]:
    """The files beside the weights that are the same at every λ, but for config.json: name → content.

    Raises:
        DeraError: a file is not what its name says.
    """
    code = _code(pair)
    files: dict[str, bytes] = {}
    try:
        folder = pair.tokenizer_folder
    except DeraError:
        warn("neither side brings a tokenizer; the output has none")
    else:
        files = tokenizer_files(folder, code)
    seen = {file.name: file for file in processor_files((pair.aligned, pair.ref))}
    return files | {name: path.read_bytes() for name, path in (seen | code).items()}


def generation_file(ending: Ending) -> dict[str, bytes]:
    """generation_config.json, where there is anything to say."""
    return {GENERATION: json_bytes(ending.generation)} if ending.generation else {}


def config_of(pair: Pair, ending: Ending, dtype: torch.dtype | None) -> dict[str, Any]:
    """The output's config.json: REF's, with the output's dtype, ties and end tokens.

    Args:
        pair: whose weights are stored.
        ending: how the output ends.
        dtype: of the weights; None where each tensor keeps its own.
    """
    config = cleaned(pair.ref.config, _code(pair), quantised=pair.ref.quantisation is not None)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if (rows := pair.names.vocabulary) is not None:
        text = config.get("text_config") if "vocab_size" not in config else None
        (text if isinstance(text, dict) else config)["vocab_size"] = rows
    if pair.names.unties:
        config["tie_word_embeddings"] = False
    return config | {key: value for key, value in ending.ids.items() if key in config or value is not None}


def cleaned(config: dict[str, Any], code: Iterable[str], quantised: bool = True) -> dict[str, Any]:
    """A config without what would be wrong in the output, in its inner configs too.

    Args:
        config: of a model or a tokenizer.
        code: names of the files of code that come along.
        quantised: whether the weights are what its `quantization_config` says.
    """
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key in _PLACES or (key == "quantization_config" and not quantised):
            continue
        if key == "auto_map" and isinstance(value, dict):
            if not (value := {name: entry for name, entry in value.items() if _comes_along(entry, code)}):
                continue
        elif isinstance(value, dict) and key.endswith("_config"):
            value = cleaned(value, code, quantised)
        kept[key] = value
    return kept


def tokenizer_files(folder: Path, code: Iterable[str] = ()) -> dict[str, bytes]:
    """Tokenizer and chat template of a folder: name → content.

    Raises:
        DeraError: a file is not what its name says.
    """
    files = {}
    for name in TOKENIZER_FILES:
        if not (file := folder / name).is_file():
            continue
        files[name] = _read(file)
        if name == "tokenizer_config.json" and (kept := cleaned(said := load_json(file), code)) != said:
            files[name] = json_bytes(kept)
    return files


def _code(pair: Pair) -> dict[str, Path]:
    """The files of code that come along: where it is trusted, REF's, and the tokenizer's."""
    if not pair.trust.code:
        return {}
    folders = [pair.ref.base.folder]
    if any(side.source.has_tokenizer() or side.base.has_tokenizer() for side in (pair.aligned, pair.ref)):
        folders.insert(0, pair.tokenizer_folder)
    return {path.name: path for folder in folders for path in sorted(folder.glob("*.py"))}


def _comes_along(entry: Any, code: Iterable[str]) -> bool:
    """Whether the code that an entry of `auto_map` names is among the files: `module.Class`, or a list of these."""
    names = [name for name in (entry if isinstance(entry, list) else [entry]) if name is not None]
    return all(isinstance(name, str) and f"{name.partition('.')[0]}.py" in code for name in names)


def _read(file: Path) -> bytes:
    """The content of a tokenizer's file, once it is what the name says."""
    if problem := problem_of(file):
        where = f", a link to {file.resolve()}" if file.is_symlink() else ""
        raise DeraError(f"{file}{where}, is not what its name says: {problem}; mend or remove it")
    return file.read_bytes()


def problem_of(file: Path) -> str | None:
    """Why a file of `TOKENIZER_FILES` cannot be what its name says; None where it can."""
    if file.stat().st_size > _LIMIT:
        return "it is larger than 100 MB"
    if not (content := file.read_bytes()):
        return "it is empty"
    if file.suffix == ".json":
        try:
            told = load_json(file)
        except DeraError as error:
            return str(error).removeprefix(f"{file} ")
        fits = isinstance(told, dict) and _HOLDS[file.name](told)
        return None if fits else "it is JSON, but holds something else"
    if file.suffix == ".model":  # sentencepiece's protocol buffer, or tiktoken's lines
        lines = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+", content.partition(b"\n")[0].strip())
        return None if content[:1] == b"\n" or lines else "it is neither sentencepiece's nor tiktoken's"
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "it is no text"
    if file.suffix == ".jinja" and "{{" not in text and "{%" not in text:
        return "it is no template"
    lines = [line for line in text.split("\n", 2)[:2] if line.strip() and not line.startswith("#version")]
    if file.name == "merges.txt" and any(len(line.split(" ")) != 2 for line in lines):
        return "its lines are not two tokens each"
    return None
