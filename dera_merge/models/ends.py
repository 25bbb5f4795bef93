"""What ends a text: the tokens that config, generation config and tokenizer of each side call an end.

At an end of λ a model ends as that side's own files say. Between and beyond it writes what either side would, so that
it ends where either does: with the union of what all of their files call an end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import DeraError, warn
from ..files.atomic import load_json
from ..lambdas import Lam, numbers
from .side import Side
from .source import GENERATION
from .tokenizer import tokenizer_folder

_OF_GENERATION = re.compile(
    r".*token_ids?|transformers_version|_from_model_config|do_sample|temperature|top_[kph]|min_p|typical_p|.*_penalty"
    r"|max_.*|min_.*|num_.*|use_cache|.*_beams?|.*cache.*|chat_format|trust_remote_code"
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Ending:
    """How a model at one λ ends.

    Attributes:
        generation: generation_config.json's content; empty where no file says anything.
        ids: what config.json says of special tokens, in the place of REF's.
    """

    generation: dict[str, Any]
    ids: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What one side's files call an end: of the side itself, and of the base that its adapter stands on."""

    side: Side

    @cached_property
    def generation(self) -> dict[str, Any] | None:
        """Its own generation_config.json."""
        return generation_settings(self.side.source.folder)

    @cached_property
    def inherited(self) -> dict[str, Any] | None:
        """Its own generation config, or its base's."""
        return self.generation if self.generation is not None else generation_settings(self.side.base.folder)

    @cached_property
    def tokenizer(self) -> list[int]:
        """The end token of its tokenizer, or its base's."""
        folder = tokenizer_folder([self.side])
        return [] if folder is None else end_of_tokenizer(folder, self.side.vocabulary_rows)

    @property
    def is_silent(self) -> bool:
        """Whether it is stacked on REF's adapter and brings no such file, so that it ends as REF does."""
        return bool(self.side.below) and self.generation is None and not self.side.source.has_tokenizer()

    @cached_property
    def all(self) -> list[int]:
        """What any of its files calls an end; its own first."""
        told = [self.generation or {}, self.inherited or {}, _special(self.side.config)]
        return _distinct([*(token for entry in told for token in ids_of(entry.get("eos_token_id"))), *self.tokenizer])

    @cached_property
    def of_base(self) -> list[int]:
        """What its base alone ends with: by its generation config, or by its config."""
        base = ids_of((generation_settings(self.side.base.folder) or {}).get("eos_token_id"))
        return base or ids_of(_special(self.side.config)["eos_token_id"])

    @cached_property
    def own(self) -> list[int]:
        """What ends this model alone, as transformers would have it.

        A generation config of its own says it. Without one, config and tokenizer do, and an adapter's own tokenizer
        adds to what its base ends with.
        """
        if verbatim := ids_of((self.generation or {}).get("eos_token_id")):
            return verbatim
        brings = self.side.adapter is None or self.side.source.has_tokenizer() or self.inherited is None
        return _distinct([*self.of_base, *(self.tokenizer if brings else ())])

    def ending(self) -> Ending:
        """How this side ends by itself."""
        settings = dict(self.inherited or {})
        ids = _special(self.side.config)
        if self.inherited is None:
            settings = {key: value for key, value in ids.items() if value is not None}
        if ids_of(settings.get("eos_token_id")) != self.own:
            settings["eos_token_id"] = ids["eos_token_id"] = _spelled(self.own)
        return Ending(settings, ids)


def ending(told: Sequence[Told], lam: Lam | None, say: bool = False) -> Ending:
    """How θ(λ) ends.

    Args:
        told: what each side's files say, the reference first.
        lam: λ; None for a model of which λ is turned.
        say: warn where the sides end differently.

    Raises:
        DeraError: a generation config is none.
    """
    number = None if lam is None else _end_of(lam)
    if number is not None:
        if told[number].is_silent:
            number = 0
        if say and (more := [token for token in told[number].all if token not in told[number].own]):
            warn(f"{told[number].side.source.name} ends with {_listed(told[number].own)} by its generation config, but "
                 f"other files of it call {_listed(more)} an end; at λ={lam:g} that stays as it is")  # fmt: skip
        return told[number].ending()
    ref, aligned = told[0], told[1:]
    union = _distinct([token for side in (*aligned, ref) for token in side.all])
    chosen = next((side.generation for side in (*aligned[:1], ref) if side.generation is not None), ref.inherited)
    ids = _special(ref.side.config)
    settings = dict(chosen) if chosen is not None else {key: value for key, value in ids.items() if value is not None}
    named, differ = {*ids_of(settings.get("eos_token_id"))}, any({*side.all} != {*union} for side in told)
    if {*union} != named or differ:
        settings["eos_token_id"] = ids["eos_token_id"] = _spelled(union)
        if say and (named or differ):  # a generation config without one says nothing against the others
            each = "; ".join(f"{side.side.source.name}: {_listed(side.all)}" for side in told)
            warn(f"the models' files name different end tokens ({each}); between and beyond the models the output ends "
                 f"with each of {_listed(union)}")  # fmt: skip
    return Ending(settings, ids)


def end_of_tokenizer(folder: Path, rows: int | None) -> list[int]:
    """The id of the token that a tokenizer's files call its end; none where they name none, or beyond the `rows`."""
    name = None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        entry = _object(folder / file).get("eos_token")
        name = name or (entry.get("content") if isinstance(entry, dict) else entry)
    if not isinstance(name, str):
        return []
    fast = _object(folder / "tokenizer.json")
    model = fast.get("model") if isinstance(fast.get("model"), dict) else {}
    known: list[tuple[Any, Any]] = [
        (token.get("content"), token.get("id")) for token in fast.get("added_tokens") or () if isinstance(token, dict)
    ]
    decoder = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        content = token.get("content") if isinstance(token, dict) else token
        known.append((content, int(number) if number.isdecimal() else None))
    for table in (_object(folder / "added_tokens.json"), model.get("vocab"), _object(folder / "vocab.json")):
        if isinstance(table, dict):
            known.append((name, table.get(name)))
        elif isinstance(table, list):  # Unigram's: [token, score]
            known += ((entry[0], number) for number, entry in enumerate(table) if isinstance(entry, list) and entry)
    found = [token for content, token in known if content == name and _is_id(token)]
    return [token for token in found[:1] if rows is None or token < rows]


def _end_of(lam: Lam) -> int | None:
    """The side that θ(λ) is; None where it is none alone."""
    values = numbers(lam)
    if not any(values):
        return 0
    ones = [number for number, value in enumerate(values, 1) if value == 1.0]
    return ones[0] if len(ones) == 1 and sum(value != 0 for value in values) == 1 else None


def generation_settings(folder: Path) -> dict[str, Any] | None:
    """generation_config.json of a folder, if any. Raises DeraError where it is something else."""
    if not (folder / GENERATION).is_file():
        return None
    settings = _object(folder / GENERATION)
    if settings and not any(_OF_GENERATION.fullmatch(key) for key in settings):
        raise DeraError(f"{folder / GENERATION} holds no settings of generation ({min(settings)!r}, …); remove it")
    return settings


def _object(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is no file. Raises DeraError where it is something else."""
    if not file.is_file():
        return {}
    content = load_json(file)
    if not isinstance(content, dict):
        raise DeraError(f"{file} holds {type(content).__name__}, expected a JSON object; mend or remove the file")
    return content


def _special(config: dict[str, Any]) -> dict[str, Any]:
    """The special tokens of a config.json, of its text model where that has a config of its own."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    return {key: config.get(key, inner.get(key)) for key in _IDS}


def ids_of(entry: Any) -> list[int]:
    """`eos_token_id` as a list: files have a number, a list, or null."""
    return [token for token in (entry if isinstance(entry, list) else [entry]) if _is_id(token)]


def _is_id(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and token >= 0


def _spelled(tokens: list[int]) -> Any:
    """The other way round."""
    return tokens if len(tokens) > 1 else tokens[0] if tokens else None


def _distinct(tokens: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(tokens))


def _listed(tokens: Iterable[int]) -> str:
    return ", ".join(map(str, tokens)) or "none"
