"""Prompts: from a file or data set, or the 32 general ones that ship with the package; and as token ids."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError
from . import images
from .forms import Asked, Turns, asked
from .images import Shown, digest
from .tables import rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, and the completion to score on, where one is given.

    Attributes:
        text: what was tokenized.
        ids: its tokens.
        completion: tokens of a given completion.
        asked: what the row asks: the turns that went through the chat template, or the text.
        given: the row as it came.
        shown: what the images that it shows are for a model; {} without images.
    """

    text: str
    ids: list[int]
    completion: list[int] | None = None
    asked: str | Turns = ""
    given: str | dict[str, Any] = field(default_factory=dict)
    shown: Shown = field(default_factory=dict, compare=False, repr=False)

    @property
    def mark(self) -> Any:
        """What two prompts that are one have in common, for JSON: tokens, and what is shown."""
        return [self.ids, digest(self.shown)] if self.shown else self.ids

    @property
    def columns(self) -> dict[str, Any]:
        """The row's other columns, for rewards: answers to check against, say."""
        row = self.given if isinstance(self.given, dict) else {}
        return {name: value for name, value in row.items() if name not in ("prompt", "completion")}


def columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    """The other columns of all rows, by name: a value a prompt, None where its row has none."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    return {name: [prompt.columns.get(name) for prompt in prompts] for name in names}


def built_in() -> list[dict[str, Any]]:
    """32 general chat prompts: questions, explanations, writing, advice, a little code and arithmetic."""
    return read(Path(__file__).with_name("prompts.jsonl"))


def read(source: str | os.PathLike[str], limit: int | None = None) -> list[dict[str, Any]]:
    """Prompts from a file or a data set, as they are published; see docs/prompts.md for the forms.

    Args:
        source: as for `tables.rows`: a file, a directory, or `ID:SPLIT` of the Hub.
        limit: how many rows to read; default all.

    Returns:
        The rows, with all their columns; a line of text is `{"prompt": line}`.

    Raises:
        DeraError: the file cannot be read, or a row asks nothing.
    """
    entries, folder = [], Path(source).parent
    for where, row in rows(source, limit):
        try:
            row = images.located(row, folder)
            asked(row)
        except ValueError as error:
            raise DeraError(f"{source}, {where}: {error}") from error
        entries.append(row)
    if not entries:
        raise DeraError(f"{source} holds no prompts")
    return entries


def encode(
    prompts: Iterable[str | dict[str, Any] | Prompt], tokenizer: PreTrainedTokenizerBase,
    processor: Callable[[], ProcessorMixin] | None = None,
) -> list[Prompt]:  # fmt: skip
    """Prompts as token ids.

    Turns go through the chat template with a generation prompt; a text is tokenized with the tokenizer's defaults; a
    completion by itself, without special tokens.

    Args:
        prompts: texts, or rows in one of the forms of `forms.py`; what is encoded already stays.
        processor: gives what reads images; None refuses them.

    Raises:
        DeraError: a row asks nothing, turns without a chat template, a prompt or a completion of no tokens, an image
            that cannot be read.
    """
    return [
        entry if isinstance(entry, Prompt) else _encoded(number, entry, tokenizer, processor)
        for number, entry in enumerate(prompts, 1)
    ]


def _encoded(
    number: int, entry: str | dict[str, Any], tokenizer: PreTrainedTokenizerBase,
    processor: Callable[[], ProcessorMixin] | None,
) -> Prompt:  # fmt: skip
    shown: Shown = {}
    try:
        entry = images.located(entry, Path())
        it = _asked(entry)
    except ValueError as error:
        raise DeraError(f"prompt {number}: {error}") from error
    if it.turns is None or (it.text is not None and not tokenizer.chat_template):
        text, ids, what = it.text, tokenizer(it.text)["input_ids"], it.text
    elif any(images.parts(it.turns)):
        if processor is None:
            raise DeraError(f"prompt {number} shows an image; generate, compare and sweep take those, nothing else")
        text, ids, shown = images.looked_at(it.turns, processor())
        what = it.turns
    elif not tokenizer.chat_template:
        raise DeraError('the tokenizer has no chat template; give prompts as text or {"prompt": …}')
    else:
        try:
            text = _templated(it.turns, tokenizer)
        except Exception as error:  # templates raise what they like
            raise DeraError(f"the chat template refuses prompt {number}: {error}") from error
        ids, what = tokenizer(text, add_special_tokens=False)["input_ids"], it.turns
    given = None if it.completion is None else tokenizer(it.completion, add_special_tokens=False)["input_ids"]
    if not ids or given == []:
        raise DeraError(f"prompt {number} has {'an empty completion' if ids else 'no tokens'}")
    return Prompt(text, ids, given, what, entry, shown)


def _templated(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> str:
    """Turns as text. Raises what the chat template raises.

    Templates of models that see may know parts alone: a plain text raises there (SmolVLM), or is left out without a
    word (LLaVA). Where what was said last does not come out, parts are tried.
    """
    found: list[str] = []
    problem: Exception | None = None
    for told in (turns, images.as_parts(turns)):
        try:
            found.append(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            problem = problem or error
            continue
        if images.in_words(turns[-1].get("content", "")).strip() in found[-1]:
            return found[-1]
    if not found:
        raise problem
    return found[0]


def _asked(entry: str | dict[str, Any]) -> Asked:
    return asked({"prompt": entry} if isinstance(entry, str) else entry)


def fitting(
    prompts: Iterable[str | dict[str, Any] | Prompt], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int,
    limit: int | None, sampled: bool = False, processor: Callable[[], ProcessorMixin] | None = None,
) -> list[Prompt]:  # fmt: skip
    """The prompts that a model takes together with their texts, as token ids.

    One line of the log says what was understood and how many are too long; of prompts that are encoded already, and
    fit, it says nothing.

    Args:
        prompts, tokenizer, processor: as for `encode`.
        max_new_tokens: length of a sampled text, in tokens.
        limit: how many tokens a model takes; None knows no limit.
        sampled: texts are sampled even where completions are given.

    Raises:
        DeraError: as for `encode`; or none is left.
    """
    prompts = list(prompts)
    encoded = encode(prompts, tokenizer, processor)

    def size(prompt: Prompt) -> int:
        given = prompt.completion
        return len(prompt.ids) + max(len(given or ()), max_new_tokens if sampled or given is None else 0)

    kept = [prompt for prompt in encoded if not limit or size(prompt) <= limit]
    lost = len(encoded) - len(kept)
    if not kept:
        if not encoded:
            raise DeraError("there are no prompts")
        least = min(map(size, encoded))
        raise DeraError(f"every prompt is too long: {least} tokens or more with its text, the model takes {limit}")
    if lost or not all(isinstance(entry, Prompt) for entry in prompts):
        log.log(logging.WARNING if lost else logging.INFO, "%s", _in_words(kept, lost, max_new_tokens, limit))
    return kept


def _in_words(prompts: Sequence[Prompt], lost: int, max_new_tokens: int, limit: int | None) -> str:
    """512 prompts from `prompt`; 3 too long."""
    forms = [_asked(prompt.given) for prompt in prompts]
    counts = Counter(form.source for form in forms)
    parts = [f"{source}" if len(counts) == 1 else f"{source} ({count})" for source, count in counts.items()]
    ours = [each for row in built_in() for each in (row, row["messages"][-1]["content"])]
    if all(prompt.given in ours for prompt in prompts):
        parts = ["those that are built in"]
    words = f"{len(prompts)} prompts from {', '.join(parts)}"
    if cut := sum(form.cut for form in forms):
        words += f"; final answers left out of {'all' if cut == len(prompts) else cut}"
    return words + (f"; {lost} too long for {limit} tokens with {max_new_tokens} new ones" if lost else "")


def default(tokenizer: PreTrainedTokenizerBase) -> Sequence[str | dict[str, Any]]:
    """The built-in prompts in a form that the tokenizer can take: chat where it has a template, else plain text."""
    prompts = built_in()
    return prompts if tokenizer.chat_template else [entry["messages"][-1]["content"] for entry in prompts]
