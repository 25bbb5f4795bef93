"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
Count = Callable[[int, int], None]  # done, in all: bytes, tensors or modules, where there is one kind of work


def unheard(what: str, done: int, total: int) -> None:
    """A `Progress` that tells nobody."""
