"""Stored tensors that are read before they are asked for, on a thread, and held for as long as they are used."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self

from .checkpoint import Checkpoint

Source = tuple[Checkpoint, str]  # a tensor of a checkpoint, by the name that it is stored under


class Ahead:
    """What one piece of work holds of some checkpoints, which then read it from memory, whoever asks.

    Each thread that reads ends when it has read what it was started for.
    """

    def __init__(self) -> None:
        self._held: dict[Source, Future[None]] = {}

    def begin(self, sources: Iterable[Source]) -> None:
        """Start to read what is not held yet, in this order."""
        pool = ThreadPoolExecutor(1)
        for source in sources:
            if source not in self._held:
                checkpoint, name = source
                self._held[source] = pool.submit(checkpoint.hold, name)
        pool.shutdown(wait=False)

    def hold(self, sources: Iterable[Source]) -> None:
        """Return when all of it is held. Raises what reading it raised, on whichever thread."""
        wanted = list(sources)
        self.begin(wanted)
        for source in wanted:
            self._held[source].result()

    def let_go(self, sources: Iterable[Source]) -> None:
        """Hold this no longer; what has not been read is not read."""
        going = {source: future for source in sources if (future := self._held.pop(source, None)) is not None}
        wait([future for future in going.values() if not future.cancel()])
        for (checkpoint, name), future in going.items():
            if not future.cancelled() and future.exception() is None:
                checkpoint.let_go(name)

    def close(self) -> None:
        """Hold nothing any longer."""
        self.let_go(list(self._held))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
