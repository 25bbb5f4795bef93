"""A conversation at a λ that may be turned between two replies.

Exact DeRa's cache holds what each model made of the conversation, which λ has no part in: it is kept when λ turns. The
merged model's keys and values are those of one λ; it reads the conversation again at another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TextStreamer, set_seed
from transformers.cache_utils import Cache

from ..decoding import caches
from ..errors import DeraError
from ..lambdas import Lam
from ..texts.generate import configure
from ..texts.prompts import encode
from .answers import until
from .both import Both

Mode = Literal["exact", "merged"]


@dataclass(frozen=True)
class _Kept:
    """A cache, the tokens that are in it, and whose it is."""

    of: tuple[Any, ...]
    cache: Cache
    ids: list[int]


class _Heard(TextStreamer):
    """Hands on the text as it comes, a word at a time."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._hear(text)


class Conversation:
    """Turns of a user and replies, each by exact DeRa or the merged model at the λ of the moment.

    Args:
        both: the models.
        lam: λ to begin with.
        mode: which form replies.
        system: the system's turn, if any.
        max_new_tokens: length limit of a reply, in tokens.
        temperature: 0, and None, is greedy; no warper applies beside it.
        seed: of sampling.

    Attributes:
        lam, mode: may be set between two replies.
        turns: what was said, each with `role` and `content`; a reply also with its `lambda` and `mode`.
        templated: whether there is a chat template. Without one, turns are lines of a text that is gone on with.
    """

    def __init__(
        self, both: Both, lam: Lam, *, mode: Mode = "exact", system: str | None = None, max_new_tokens: int = 256,
        temperature: float | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.both, self.lam, self.mode = both, lam, mode
        self.turns: list[dict[str, Any]] = []
        self.templated = bool(both.pair.tokenizer.chat_template)
        self._system: str | None = None
        self._most, self._temperature = max_new_tokens, temperature
        self._kept: _Kept | None = None
        if system:
            self.system = system
        set_seed(seed)

    @property
    def system(self) -> str | None:
        """The system's turn. Setting it raises DeraError where the chat template takes none."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text and not self.templated:
            raise DeraError("without a chat template there is no system's turn")
        before, self._system = self._system, text or None
        try:
            self._ids([{"role": "user", "content": "?"}])
        except DeraError:
            self._system = before
            raise

    def say(self, text: str, hear: Callable[[str], None], stop: threading.Event | None = None) -> str:
        """Say something, and get the reply.

        Args:
            text: the user's turn.
            hear: called with each piece of the reply as it comes.
            stop: set it to end the reply after the token that is being made; what there is of it stays.

        Raises:
            DeraError: the conversation has no room left, or the template refuses the turn, which is then not said.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            return self._reply(hear, stop or threading.Event())
        except BaseException:
            self.turns.pop()
            raise

    def again(self, hear: Callable[[str], None], stop: threading.Event | None = None) -> str:
        """Have the last reply anew, at the λ and in the mode of now. Raises DeraError where there is none."""
        if not self.turns:
            raise DeraError("nothing has been said yet")
        old = self.turns.pop()
        try:
            return self._reply(hear, stop or threading.Event())
        except BaseException:
            self.turns.append(old)
            raise

    def clear(self) -> None:
        """Begin anew, with the same system's turn."""
        self.turns.clear()

    def saved(self) -> dict[str, Any]:
        """The conversation as JSON has it; `messages` is a prompt as `--prompts` reads them."""
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in self._with_system(self.turns)]
        replies = [
            {"lambda": turn["lambda"], "mode": turn["mode"]} for turn in self.turns if turn["role"] == "assistant"
        ]
        return {"messages": messages, "replies": replies}

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self._system}, *turns] if self._system else turns

    def _ids(self, turns: list[dict[str, Any]]) -> list[int]:
        """The conversation's tokens, up to where the reply begins."""
        if not self.templated:
            words = [("\n" if n and turn["role"] == "user" else "") + turn["content"] for n, turn in enumerate(turns)]
            return encode(["".join(words)], self.both.pair.tokenizer)[0].ids
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in self._with_system(turns)]
        return encode([{"messages": messages}], self.both.pair.tokenizer)[0].ids

    @contextmanager
    def _model(self) -> Iterator[tuple[Any, dict[str, Any], tuple[Any, ...]]]:
        """Who replies, what a call of it brings along, and what its cache belongs to."""
        if self.mode == "exact":
            yield self.both.exact, {"lam": self.lam}, ("exact",)
        else:
            with self.both.merged(self.lam) as (model, at):
                yield model, at, ("merged", self.lam)

    def _reply(self, hear: Callable[[str], None], stop: threading.Event) -> str:
        pair, ids = self.both.pair, self._ids(self.turns)
        room = min(self._most, (pair.context_length or len(ids) + self._most) - len(ids))
        if room < 1:
            raise DeraError(f"the conversation has {len(ids)} tokens, all that the models take; begin a new one")
        with self._model() as (model, at, of):
            configure(model, self._temperature)
            cache = self._taken(of, ids)
            given = torch.tensor([ids], device=self.both.device)
            output = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=room, return_dict_in_generate=True,
                pad_token_id=pair.tokenizer.pad_token_id, streamer=_Heard(pair.tokenizer, hear),
                stopping_criteria=until(stop), **({caches.CACHE: cache} if cache is not None else {}), **at,
            )  # fmt: skip
        new = output.sequences[0, len(ids) :].tolist()
        self._keep(of, output.get(caches.CACHE), ids + new)
        text = pair.tokenizer.decode(new, skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": text, "lambda": self.lam, "mode": self.mode})
        return text

    def _keep(self, of: tuple[Any, ...], cache: Any, ids: list[int]) -> None:
        """Keep a cache for the next reply; one that can be taken back to where conversations part."""
        if isinstance(cache, Cache) and getattr(cache, "is_croppable", False):
            self._kept = _Kept(of, cache, ids[: cache.get_seq_length()])

    def _taken(self, of: tuple[Any, ...], ids: list[int]) -> Cache | None:
        """The cache that was kept, cut to what these tokens begin with; None where there is nothing to go on from."""
        kept, self._kept = self._kept, None  # a reply that breaks off leaves a cache that nobody knows
        if kept is None or kept.of != of:
            return None
        pairs = enumerate(zip(kept.ids, ids, strict=False))
        same = next((place for place, (one, other) in pairs if one != other), min(len(kept.ids), len(ids)))
        same = min(same, len(ids) - 1)  # a pass has to read something
        if not same:
            return None
        try:
            if same < len(kept.ids):
                kept.cache.crop(same - len(kept.ids))
        except RuntimeError:  # of a sliding window that is full
            return None
        return kept.cache
