"""Exact and merged answers to one prompt, token by token, side by side, under the same noise.

Texts are at temperature 1 without any warper, as `compare` and `sweep` sample them: stream 0 of a seed. So the two
answers are the same up to the first token at which the two distributions part.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..errors import DeraError
from ..lambdas import Lam, numbers
from ..models.pair import Pair
from ..texts.prompts import encode
from ..texts.sampling import sample
from .both import Both

Side = Literal["exact", "merged"]
SIDES: tuple[Side, Side] = ("exact", "merged")
# What one session may ask for: reading a prompt takes all models a pass over it, and nobody else is served meanwhile.
MOST_CHARACTERS = 20_000
MOST_PROMPT_TOKENS = 2048
MOST_NEW_TOKENS = 256
LARGEST_LAMBDA = 100.0
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Asked:
    """What a session asks.

    Attributes:
        prompt: a user's turn, or raw text.
        lam: λ.
        seed: of the noise.
        max_new_tokens: length limit of an answer, in tokens.
        chat: whether the prompt goes through the chat template.
    """

    prompt: str
    lam: Lam
    seed: int = 0
    max_new_tokens: int = 64
    chat: bool = True

    def ids(self, pair: Pair) -> list[int]:
        """The prompt's tokens.

        Raises:
            DeraError: the prompt is empty, or too long with its answer; another setting is out of bounds.
        """
        if not self.prompt.strip():
            raise DeraError("the prompt is empty; write something")
        if len(self.prompt) > MOST_CHARACTERS:
            raise DeraError(f"the prompt has {len(self.prompt)} characters; shorten it to {MOST_CHARACTERS}")
        if not all(abs(number) <= LARGEST_LAMBDA for number in numbers(self.lam)):  # NaN is not
            raise DeraError(f"λ = {self.lam:g} is out of bounds; take one within ±{LARGEST_LAMBDA:g}")
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise DeraError(f"{self.max_new_tokens} new tokens are out of bounds; take 1 to {MOST_NEW_TOKENS}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise DeraError(f"the seed {self.seed} is out of bounds; take a whole number from 0 to {LARGEST_SEED}")
        entry = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else self.prompt
        ids = encode([entry], pair.tokenizer)[0].ids
        most = min(pair.context_length or MOST_PROMPT_TOKENS, MOST_PROMPT_TOKENS + self.max_new_tokens)
        if (room := most - self.max_new_tokens) < len(ids):
            raise DeraError(
                f"the prompt has {len(ids)} tokens, and with {self.max_new_tokens} new ones there is room for {room}; "
                "shorten it"
            )
        return ids


class Written(BaseStreamer):
    """A streamer that hands on the new tokens of one sequence, each as it comes."""

    def __init__(self, hand_on: Any) -> None:
        self._hand_on, self._prompt = hand_on, True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:
            self._prompt = False
        else:
            for token in value.flatten().tolist():
                self._hand_on(token)

    def end(self) -> None:
        """Nothing is held back."""


def until(stop: threading.Event) -> StoppingCriteriaList:
    """Ends a text after the token during which `stop` is set."""
    return StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), stop.is_set(), device=ids.device)])


def answers(
    both: Both, asked: Asked, ids: list[int], stop: threading.Event | None = None
) -> Iterator[dict[Side, list[int]]]:
    """Both answers so far, whenever a token has come; each ends with its end token, if it came to one.

    Args:
        both: the models.
        asked: λ, seed and length.
        ids: the prompt's, from `asked.ids`.
        stop: set it to end both texts after the token that is being made. It is set when the iterator is closed.

    Raises:
        DeraError: the pair has no weight-space form.
    """
    stop = stop or threading.Event()
    came: queue.SimpleQueue[tuple[Side, int | Exception | None]] = queue.SimpleQueue()

    def write(side: Side) -> None:
        options: dict[str, Any] = {
            "max_new_tokens": asked.max_new_tokens, "seed": asked.seed, "vocab_size": both.pair.vocab_size,
            "streamer": Written(lambda token: came.put((side, token))), "stopping_criteria": until(stop),
        }  # fmt: skip
        try:
            if side == "exact":
                sample(both.exact, both.pair.tokenizer, [ids], lam=asked.lam, **options)
            else:
                with both.merged(asked.lam) as (model, at):
                    sample(model, both.pair.tokenizer, [ids], **at, **options)
        except Exception as error:  # it belongs to whoever iterates
            came.put((side, error))
        else:
            came.put((side, None))

    threads = [threading.Thread(target=write, args=(side,), daemon=True) for side in SIDES]
    for thread in threads:
        thread.start()
    so_far: dict[Side, list[int]] = {side: [] for side in SIDES}
    try:
        writing = len(SIDES)
        while writing:
            side, what = came.get()
            if isinstance(what, Exception):
                raise what
            if what is None:
                writing -= 1
            else:
                so_far[side].append(what)
                yield {side: list(tokens) for side, tokens in so_far.items()}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
