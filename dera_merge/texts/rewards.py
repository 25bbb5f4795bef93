"""Rewards of texts: functions, commands, reward models.

A spec is one of

    module:function       text → number, or (prompt, text) → number; modules of the working directory count
    command:WORDS         a program that reads JSON Lines of {"prompt", "completion"} and writes a number a line
    model:ID[#LABEL]      a sequence classifier (directory or Hub id): its one output, or the log-probability of a label
    length                words of the text
    lexicon               of the demo pair: different words of praise, less those of blame, less repeats
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..demo import reward as praise
from ..errors import DeraError
from ..models.source import Source

Scorer = Callable[[Sequence[tuple[str, str]]], list[float]]
BATCH = 16  # texts that a reward model reads at a time


@dataclass(frozen=True)
class Reward:
    """A named reward of (prompt, completion)."""

    name: str
    scorer: Scorer

    def score(self, texts: Sequence[tuple[str, str]]) -> list[float | None]:
        """The reward of each text; None where it fails, or is no finite number, twice."""
        try:
            return [self._number(value) for value in self._all(texts)]
        except Exception:  # whatever a stranger's function or program does to one text must not end the run
            return [self._one(text) for text in texts]

    def _all(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        """What the scorer says of each text. Raises DeraError where it does not say one number a text."""
        values = self.scorer(texts)
        if len(values) != len(texts):
            raise DeraError(f"{len(values)} numbers came for {len(texts)} texts")
        return values

    def _one(self, text: tuple[str, str]) -> float | None:
        """The reward of one text, tried twice; None where both fail."""
        for _ in range(2):
            try:
                return self._number(self._all([text])[0])
            except Exception:
                continue
        return None

    def why_not(self, text: tuple[str, str]) -> str | None:
        """What goes wrong with a text, in one line; None where nothing does."""
        try:
            self._number(self._all([text])[0])
        except Exception as error:
            kind = "" if isinstance(error, DeraError) else f"{type(error).__name__}: "
            return kind + " ".join(str(error).split())
        return None

    def _number(self, value: Any) -> float:
        """As a float. Raises ValueError or TypeError where it is none, or not finite."""
        if not math.isfinite(value := float(value)):
            raise ValueError(f"{self.name} is {value}")
        return value


def load_reward(spec: str, device: Any = "cpu") -> Reward:
    """A reward from its spec.

    Raises:
        DeraError: there is no such function, program or model.
    """
    kind, _, rest = spec.partition(":")
    if spec == "length":
        return Reward("length", lambda texts: [float(len(text.split())) for _, text in texts])
    if spec == "lexicon":
        return Reward("lexicon", lambda texts: [praise(text) for _, text in texts])
    if kind == "command" and rest:
        return Reward(spec, _command(rest))
    if kind == "model" and rest:
        return Reward(spec, _classifier(rest, device))
    if not all(spec.partition(":")):
        known = "module:function (dera_merge.demo:reward, say), command:…, model:…, length or lexicon"
        raise DeraError(f"{spec!r} is no reward; give {known}")
    return Reward(spec, _called(function(spec)))


def function(spec: str) -> Callable[..., float]:
    """A function from `module:function`.

    Raises:
        DeraError: there is none.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise DeraError(f"{spec!r} is no function; give module:function, dera_merge.demo:reward, say")
    sys.path.insert(0, "")  # as python -m does
    try:
        loaded = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DeraError(f"the reward {spec} cannot be loaded: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(loaded):
        raise DeraError(f"{spec} is no function")
    return loaded


def _called(reward: Callable[..., float]) -> Scorer:
    """A scorer of a function of (text), or of (prompt, text) where it needs two arguments."""
    try:
        kinds = [p for p in inspect.signature(reward).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        kinds = []
    needed = [p for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) == 2:
        return lambda texts: [reward(prompt, text) for prompt, text in texts]
    return lambda texts: [reward(text) for _, text in texts]


def _command(words: str) -> Scorer:
    """A scorer that runs a program, with JSON Lines on its stdin."""

    def score(texts: Sequence[tuple[str, str]]) -> list[float]:
        lines = "".join(json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in texts)
        try:
            done = subprocess.run(shlex.split(words), input=lines, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise DeraError(f"the reward command {words} failed: {error}") from error
        values = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
        return [value["reward"] if isinstance(value, dict) else value for value in values]

    return score


def _classifier(name: str, device: Any) -> Scorer:
    """A scorer that is a sequence classifier, `ID` or `ID#LABEL`."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model_id, _, label = name.partition("#")
    folder = Source.locate(model_id).folder
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DeraError(f"{model_id} is no sequence classifier that transformers can load: {error}") from error
    labels = {str(text): int(index) for index, text in model.config.id2label.items()}
    if len(labels) > 1 and label not in labels:
        raise DeraError(
            f"{model_id} has {len(labels)} labels; say which one is the reward: model:{model_id}#{next(iter(labels))}"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id

    @torch.no_grad()
    def score(texts: Sequence[tuple[str, str]]) -> list[float]:
        rewards: list[float] = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            if tokenizer.chat_template:
                turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": t}] for p, t in batch]
                whole = [tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
                inputs = tokenizer(whole, padding=True, truncation=True, return_tensors="pt", add_special_tokens=False)
            else:
                inputs = tokenizer([f"{p}\n{t}" for p, t in batch], padding=True, truncation=True, return_tensors="pt")
            logits = model(**inputs.to(model.device)).logits.float()
            rewards += (logits[:, 0] if len(labels) == 1 else logits.log_softmax(-1)[:, labels[label]]).tolist()
        return rewards

    return score
