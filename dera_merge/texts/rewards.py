"""Rewards of texts: functions, programs, reward models, servers.

A spec is one of

    module:function       text → number, (prompt, text) → number, TRL's lists of them; see `functions.py`
    file.py:function      likewise
    command:WORDS         a program that reads JSON Lines of {"prompt", "completion", …} and writes a number a line
    model:ID[#LABEL]      a sequence classifier (directory or Hub id), see `classifier.py`
    http(s)://…[#LABEL]   a server that classifies texts, see `servers.py`
    http(s)://…/chat/completions#MODEL  a language model as a judge, see `judge.py`
    answer:number[#COLUMN]  1 where the text ends at the number in a column of its prompt, also answer:boxed,
                          answer:choice, and answer:python for code that parses, see `verified.py`
    length                words of the text
    tokens                its tokens, an end token included: a cost, with a negative weight
    lexicon               of the demo pair: different words of praise, less those of blame, less repeats
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..demo import reward as praise
from ..errors import DeraError
from .exchanges import Check, Exchange, RewardDown, Scorer
from .functions import Called, function
from .judge import Judge
from .prompts import Prompt
from .servers import Server
from .verified import parses, verified

FORMS = (
    "module:function (dera_merge.demo:reward, say), file.py:function, command:…, model:…, http://…, answer:number, "
    "answer:boxed, answer:choice, answer:python, length, tokens or lexicon"
)


@dataclass(frozen=True)
class Reward:
    """A named reward of exchanges, that is of (prompt, completion) and what else is known of them.

    Attributes:
        name: what reports call it.
        scorer: gives each of several exchanges a number, or None where it has none.
        check: looks at it before any work is done for it, given a stand-in answer to each prompt; raises DeraError.
        compares: whether it compares with the aligned model's own answer, `Exchange.rival`.
        spent: what it took so far, for reports; None where that is nobody's cost.
        needs: what a bare pair of texts lacks for it, and what to give instead; None where it lacks nothing.
    """

    name: str
    scorer: Scorer
    check: Check | None = None
    compares: bool = False
    spent: Callable[[], dict[str, Any]] | None = None
    needs: str | None = None

    def score(self, texts: Sequence[Exchange | tuple[str, str]]) -> list[float | None]:
        """The reward of each text; None where it has none, or fails, or is no finite number, twice.

        Raises:
            DeraError: a text is a bare pair, and this reward wants a column of its prompt's row.
            RewardDown: no text is at fault.
        """
        if self.needs and not all(isinstance(text, Exchange) for text in texts):
            raise DeraError(self.needs)
        texts = [text if isinstance(text, Exchange) else Exchange(*text) for text in texts]
        values = self._said_of(texts)
        if isinstance(values, str):
            return [self._one(text) for text in texts]
        return [self._one(text) if isinstance(value, str) else value for text, value in zip(texts, values, strict=True)]

    def why_not(self, text: Exchange | tuple[str, str]) -> str | None:
        """What goes wrong with a text, in one line; None where nothing does."""
        said = self._said_of([text if isinstance(text, Exchange) else Exchange(*text)])
        said = said if isinstance(said, str) else said[0]
        return said if isinstance(said, str) else "it gave no number" if said is None else None

    def _one(self, text: Exchange) -> float | None:
        """The reward of one text, tried twice; None where both fail."""
        for _ in range(2):
            if not isinstance(said := self._said_of([text]), str) and not isinstance(said[0], str):
                return said[0]
        return None

    def _said_of(self, texts: Sequence[Exchange]) -> list[float | str | None] | str:
        """A number for each text, None where it has none, or why it is none; or why there are no numbers at all.

        Whatever a stranger's function does to a text, be it an exit, must not end the run.
        """
        try:
            with redirect_stdout(sys.stderr):  # stdout is for results
                values = list(self.scorer(texts))
                if len(values) != len(texts):
                    return f"{len(values)} numbers came for {len(texts)} texts"
                return [self._number(value) for value in values]
        except (KeyboardInterrupt, RewardDown):
            raise
        except BaseException as error:
            kind = "" if isinstance(error, DeraError) else f"{type(error).__name__}: "
            return kind + " ".join(str(error).split())

    def _number(self, value: Any) -> float | str | None:
        """As a float; why it is none, where it is not None."""
        try:
            if value is None or math.isfinite(number := float(value)):
                return None if value is None else number
        except (TypeError, ValueError, OverflowError) as error:
            return f"{type(error).__name__}: {error}"
        return f"{self.name} is {number}"


def load_reward(
    spec: str, device: Any = "cpu", judge_prompt: str = "pairwise", folder: str | os.PathLike[str] | None = None
) -> Reward:
    """A reward from its spec.

    Args:
        spec: in one of the forms above.
        device: where a reward model runs.
        judge_prompt: what a judge is asked: `"pairwise"`, `"score"`, or a file with a prompt.
        folder: where what a judge says is kept, so that it is not asked again.

    Raises:
        DeraError: there is no such function, program or model.
    """
    kind, _, rest = spec.partition(":")
    if spec == "length":
        return Reward("length", lambda texts: [float(len(text.split())) for _, text in texts])
    if spec == "tokens":
        return Reward("tokens", lambda texts: [None if text.ids is None else float(len(text.ids)) for text in texts])
    if spec == "lexicon":
        return Reward("lexicon", lambda texts: [praise(text) for _, text in texts])
    if spec.startswith(("http://", "https://")):
        if urlsplit(spec).path.rstrip("/").endswith("/chat/completions"):
            judge = Judge(spec, judge_prompt, None if folder is None else Path(folder))
            return Reward(judge.name, judge, judge.check, judge.compares, judge.spent)
        server = Server(spec)
        return Reward(server.name, server, server.check)
    if spec == "answer:python":
        return Reward(spec, parses)
    if kind == "answer":
        answers = verified(spec)
        return Reward(spec, answers, answers.check, needs=answers.needs)
    if kind == "command" and rest:
        return Reward(spec, scorer := Program(rest), partial(_trial, scorer))
    if kind == "model" and rest:
        from .classifier import Classifier

        return Reward(spec, scorer := Classifier(rest, device), partial(_trial, scorer))
    if not all(spec.rpartition(":")):
        raise DeraError(f"{spec!r} is no reward; give {FORMS}")
    return as_reward(function(spec), spec)


def as_reward(
    reward: Reward | str | Callable[..., Any], name: str | None = None, folder: str | os.PathLike[str] | None = None
) -> Reward:
    """A reward from a function or a spec; a reward stays as it is. Raises DeraError as `load_reward` does."""
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        return load_reward(reward, folder=folder)
    called = Called(name or getattr(reward, "__name__", type(reward).__name__), reward)
    return Reward(called.name, called, called.check)


def checked(rewards: Sequence[Reward], prompts: Sequence[Prompt]) -> list[Exchange]:
    """Look at rewards before any work is done for them, with a stand-in answer to each prompt, which are returned.

    Raises:
        DeraError: one of them cannot be had, or wants what the prompts do not have.
    """
    answers = [Exchange(prompt.asked, "Yes.", prompt.columns) for prompt in prompts]
    for reward in rewards:
        if reward.check is not None:
            reward.check(answers)
    return answers


def _trial(scorer: Scorer, texts: Sequence[Exchange]) -> None:
    """Let it look at the shortest text. Raises DeraError where no number comes."""
    if why := Reward("the reward", scorer).why_not(min(texts, key=lambda text: len(text.whole))):
        raise DeraError(why)


class Program:
    """A scorer that runs a program, with JSON Lines on its stdin. What else it prints than rewards is not looked at.

    Args:
        words: of the command line.
    """

    def __init__(self, words: str) -> None:
        self.words = words

    def __call__(self, texts: Sequence[Exchange]) -> list[Any]:
        """What the program says of each. Raises DeraError where it fails, with the last line of its stderr."""
        lines = [
            {**text.columns, **({"messages": text.turns} if text.is_chat else {}), "prompt": text.prompt,
             "completion": text.completion}
            for text in texts
        ]  # fmt: skip
        asked = "".join(json.dumps(line, default=str) + "\n" for line in lines)
        try:
            done = subprocess.run(
                shlex.split(self.words), input=asked, capture_output=True, encoding="utf-8", errors="replace"
            )
        except (OSError, ValueError) as error:
            raise DeraError(f"the reward command {self.words} cannot be run: {error}") from error
        said = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        if done.returncode:
            how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
            raise DeraError(f"the reward command {self.words} failed ({how}): {said or 'it said nothing on stderr'}")
        values = [value for line in done.stdout.splitlines() for value in _reward_in(line)]
        if len(values) != len(texts):
            came = f"{len(values)} rewards for {len(texts)} texts"
            raise DeraError(f"the reward command {self.words} gave {came}" + (f": {said}" if said else ""))
        return values


def _reward_in(line: str) -> list[Any]:
    """The reward that a line of a program is, or none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        try:
            return [float(line)]  # nan, say
        except ValueError:
            return []
    if isinstance(value, dict):
        return [value["reward"]] if "reward" in value else []
    return [value] if value is None or isinstance(value, int | float) else []
