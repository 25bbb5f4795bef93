"""A reward that is a server: texts are POSTed as JSON, and it answers with a score for each.

The last part of the address says what it is:

    …/predict      Hugging Face's text-embeddings-inference: {"inputs": [[text], …], "raw_scores": …}
    …/classify     vLLM, SGLang: {"input": [text, …]}; "probs" in "data"
    …/score        vLLM's scores of pairs: {"text_1": [prompt, …], "text_2": [completion, …]}
    …/get_reward   OpenRLHF: {"query": [text, …], "prompts": [prompt, …], "labels": […]}; "rewards"
    any other      {"inputs": [text, …], "prompts": …, "completions": …, "columns": {name: […]}, "parameters": …}, which
                   Hugging Face's inference endpoints take for text classification, and a server of one's own can

A text is the whole conversation, the completion included. An answer is a list with a score for each text, or an object
that holds one; a score is a number, {"score": number}, or such objects with a "label" each. Without a label of ours a
server's one score is asked for raw, with one the score that it gives to that label is taken as it comes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ..errors import DeraError
from .endpoints import Endpoint, TooMuch
from .exchanges import Exchange

AT_ONCE = 16  # texts of one request
TOKEN = "DERA_MERGE_REWARD_TOKEN"  # environment variable: sent as a bearer token
_LISTS = ("rewards", "scores", "predictions", "results", "outputs", "data")
_SCORES = ("score", "reward", "probs")


class Server:
    """A scorer that is a server.

    Args:
        spec: its address, and behind `#` which label is the reward (for vLLM the number of the class).

    Raises:
        DeraError: that is no address, or one with a password in it.
    """

    def __init__(self, spec: str) -> None:
        self.endpoint = Endpoint(spec, "reward server", TOKEN)
        self.label, self.shown, self.kind = self.endpoint.label, self.endpoint.shown, self.endpoint.kind
        self.at_once = AT_ONCE
        self.seen: str | None = None  # the label of scores so far, where the server gives the likeliest alone

    @property
    def name(self) -> str:
        """The spec without what is nobody's business."""
        return f"{self.shown}#{self.label}" if self.label else self.shown

    def check(self, texts: Sequence[Exchange]) -> None:
        """Ask for one reward. Raises DeraError where none comes."""
        try:
            (value,) = self._scores(texts[:1])
        except TooMuch as error:
            raise DeraError(str(error)) from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DeraError(f"the reward server {self.shown} gives no number: {value!r:.80}")

    def __call__(self, texts: Sequence[Exchange]) -> list[Any]:
        """The score of each. Raises DeraError where the server refuses a text, RewardDown where it does not answer."""
        scores: list[Any] = []
        while len(scores) < len(texts):
            batch = texts[len(scores) : len(scores) + self.at_once]
            try:
                scores += self._scores(batch)
            except TooMuch as error:
                if len(batch) == 1:
                    raise DeraError(str(error)) from error
                self.at_once = len(batch) // 2
        return scores

    def _scores(self, texts: Sequence[Exchange]) -> list[Any]:
        answer = self.endpoint.post(self._body(texts), alone=len(texts) == 1)
        rows = _rows(answer, len(texts))
        if rows is None or len(rows) != len(texts):
            came = "no list of scores" if rows is None else f"{len(rows)} scores for {len(texts)} texts"
            raise DeraError(f"the reward server {self.shown} answers with {came}: {json.dumps(answer):.80}")
        return [self._score(row) for row in rows]

    def _body(self, texts: Sequence[Exchange]) -> dict[str, Any]:
        whole, raw = [text.whole for text in texts], not self.label
        columns = {name: [text.columns.get(name) for text in texts] for text in texts for name in text.columns}
        if self.kind == "predict":
            return {"inputs": [[text] for text in whole], "raw_scores": raw}
        if self.kind == "classify":
            return {"input": whole, **({"use_activation": False} if raw else {})}
        if self.kind == "score":
            return {"text_1": [text.prompt for text in texts], "text_2": [text.completion for text in texts]}
        own = {"prompts": [text.prompt for text in texts], "completions": [text.completion for text in texts]}
        if self.kind == "get_reward":
            labels = columns.get("label") or columns.get("labels") or [None] * len(texts)
            return {"query": whole, **own, "labels": labels}
        parameters = {"function_to_apply": "none"} if raw else {"top_k": 1000}
        return {"inputs": whole, **own, "columns": columns, "parameters": parameters}

    def _score(self, row: Any) -> Any:
        """The reward in what came for one text."""
        if isinstance(row, dict) and "label" not in row:
            row = next((row[key] for key in _SCORES if key in row), row)
        elif isinstance(row, dict) and isinstance(row.get("probs"), list):
            row = row["probs"]
        rows = row if isinstance(row, list) else [row]
        if not rows or not all(isinstance(one, dict) for one in rows):  # numbers
            place = 0 if len(rows) == 1 and not self.label else self.label
            if not str(place).isdigit() or int(place) >= len(rows):
                raise self._which(list(map(str, range(len(rows)))))
            return rows[int(place)]
        if not all("label" in one and "score" in one for one in rows):
            raise DeraError(f"the reward server {self.shown} answers with no score: {json.dumps(row):.80}")
        scores = {str(one["label"]): one["score"] for one in rows}
        if self.label:
            if self.label not in scores:
                raise self._which(list(scores))
            return scores[self.label]
        (label, *more) = scores
        if more or self.seen not in (None, label):  # a score of the likeliest label says nothing without the label
            raise self._which([self.seen or label, label, *more])
        self.seen = label
        return scores[label]

    def _which(self, labels: Sequence[str]) -> DeraError:
        has = f"it has {', '.join(dict.fromkeys(labels))}"
        if self.label:
            return DeraError(f"the reward server {self.shown} gives no score of a label {self.label}; {has}")
        return DeraError(f"the reward server {self.shown} gives scores of labels; say which is the reward, as in "
                         f"{self.shown}#{labels[-1] if labels else 0} ({has})")  # fmt: skip


def _rows(answer: Any, count: int) -> list[Any] | None:
    """What came for each of `count` texts; None where nothing looks like that."""
    if isinstance(answer, dict):
        inner = next((answer[key] for key in _LISTS if isinstance(answer.get(key), list)), None)
        if inner is None:
            return [answer] if count == 1 and any(key in answer for key in _SCORES) else None
        answer = sorted(inner, key=lambda row: row["index"]) if _indexed(inner) else inner
    if not isinstance(answer, list):
        return [answer] if count == 1 and isinstance(answer, int | float) else None
    if count == 1 and len(answer) > 1 and all(isinstance(row, dict) and "label" in row for row in answer):
        return [answer]  # all labels of the one text
    return answer


def _indexed(rows: list[Any]) -> bool:
    return all(isinstance(row, dict) and isinstance(row.get("index"), int) for row in rows)
