"""What a reward sees of a text: the whole conversation, the answer, and the other columns of the prompt's row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import DeraError
from . import images
from .forms import Turns


class Exchange(tuple[str, str]):
    """A prompt and a completion of it; as a tuple, both as texts.

    Attributes:
        asked: the prompt: raw text, or the turns of a conversation.
        completion: what was answered.
        columns: the other columns of the prompt's row, by name.
        ids: the tokens of the completion, where they are known.
        rival: the aligned model's own answer, where there is one to compare with.
    """

    asked: str | Turns
    columns: Mapping[str, Any]
    ids: Sequence[int] | None
    rival: str | None

    def __new__(
        cls, asked: str | Turns, completion: str, columns: Mapping[str, Any] | None = None,
        ids: Sequence[int] | None = None, rival: str | None = None,
    ) -> Exchange:  # fmt: skip
        self = super().__new__(cls, (in_words(asked), completion))
        self.asked, self.columns, self.ids, self.rival = asked, columns or {}, ids, rival
        return self

    @property
    def prompt(self) -> str:
        """All of what was asked, as text."""
        return self[0]

    @property
    def completion(self) -> str:
        """What was answered."""
        return self[1]

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return not isinstance(self.asked, str)

    @property
    def turns(self) -> Turns:
        """The conversation, the answer included; a raw text is a user's turn."""
        asked = [{"role": "user", "content": self.asked}] if isinstance(self.asked, str) else self.asked
        return [*asked, {"role": "assistant", "content": self.completion}]

    @property
    def whole(self) -> str:
        """Prompt and completion as one text."""
        return in_words(self.turns) if len(self.turns) > 2 else f"{self.prompt}\n{self.completion}"


Scorer = Callable[[Sequence[Exchange]], Sequence[Any]]
"""Gives each text its reward, a number, or None where it has none."""
Check = Callable[[Sequence[Exchange]], None]
"""Looks at a reward before any work is done for it, given a stand-in answer to each prompt; raises DeraError."""


class RewardDown(DeraError):
    """A reward cannot be had of any text now, so that no text is at fault; another time it may."""


def in_words(asked: str | Turns) -> str:
    """A prompt as one text: a user's only turn as it is, of several turns each with who speaks."""
    if isinstance(asked, str):
        return asked
    if len(asked) == 1:
        return images.in_words(asked[0].get("content", ""))
    return "\n\n".join(f"{turn['role']}: {images.in_words(turn.get('content', ''))}" for turn in asked)
