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

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..errors import DeraError
from .exchanges import Exchange, RewardDown

AT_ONCE = 16  # texts of one request
PATIENCE = 60.0  # seconds for one answer
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before it is asked again where it cannot be reached, or is busy
LARGEST = 1 << 26  # bytes of an answer
TOKEN = "DERA_MERGE_REWARD_TOKEN"  # environment variable: sent as a bearer token
_BUSY = (408, 425, 429, 502, 503, 504)
_LISTS = ("rewards", "scores", "predictions", "results", "outputs", "data")
_SCORES = ("score", "reward", "probs")


class _TooMuch(Exception):
    """A request that may do with fewer texts."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects turn a POST into a GET, and would carry the token elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Server:
    """A scorer that is a server.

    Args:
        spec: its address, and behind `#` which label is the reward (for vLLM the number of the class).

    Raises:
        DeraError: that is no address, or one with a password in it.
    """

    def __init__(self, spec: str) -> None:
        try:
            parts = urlsplit(spec)
            if not parts.hostname or parts.port == 0:
                raise ValueError("there is no host")
        except ValueError as error:
            raise DeraError(f"{spec!r} is no address of a reward server: {error}") from error
        if parts.username or parts.password:
            raise DeraError(f"give the password of {parts.hostname} as a token in {TOKEN}, not in the address")
        self.label = parts.fragment
        self.address = urlunsplit(parts._replace(fragment=""))
        # A query may hold a key, which no report is to show.
        self.shown = urlunsplit(parts._replace(fragment="", query=""))
        self.kind = parts.path.rstrip("/").rpartition("/")[2]
        self.at_once = AT_ONCE
        self.seen: str | None = None  # the label of scores so far, where the server gives the likeliest alone
        own = parts.hostname in ("localhost", "127.0.0.1", "::1")  # which no proxy reaches
        self.opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if own else []))

    @property
    def name(self) -> str:
        """The spec without what is nobody's business."""
        return f"{self.shown}#{self.label}" if self.label else self.shown

    def check(self, texts: Sequence[Exchange]) -> None:
        """Ask for one reward. Raises DeraError where none comes."""
        try:
            (value,) = self._scores(texts[:1])
        except _TooMuch as error:
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
            except _TooMuch as error:
                if len(batch) == 1:
                    raise DeraError(str(error)) from error
                self.at_once = len(batch) // 2
        return scores

    def _scores(self, texts: Sequence[Exchange]) -> list[Any]:
        answer = self._asked(self._body(texts), len(texts))
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

    def _asked(self, body: dict[str, Any], texts: int) -> Any:
        """What the server answers, asked again where it may answer later."""
        for pause in (*PAUSES, None):
            try:
                return self._once(body, texts)
            except _Later as later:
                if pause is None:
                    raise RewardDown(
                        f"the reward server {self.shown} does not answer: {later}; start it, and go on with --resume "
                        "if there are texts already"
                    ) from later
                time.sleep(pause)
        raise AssertionError

    def _once(self, body: dict[str, Any], texts: int) -> Any:
        """The answer to a request for so many texts."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(self.address, json.dumps(body, default=str).encode(), headers)
        deadline, content = time.monotonic() + PATIENCE, b""
        try:
            with self.opener.open(request, timeout=PATIENCE) as answer:
                while part := answer.read1(1 << 16):
                    content += part
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    if len(content) > LARGEST:
                        raise DeraError(f"the reward server {self.shown} answers with more than {LARGEST >> 20} MB")
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._late(texts) from error
            raise _Later(str(reason) or type(reason).__name__) from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            said = " ".join(content[:80].decode(errors="replace").split())
            raise DeraError(f"the reward server {self.shown} answers, but not with JSON: {said}") from error

    def _late(self, texts: int) -> Exception:
        """Of an answer that did not come in time."""
        late = f"no answer in {PATIENCE:g} seconds"
        if texts > 1:
            return _TooMuch(late)
        return RewardDown(f"the reward server {self.shown} gives {late} to a single text; is it at work?")

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Of a status that says no."""
        said = " ".join(error.read(2000).decode(errors="replace").split())
        what = f"status {error.code} {error.reason}"
        if error.code in _BUSY:
            return _Later(what)
        told = f"the reward server {self.shown} refuses ({what}): {said:.160}".rstrip(": ")
        if error.code in (401, 403):
            return RewardDown(f"{told}; a token goes into {TOKEN}")
        if error.code < 400 or error.code in (404, 405, 501):
            return RewardDown(f"{told}; is the address right?")
        return _TooMuch(told)


class _Later(Exception):
    """Why no answer came that may come later."""


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
