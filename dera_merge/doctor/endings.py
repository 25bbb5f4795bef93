"""Where generation ends: config, generation config, tokenizer and chat template against each other."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError
from ..models.ends import ids_of
from ..models.source import VOCABULARY_FILES
from ..models.tokenizer import load_tokenizer
from ..models.trust import Trust
from .findings import Findings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "dera answers"  # stands for an answer where a chat template is rendered


def check_endings(findings: Findings, folder: Path, config: dict[str, Any], trust: Trust) -> None:
    """The tokenizer's ids against the embeddings, and what ends a text against what ends a turn of the template."""
    ends = _ends(findings, folder, config)
    rows = config.get("vocab_size")
    if isinstance(rows, int) and (beyond := [end for end in ends or () if end >= rows]):
        findings.broken(
            "generation_config.json",
            f"eos_token_id {beyond[0]} is beyond the vocabulary of {rows}",
            "take the id that the tokenizer has",
            stops=False,
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        findings.warn("tokenizer", "there is none", "copy the tokenizer's files from the base model")
        for program in ("vLLM", "llama.cpp"):
            findings.stop(program, "there is no tokenizer")
        return
    try:
        tokenizer = load_tokenizer(folder, folder, trust)
    except DeraError as error:
        findings.reason("tokenizer", str(error))
        return
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if (
        isinstance(rows, int) and highest >= rows
    ):  # some models have it so: a token for images, say, in one without eyes
        findings.warn(
            "tokenizer",
            f"it has ids up to {highest}, and the embeddings have {rows} rows, so that a text with such tokens fails",
            "resize the embeddings, or take the base model's tokenizer",
        )
        findings.stop("llama.cpp", f"the tokenizer has ids beyond the {rows} rows of the embeddings")
    if ends is not None:
        _check_ends(findings, tokenizer, ends)


def _ends(findings: Findings, folder: Path, config: dict[str, Any]) -> set[int] | None:
    """The ids that transformers ends at; None where its generation config cannot be read, with a finding."""
    if not (folder / "generation_config.json").is_file():
        inner = config.get("text_config")
        outer = config.get("eos_token_id")
        return set(ids_of(outer or (inner.get("eos_token_id") if isinstance(inner, dict) else None)))
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever its values are
        findings.broken(
            "generation_config.json", f"transformers cannot read it: {str(error).splitlines()[0]}", "correct it"
        )
        return None
    try:
        settings.validate(strict=True)
    except ValueError as error:
        lines = [line.strip("- ") for line in str(error).splitlines() if line.startswith("- ")]
        first = (lines or str(error).splitlines())[0]
        findings.warn(
            "generation_config.json", f"transformers will not save it: {first}", "correct it, say do_sample: true"
        )
    return set(ids_of(settings.eos_token_id))


def _check_ends(findings: Findings, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
    """What the tokenizer and the chat template call an end, against where transformers ends."""
    known = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in sorted(ends)) or "nothing"
    turn = _end_of_turn(findings, tokenizer)
    if turn is not None and turn not in ends:
        token = tokenizer.convert_ids_to_tokens(turn)
        findings.broken(
            "generation_config.json",
            f"the chat template ends a turn with {token!r} ({turn}), and generation ends at {known}, so answers run on",
            f"add {turn} to eos_token_id",
            stops=False,
        )
    elif not ends:
        findings.warn("generation_config.json", "no token ends generation", "set eos_token_id")
    elif tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        findings.warn(
            "tokenizer",
            f"its eos_token is {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), and generation ends "
            f"at {known}; vLLM and llama.cpp ask the tokenizer",
            "make them agree",
        )


def _end_of_turn(findings: Findings, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an answer; None where there is no such thing."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # whatever a template raises
        findings.broken(
            "chat template", f"it cannot be rendered: {str(error).splitlines()[0]}", "correct it", stops=False
        )
        return None
    _, answered, tail = text.rpartition(_ANSWER)
    if not answered:
        findings.broken("chat template", "it leaves answers out", "take the base model's", stops=False)
        return None
    return _first(tokenizer(tail, add_special_tokens=False).input_ids, tokenizer.added_tokens_decoder)


def _first(ids: list[int], special: Collection[int]) -> int | None:
    return next((number for number in ids if number in special), None)
