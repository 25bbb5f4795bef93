"""Rewards that are Python functions: where they are found, and which arguments they get.

One of a text at a time is told by its parameters' names: `prompt`, `completion` (or `text`, `response`), and any column
of the prompts. Without such names a single parameter is the completion, and two are prompt and completion. One with
`completions` or `prompts` is TRL's kind: it gets lists of all texts, and of each column, and gives a list of rewards.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import DeraError
from .exchanges import Exchange

COMPLETION = ("completion", "text", "response")
TOGETHER = ("completions", "prompts", "completion_ids")  # parameters of TRL's kind
FORMS = "known are (text), (prompt, text), (prompt, completion, a column, …), TRL's (completions, prompts, **columns)"


def function(spec: str) -> Callable[..., Any]:
    """A function from `module:function` or `file.py:function`; modules of the working directory count.

    Raises:
        DeraError: there is none, or loading it fails.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise DeraError(f"{spec!r} is no function; give module:function or file.py:function")
    file = Path(place).expanduser() if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise DeraError(f"the reward {spec} cannot be loaded: there is no file {place}")
    folder = "" if file is None else str(file.resolve().parent)
    sys.path.insert(0, folder)  # as python -m does, or python file.py
    try:
        with redirect_stdout(sys.stderr):
            loaded = attrgetter(name)(importlib.import_module(place) if file is None else _module(file))
    except (Exception, SystemExit) as error:  # a stranger's module may do anything
        raise DeraError(f"the reward {spec} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)  # for what it imports when it is called
    if not callable(loaded):
        raise DeraError(f"{spec} is no function")
    return loaded


def _module(file: Path) -> ModuleType:
    """The module in a file."""
    name = f"dera_merge_reward_{file.stem}"  # which no other module has
    found = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class Called:
    """A scorer of a function.

    Args:
        name: for messages.
        reward: the function.
    """

    def __init__(self, name: str, reward: Callable[..., Any]) -> None:
        self.name, self.reward = name, reward
        try:
            self.parameters = list(inspect.signature(reward).parameters.values())
        except (TypeError, ValueError):  # some that are written in C do not say
            self.parameters = [inspect.Parameter("text", inspect.Parameter.POSITIONAL_ONLY)]
        self.together = any(p.name in TOGETHER for p in self.parameters)
        self.columns: list[str] = []  # of all prompts, where they are known: a batch's rows may lack some

    def check(self, texts: Sequence[Exchange]) -> None:
        """Raise DeraError where the function wants what the prompts do not have."""
        self.columns = self._columns(texts)
        self._of_all(texts) if self.together else self._of_each(self.columns)

    def __call__(self, texts: Sequence[Exchange]) -> list[Any]:
        """What the function says of each text."""
        if self.together:
            return _awaited(self.reward(**self._of_all(texts)))
        positions, names = self._of_each(self._columns(texts))

        def value(source: str, text: Exchange) -> Any:
            return {"prompt": text.prompt, "completion": text.completion}.get(source, text.columns.get(source))

        return [
            _awaited(self.reward(*(value(s, text) for s in positions), **{n: value(s, text) for n, s in names.items()}))
            for text in texts
        ]

    def _of_all(self, texts: Sequence[Exchange]) -> dict[str, list[Any]]:
        """The arguments of a function of TRL's kind, for these texts."""
        has = {name: [text.columns.get(name) for text in texts] for name in self._columns(texts)}
        has["prompts"] = [text.asked for text in texts]
        has["completions"] = [text.turns[-1:] if text.is_chat else text.completion for text in texts]
        if all(text.ids is not None for text in texts):
            has["completion_ids"] = [list(text.ids) for text in texts]
        named = {p.name for p in self.parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        lacking = {p.name for p in self.parameters if p.name in named and p.default is p.empty} - {*has, *TOGETHER}
        if lacking:
            raise self._refused(sorted(lacking), self._columns(texts))
        takes_all = any(p.kind is p.VAR_KEYWORD for p in self.parameters)
        return {name: values for name, values in has.items() if takes_all or name in named}

    def _of_each(self, columns: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """What each argument by position, and by name, is: `prompt`, `completion` or a column."""
        by_position = [p for p in self.parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p.name for p in by_position if p.default is p.empty]
        positions = self._positions(needed, columns)
        known = {"prompt": "prompt", **dict.fromkeys(COMPLETION, "completion")}
        names: dict[str, str] = {}
        for p in self.parameters:
            if p.kind is p.VAR_KEYWORD:
                more = [name for name in columns if name not in {q.name for q in self.parameters} | known.keys()]
                names |= dict(zip(more, more, strict=True))
            elif p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in needed):
                source = known.get(p.name) or (p.name if p.name in columns else None)
                if source is None and p.default is p.empty:
                    raise self._refused([p.name], columns)
                if source is not None and source not in positions:
                    names[p.name] = source
        if "completion" not in (*positions, *names.values()):
            positions = ["completion"]
        return positions, names

    def _positions(self, needed: list[str], columns: Sequence[str]) -> list[str]:
        """What the parameters that are needed by position are."""
        if not set(needed) & set(COMPLETION) and len(needed) <= 2:
            if len(needed) == 2 and (taken := [name for name in needed if name in columns]):
                raise DeraError(
                    f"the reward {self.name} takes {needed[0]} and {needed[1]}, and the prompts have a column "
                    f"{taken[0]}; call what is to be the completion `completion`"
                )
            return ["prompt", "completion"][-len(needed) :] if needed else []
        sources = ["completion" if n in COMPLETION else n if n in ("prompt", *columns) else "" for n in needed]
        unknown = [place for place, source in enumerate(sources) if not source]
        if "completion" in sources:  # (question, response), say
            fills = ["prompt"] if unknown == [0] and sources[1] == "completion" and "prompt" not in sources else []
        else:
            free = [source for source in ("prompt", "completion") if source not in sources]
            fills = free[-len(unknown) :] if unknown else []
        if len(unknown) != len(fills) or "completion" not in (*sources, *fills):
            raise self._refused([needed[place] for place in unknown] or ["the completion"], columns)
        for place, source in zip(unknown, fills, strict=True):
            sources[place] = source
        return sources

    def _columns(self, texts: Sequence[Exchange]) -> list[str]:
        """The columns that any of the prompts has."""
        return list(dict.fromkeys([*self.columns, *(name for text in texts for name in text.columns)]))

    def _refused(self, lacking: Sequence[str], columns: Sequence[str]) -> DeraError:
        has = f"the prompts have {', '.join(columns)}" if columns else "the prompts have no other columns"
        return DeraError(f"the reward {self.name} wants {', '.join(lacking)}, but {has}; {FORMS}")


def _awaited(value: Any) -> Any:
    return asyncio.run(value) if inspect.iscoroutine(value) else value
