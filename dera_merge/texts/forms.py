"""What one row of a data set asks: the forms in which prompts are published.

In this order, as a row may have several of these:

    prompt: [turns]                       TRL; chat
    chosen, rejected: [turns]             UltraFeedback, TRL's implicit prompt: the turns that both begin with; chat
    messages, conversations: [turns]      SFT sets; ShareGPT's {"from", "value"} too; chat
    prompt: text                          raw text
    instruction (and input, or context)   Alpaca, Dolly: a user's turn
    question, problem, query or input     GSM8K, MATH: a user's turn
    chosen, rejected: texts               HH: the text that both begin with, up to the last answer's mark; raw text

Answers are never part of a prompt: final turns of the assistant are cut off. What is scored as a given text is the
column `completion` alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .images import is_content, joined

Turns = list[dict[str, Any]]
T = TypeVar("T", str, Turns)

ROLES = {  # of ShareGPT's "from"
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("question", "problem", "query", "input")
SYSTEM = ("system", "system_prompt")
KNOWN = ("prompt", *CONVERSATIONS, "instruction", *QUESTIONS, "chosen")
PAIR = "`chosen` and `rejected`"
ANSWER_MARK = "\n\nAssistant:"  # of HH


@dataclass(frozen=True)
class Asked:
    """What a row asks.

    Attributes:
        turns: a conversation for the chat template, or None.
        text: the prompt as raw text: of a row that holds no turns, or of one question where there is no chat template.
        source: the columns that it was read from, in words.
        completion: a text to score on, where one is given.
        cut: a final answer was left out.
    """

    turns: Turns | None
    text: str | None
    source: str
    completion: str | None = None
    cut: bool = False


def asked(row: Any) -> Asked:
    """What a row asks. Raises ValueError where it is in none of the known forms."""
    if not isinstance(row, dict):
        raise ValueError(f'expected an object with "messages" or with "prompt", not {type(row).__name__}')
    found = _asked({key: value for key, value in row.items() if value is not None})
    if row.get("completion") is None:
        return found
    return replace(found, completion=_completion(row["completion"]), source=f"{found.source} and `completion`")


def _asked(row: dict[str, Any]) -> Asked:
    pair = (row.get("chosen"), row.get("rejected"))
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str)), "")
    if isinstance(row.get("prompt"), list):
        return _conversation(row["prompt"], "`prompt`")
    if all(isinstance(side, list) for side in pair):
        chosen, rejected = (_turns(side, PAIR) for side in pair)
        return replace(_conversation(_shared(chosen, rejected), PAIR), cut=False)
    for name in CONVERSATIONS:
        if name in row:
            return _conversation(row[name], f"`{name}`", system)
    if "prompt" in row:
        return Asked(None, _text(row, "prompt"), "`prompt`")
    if "instruction" in row:
        more = [name for name in ("input", "context") if row.get(name)]
        return _question(row, ["instruction", *more], system)
    for name in QUESTIONS:
        if name in row:
            return _question(row, [name], system)
    if all(isinstance(side, str) for side in pair):
        return Asked(None, _shared_text(*pair), PAIR)
    names = ", ".join(map(repr, list(row)[:8])) or "nothing"
    raise ValueError(f'expected an object with "messages" or with "prompt" (or {", ".join(KNOWN[2:])}); it has {names}')


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f'"{name}" is not a text')
    return row[name]


def _question(row: dict[str, Any], names: list[str], system: str) -> Asked:
    """A user's turn of these columns, maybe under a system prompt."""
    text = "\n\n".join(_text(row, name) for name in names)
    if not text.strip():
        raise ValueError(f'"{names[0]}" is empty')
    above = [{"role": "system", "content": system}] if system else []
    plain = "\n\n".join([*(turn["content"] for turn in above), text])
    return Asked([*above, {"role": "user", "content": text}], plain, " and ".join(f"`{name}`" for name in names))


def _conversation(value: Any, name: str, system: str = "") -> Asked:
    """Turns without the assistant's last ones, maybe under a system prompt of a column of its own."""
    turns = _turns(value, name) if value else []
    if system and turns and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system}, *turns]
    kept = len(turns)
    while kept and turns[kept - 1]["role"] == "assistant":
        kept -= 1
    if not kept or all(turn["role"] == "system" for turn in turns[:kept]):
        raise ValueError(f"{name}: there is no turn to answer")
    return Asked(turns[:kept], None, name, cut=kept < len(turns))


def _turns(value: Any, name: str) -> Turns:
    """Turns as chat templates take them; of parts that are all texts one text, as not every template knows parts."""
    problem = ValueError(f'{name} is not a list of {{"role": …, "content": …}}')
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise problem
    turns = []
    for turn in value:
        turn = {key: part for key, part in turn.items() if part is not None}  # tables fill what a turn lacks
        if "from" in turn and "value" in turn:
            role = ROLES.get(str(turn["from"]).lower())
            if role is None:
                raise ValueError(f'{name} has a turn from {turn["from"]!r}; known are {", ".join(ROLES)}')
            turn = {"role": role, "content": turn["value"]}
        if not isinstance(turn.get("role"), str) or not is_content(turn.get("content", "")):
            raise problem
        turn = turn | ({"content": joined(turn["content"])} if "content" in turn else {})
        if "content" not in turn and "tool_calls" not in turn:
            raise problem
        turns.append(turn)
    return turns


def _shared(one: T, other: T) -> T:
    """What both begin with."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


def _shared_text(chosen: str, rejected: str) -> str:
    """The text that two answers of one prompt begin with: up to the answer's mark, or to a word's end."""
    shared = _shared(chosen, rejected)
    mark = shared.rfind(ANSWER_MARK)
    if mark >= 0:
        return shared[: mark + len(ANSWER_MARK)]
    whole = all(len(text) == len(shared) or text[len(shared)].isspace() for text in (chosen, rejected))
    if not whole:  # the answers begin alike in the middle of a word
        shared = shared[: max(map(shared.rfind, " \n\t")) + 1]
    if not shared.strip() or len(shared) == len(chosen):
        raise ValueError(f"{PAIR} do not begin with one prompt; give a column `prompt`")
    return shared.rstrip(" ")


def _completion(value: Any) -> str:
    """A text, or the one assistant's turn that holds it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise ValueError('"completion" is not a text')
    return value
