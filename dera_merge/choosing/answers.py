"""Texts with their rewards: in memory, on disk as they come, and read back."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import lambdas
from ..errors import DeraError
from ..files.atomic import json_bytes, write_atomically
from ..lambdas import Lam, Vector
from ..texts.prompts import Prompt
from ..texts.rewards import Reward

Kind = Literal["exact", "merged", "rival"]
Mode = Literal["exact", "merged", "speculative"]
TEXTS = "texts.jsonl"
FINISHED = "sweep.json"  # lies beside them once the report is written
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What a sweep samples, and what texts are worth.

    Attributes:
        prompts: as token ids.
        plain: the prompts in words, of a conversation all turns.
        samples: texts for each prompt at each λ.
        max_new_tokens: their length, in tokens.
        mode: whose texts answer the question.
        reweight: whether texts of several λ are pooled.
    """

    prompts: list[Prompt]
    plain: list[str]
    rewards: list[Reward]
    samples: int
    max_new_tokens: int
    mode: Mode
    reweight: bool


@dataclass(frozen=True)
class Answer:
    """A text of a model at one λ.

    Attributes:
        mode: `"exact"`, or `"merged"`: whose it is; `"rival"`: the aligned model's own, which a judge compares with.
        prompt, sample: its prompt, and which of that prompt's texts it is.
        ids: its new tokens.
        rewards: name → number, None where the reward failed.
    """

    mode: Kind
    lam: Lam
    prompt: int
    sample: int
    ids: list[int]
    text: str
    rewards: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """A line of texts.jsonl."""
        return {"mode": self.mode, "lambda": self.lam, "prompt": self.prompt, "sample": self.sample,
                "token_ids": self.ids,
                "text": self.text, "rewards": self.rewards}  # fmt: skip


def read_scored(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Texts that were sampled and scored before, from JSON Lines.

    Each line has `"prompt"` (text, or number of the prompt) or `"messages"`, `"completion"`, where it came from as
    `"lambda": 0.5` (`[0.5, 0.25]` of several aligned models) or `"from": "ref"|"aligned"`, and `"reward"` or
    `"rewards": {name: number}`. `texts.jsonl` of an earlier sweep will do.

    Raises:
        DeraError: the file cannot be read, or a line lacks something.
    """
    lines = []
    try:
        content = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DeraError(f"{file} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("expected an object")
            if "settings" in entry and "prompt" not in entry:  # the head of texts.jsonl
                continue
            if entry.get("mode", "exact") != "exact":
                continue
            lam = {"ref": 0.0, "aligned": 1.0}.get(entry.get("from"), entry.get("lambda"))
            values = lam if isinstance(lam, list) and lam else [lam]
            if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values):
                raise ValueError('expected "lambda": number, or "from": "ref" or "aligned"')
            text = entry.get("completion", entry.get("text"))
            if not isinstance(text, str) and not isinstance(entry.get("token_ids"), list):
                raise ValueError('expected "completion"')
            given = entry.get("rewards", {"reward": entry["reward"]} if "reward" in entry else {})
            numbers = {k: v for k, v in given.items() if isinstance(v, int | float) and math.isfinite(v)}
            rewards = dict.fromkeys(given) | numbers
            lam = Vector(lam) if isinstance(lam, list) else float(lam) + 0.0
            lines.append(entry | {"lambda": lam, "completion": text, "rewards": rewards})
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise DeraError(f"{file}, line {number}: {error}") from error
    if not lines:
        raise DeraError(f"{file} holds no scored texts")
    return lines


def _json(line: str) -> Any:
    """A line's value, None where it has none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class Store:
    """Answers in memory and, line by line as they come, in `<folder>/texts.jsonl`.

    Args:
        folder: None keeps them in memory alone.
        settings: what two calls must have in common to share a file.
        resume: read what an earlier call left there.
        overwrite: throw it away.
        writes: whether this process writes (the first of several).

    Raises:
        DeraError: what lies there was made by another call, or it is not said what is to become of it. (Texts of
            another call whose report is written are kept under another name.)
    """

    def __init__(
        self, folder: Path | None, settings: dict[str, Any], resume: bool, overwrite: bool, writes: bool
    ) -> None:
        self.answers: list[Answer] = []
        self._file = None if folder is None else folder / TEXTS
        self._writes = writes  # the first of several processes does; all read what is there
        self._head: dict[str, str] | None = {
            "settings": hashlib.sha256(json_bytes(settings)).hexdigest()
        }  # None once the file has it
        if self._file is not None and not overwrite and self._file.is_file():
            first, *lines = self._file.read_text(encoding="utf-8").split("\n")
            same = _json(first) == self._head
            count = sum(bool(line) for line in lines)
            if not same and not resume and (self._file.parent / FINISHED).is_file():
                return self._set_aside(count)
            if not same:
                raise DeraError(f"{self._file} holds {count} texts of another call or from other inputs; give another "
                                "--output, or --overwrite throws them away")  # fmt: skip
            if not resume:
                raise DeraError(f"{self._file} holds {count} texts of this very call; --resume goes on with them, "
                                "--overwrite throws them away")  # fmt: skip
            whole = lines[:-1]  # what follows the last newline was cut off
            keys = ("prompt", "sample", "token_ids", "text", "rewards")
            try:
                for row in map(json.loads, whole):
                    self.answers.append(Answer(row["mode"], lambdas.loaded(row["lambda"]), *(row[key] for key in keys)))
            except (ValueError, KeyError, AttributeError) as error:
                raise DeraError(f"{self._file} is broken ({error}); --overwrite starts afresh") from error
            if writes:
                write_atomically(self._file, "".join(f"{line}\n" for line in [first, *whole]).encode())
            self._head = None

    def _set_aside(self, count: int) -> None:
        """Keep the texts of a finished sweep, which its report stands for, under another name."""
        if self._writes:
            names = (self._file.with_name(f"texts.{number}.jsonl") for number in itertools.count(1))
            kept = self._file.rename(next(name for name in names if not name.exists()))
            log.info(f"{count} texts of a finished sweep are kept as {kept}")

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep these, and append them to the file."""
        self.answers += answers
        if self._file is None or not self._writes:
            return
        if self._head is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, (json.dumps(self._head) + "\n").encode())
            self._head = None
        with self._file.open("a", encoding="utf-8") as stream:
            for a in answers:
                stream.write(json.dumps(a.to_dict(), ensure_ascii=False) + "\n")
