"""Prompts: from a file, or the 32 general ones that ship with the package; and as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and the completion to score on, where one is given."""

    text: str
    ids: list[int]
    completion: list[int] | None = None


def built_in() -> list[dict[str, Any]]:
    """32 general chat prompts: questions, explanations, writing, advice, a little code and arithmetic."""
    return read(Path(__file__).with_name("prompts.jsonl"))


def read(file: str | Path) -> list[dict[str, Any]]:
    """Prompts from a file: text lines, or JSON Lines with `"messages"` or `"prompt"`, maybe a `"completion"`.

    Raises:
        DeraError: the file cannot be read, or a line is neither.
    """
    path = Path(file)
    try:
        # Not splitlines: U+2028 and its kind may stand inside a JSON text or a prompt.
        lines = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DeraError(f"prompts {file} cannot be read as UTF-8 text: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl" and not line.lstrip().startswith("{"):
            prompts.append({"prompt": line})
            continue
        try:
            prompts.append(_checked(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise DeraError(f"{file}, line {number}: {error}") from error
    if not prompts:
        raise DeraError(f"{file} holds no prompts")
    return prompts


def _checked(entry: Any) -> dict[str, Any]:
    """A line's prompt. Raises ValueError where it is none."""
    if not isinstance(entry, dict) or ("messages" in entry) == ("prompt" in entry):
        raise ValueError('expected an object with "messages" or with "prompt"')
    if "prompt" in entry and not isinstance(entry["prompt"], str):
        raise ValueError('"prompt" is not a text')
    if "messages" in entry and not (
        isinstance(entry["messages"], list)
        and entry["messages"]
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in entry["messages"])
    ):
        raise ValueError('"messages" is not a list of {"role": …, "content": …}')
    if not isinstance(entry.get("completion", ""), str):
        raise ValueError('"completion" is not a text')
    return entry


def encode(prompts: Iterable[str | dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Prompts as token ids.

    Messages go through the chat template with a generation prompt; a text is tokenized with the tokenizer's defaults; a
    completion by itself, without special tokens.

    Raises:
        DeraError: messages without a chat template, a prompt or a completion of no tokens.
    """
    encoded = []
    for number, entry in enumerate(prompts, 1):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        if "messages" in entry:
            if not tokenizer.chat_template:
                raise DeraError('the tokenizer has no chat template; give prompts as text or {"prompt": …}')
            try:
                text = tokenizer.apply_chat_template(entry["messages"], tokenize=False, add_generation_prompt=True)
            except Exception as error:  # templates raise what they like
                raise DeraError(f"the chat template refuses prompt {number}: {error}") from error
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = entry["prompt"]
            ids = tokenizer(text)["input_ids"]
        completion = entry.get("completion")
        given = None if completion is None else tokenizer(completion, add_special_tokens=False)["input_ids"]
        if not ids or given == []:
            raise DeraError(f"prompt {number} has {'an empty completion' if ids else 'no tokens'}")
        encoded.append(Prompt(text, ids, given))
    return encoded


def check_lengths(prompts: Iterable[Prompt], max_new_tokens: int, limit: int | None) -> None:
    """Raises DeraError where the longest prompt and a text of `max_new_tokens` are more than a model takes."""
    longest = max(len(prompt.ids) for prompt in prompts) + max_new_tokens
    if limit and longest > limit:
        raise DeraError(f"a prompt and its text have up to {longest} tokens, the model takes {limit}")


def default(tokenizer: PreTrainedTokenizerBase) -> Sequence[str | dict[str, Any]]:
    """The built-in prompts in a form that the tokenizer can take: chat where it has a template, else plain text."""
    prompts = built_in()
    return prompts if tokenizer.chat_template else [entry["messages"][-1]["content"] for entry in prompts]
