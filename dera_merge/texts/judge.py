"""A reward that is a language model asked which of two answers is better, or how good one is.

`http(s)://…/chat/completions#MODEL` is an address that takes OpenAI's chat completions, as vLLM, SGLang, llama.cpp,
Ollama and most services do. A template says what is asked, and by the fields it holds what kind of question that is:

    {answer_a}, {answer_b}   which of two is better: the text, and the aligned model's own (λ=1) answer to that prompt
    {answer}                 how good one text is

and `{prompt}` and any column of the prompts, `{reference}`, say. The verdict is the last `[[…]]` of the reply: `[[A]]`,
`[[B]]` or `[[C]]` (a tie) of two, a number of one. Of two, both orders are asked: 1 where the text wins both, 0 where
it loses both, ½ else, since a judge that changes its mind with the places has none (Zheng et al., 2023).

What a judge said is kept by what it was asked, in `judge.jsonl` of the output directory, and is never asked again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import DeraError
from ..processes import launched
from .endpoints import Endpoint, TooMuch
from .exchanges import Exchange

AT_ONCE = 16  # requests
PATIENCE = 300.0  # seconds for one answer: a judge may think
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before it is asked again
KEY = "DERA_MERGE_JUDGE_KEY"  # environment variable: sent as a bearer token
FILE = "judge.jsonl"

PAIRWISE = """Two assistants have answered the same request. Decide which answer serves the person who asked better.
Look at whether it is right, does what was asked, and is clear. Length and style alone earn nothing, and neither does
being shown first. Compare both in a sentence or two, then end with your verdict on a line of its own: [[A]] if answer A
is better, [[B]] if answer B is better, [[C]] if neither is.

# The request

{prompt}

# Answer A

{answer_a}

# Answer B

{answer_b}
"""
SCORE = """An assistant has answered a request. Decide how well the answer serves the person who asked. Look at whether
it is right, does what was asked, and is clear. Length and style alone earn nothing. Give your reasons in a sentence or
two, then end with your verdict on a line of its own: a whole number from 1 (useless) to 10 (as good as can be), as in
[[5]].

# The request

{prompt}

# The answer

{answer}
"""
BUILT_IN = {"pairwise": PAIRWISE, "score": SCORE}
_FIELD = re.compile(r"\{(\w+)\}")
_VERDICT = re.compile(r"\[\[\s*([^\[\]]{1,20}?)\s*\]\]")


class Judge:
    """A scorer that asks a language model.

    Args:
        spec: its address, and behind `#` which model is asked.
        template: `"pairwise"`, `"score"`, or a file.
        folder: where to keep what it says; None keeps it in memory alone.
        at_once: how many requests are under way at once.

    Attributes:
        name: what reports call it.
        compares: whether it compares with the aligned model's own answers, `Exchange.rival`.

    Raises:
        DeraError: that is no address, no model is named, or the template cannot be read or asks nothing.
    """

    def __init__(
        self, spec: str, template: str = "pairwise", folder: Path | None = None, at_once: int = AT_ONCE
    ) -> None:
        self.endpoint = Endpoint(spec, "judge", KEY, PATIENCE, PAUSES)
        if not self.endpoint.label:
            raise DeraError(f"say which model {self.endpoint.shown} is to ask, as in {self.endpoint.shown}#MODEL")
        self.template, self.at_once = BUILT_IN.get(template) or _read(template), at_once
        fields = set(_FIELD.findall(self.template))
        self.compares = {"answer_a", "answer_b"} <= fields
        if self.compares == ("answer" in fields):
            raise DeraError(f"the judge's prompt {template} must hold {{answer}}, or {{answer_a}} and {{answer_b}}")
        self.columns = fields - {"prompt", "answer", "answer_a", "answer_b"}
        self.name = f"{self.endpoint.shown}#{self.endpoint.label}"
        if template != "pairwise":  # texts that were judged otherwise are not to be gone on with
            digest = hashlib.sha256(self.template.encode()).hexdigest()[:8]
            self.name += " score" if template == "score" else f" {Path(template).stem}-{digest}"
        self.takes_temperature = True
        self.used: dict[str, dict[str, Any]] = {}  # what it was asked in this run, and said
        self.pairs: dict[str, bool] = {}  # that were judged: whether the verdicts of the two orders contradict
        self._known = {} if folder is None else _kept(folder)
        number = launched()[0]  # each process has a file of its own
        self._file = folder and folder / (f"judge-{number}.jsonl" if number else FILE)
        self._fresh, self._lock = 0, Lock()
        self._unwritten: list[dict[str, Any]] = []  # what only a check has asked is not: it may come to nothing

    def check(self, texts: Sequence[Exchange]) -> None:
        """Let it judge one answer. Raises DeraError where no verdict comes, or a prompt lacks a column."""
        for number, text in enumerate(texts, 1):
            if lacking := sorted(self.columns - text.columns.keys()):
                raise DeraError(f"the judge's prompt wants a column {lacking[0]}, which prompt {number} does not have")
        first = texts[0]
        rival = "I do not know." if self.compares else None
        asked = Exchange(first.asked, first.completion, first.columns, rival=rival)
        if self._verdicts([asked])[0] is None:
            (reply, *_) = [answer["said"] for answer in self.used.values()]
            raise DeraError(f"the judge {self.name} gives no verdict as its prompt asks for: {reply[-80:]!r}")
        self.pairs.clear()

    def __call__(self, texts: Sequence[Exchange]) -> list[float | None]:
        """The verdict on each; None where there is none. Raises RewardDown where the judge does not answer."""
        if self.compares and all(text.rival is None for text in texts):
            raise DeraError("the aligned model's own answers, to compare with, are not there")
        try:
            return self._verdicts(texts)
        finally:
            self._write()

    def spent(self) -> dict[str, Any]:
        """What this run's verdicts took: requests, how many of them were made now, tokens as the judge counts them."""
        usage = [answer["usage"] for answer in self.used.values()]
        told: dict[str, Any] = {"requests": len(usage), "asked_now": self._fresh}
        told |= {kind: sum(each.get(kind, 0) for each in usage) for kind in ("prompt_tokens", "completion_tokens")}
        return told | ({"pairs": len(self.pairs), "split": sum(self.pairs.values())} if self.compares else {})

    def _verdicts(self, texts: Sequence[Exchange]) -> list[float | None]:
        questions = list(dict.fromkeys(question for text in texts for question in self._questions(text)))
        threads, waits = ThreadPoolExecutor(self.at_once), True
        try:
            replies = dict(zip(questions, threads.map(self._reply, questions), strict=True))
        except KeyboardInterrupt:
            waits = False
            raise
        finally:  # what is under way is paid for, and kept
            threads.shutdown(wait=waits, cancel_futures=True)
        return [self._verdict(text, replies) for text in texts]

    def _questions(self, text: Exchange) -> list[str]:
        """What is asked about a text: nothing where it is its own rival, or has none."""
        if not self.compares:
            return [self._filled(text, answer=text.completion)]
        if text.rival is None or text.completion == text.rival:
            return []
        ours, theirs = text.completion, text.rival
        return [self._filled(text, answer_a=a, answer_b=b) for a, b in ((ours, theirs), (theirs, ours))]

    def _filled(self, text: Exchange, **answers: str) -> str:
        fields = {**text.columns, "prompt": text.prompt, **answers}
        return _FIELD.sub(lambda field: str(fields.get(field[1], field[0])), self.template)

    def _verdict(self, text: Exchange, replies: dict[str, str]) -> float | None:
        """The reward in the replies to a text's questions."""
        questions = self._questions(text)
        last = [found[-1] if (found := _VERDICT.findall(replies[asked])) else "" for asked in questions]
        if not self.compares:
            try:
                return float(last[0])
            except ValueError:
                return None
        worth = {"A": 1.0, "B": 0.0, "C": 0.5}
        if not all(verdict.upper() in worth for verdict in last):
            return None
        if not last:
            return None if text.rival is None else 0.5
        first, swapped = worth[last[0].upper()], 1 - worth[last[1].upper()]
        self.pairs[questions[0]] = {first, swapped} == {0.0, 1.0}
        return first if first == swapped else 0.5

    def _reply(self, question: str) -> str:
        """What the judge says, now or before; what it refuses to judge has no verdict."""
        key = hashlib.sha256(json.dumps([self.endpoint.shown, self.endpoint.label, question]).encode()).hexdigest()
        with self._lock:
            answer = self._known.get(key)
        if answer is None:
            answer = {"key": key} | self._asked(question)
            with self._lock:
                self._known[key], self._fresh = answer, self._fresh + 1
                self._unwritten.append(answer)
        with self._lock:
            self.used[key] = answer
        return answer["said"]

    def _asked(self, question: str) -> dict[str, Any]:
        """The reply to a question, and the tokens that it took."""
        while True:
            body = {"model": self.endpoint.label, "messages": [{"role": "user", "content": question}]}
            body |= {"temperature": 0} if self.takes_temperature else {}
            try:
                answer = self.endpoint.post(body)
                break
            except TooMuch as refusal:
                if "temperature" not in body or "temperature" not in str(refusal):
                    raise DeraError(str(refusal)) from refusal
                self.takes_temperature = False  # as of some that think
        try:
            said = answer["choices"][0]["message"]["content"]
            usage = {name: int(count) for name, count in (answer.get("usage") or {}).items() if isinstance(count, int)}
        except (KeyError, IndexError, TypeError, AttributeError):
            said, usage = None, {}
        if not isinstance(said, str):
            told = self.endpoint.hidden(json.dumps(answer))
            raise DeraError(f"the judge {self.endpoint.shown} answers with no chat completion: {told:.80}")
        return {"said": self.endpoint.hidden(said), "usage": usage}

    def _write(self) -> None:
        """Append what was said since to the file."""
        if self._file is None or not self._unwritten:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a line that an interrupted run has cut off
                    stream.write(b"\n")
            stream.writelines(json.dumps(answer).encode() + b"\n" for answer in self._unwritten)
        self._unwritten = []


def _read(template: str) -> str:
    """The text of a template. Raises DeraError where there is none."""
    try:
        return Path(template).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(BUILT_IN)
        raise DeraError(f"the judge's prompt is {known} or a file, and {template} cannot be read: {error}") from error


def _kept(folder: Path) -> dict[str, dict[str, Any]]:
    """What judges said before, of all processes; lines that are cut off are left out."""
    answers: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("judge*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                answer = json.loads(line)
                if isinstance(answer["said"], str) and isinstance(answer["usage"], dict):
                    answers[answer["key"]] = answer
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return answers
