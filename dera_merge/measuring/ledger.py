"""Long work in steps: finished steps are kept on disk and not done again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import DeraError
from ..files.atomic import json_bytes, load_json, write_atomically
from ..files.room import alone, remove_empty

FOLDER = ".unfinished"
NOTE = "settings.json"


class Ledger:
    """Results of finished steps, each a dict of arrays, kept in a directory; not kept without one.

    As a context it keeps other runs out of that directory. An interruption, or a disk or a server that fails, leaves
    the finished steps there; other errors leave nothing of a run that began afresh.

    Args:
        folder: of the steps alone, or None.
        settings: what two runs must have in common for one to go on with the other's steps.
        resume: go on with what an earlier run of the same settings left there.
        overwrite: throw away what an earlier run left there.
        writes: whether this process writes (the first of several).
    """

    def __init__(
        self, folder: Path | None, settings: dict[str, Any], *, resume: bool = False, overwrite: bool = False,
        writes: bool = True,
    ) -> None:  # fmt: skip
        self._folder = folder if writes else None
        self._resume, self._overwrite = resume, overwrite
        self._mark = {"settings": hashlib.sha256(json_bytes(settings)).hexdigest()}
        self._made = [] if folder is None else [place for place in folder.parents if not place.exists()]
        self._lock = ExitStack()

    def __enter__(self) -> Ledger:
        """Raises DeraError where another run is at work, or where it is not said what is to become of its steps."""
        self._lock.enter_context(alone(self._folder))
        try:
            self._look()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Bad input leaves nothing; a disk, a server that is gone, or an earlier run's steps are another matter.
        if isinstance(error, DeraError) and not self._resume and not isinstance(error.__cause__, OSError):
            self._clear_all()
        self._lock.close()

    def _look(self) -> None:
        """See what an earlier run has left."""
        if self._folder is None or not (self._folder / NOTE).is_file():
            return
        if self._overwrite:
            self._clear()
            return
        same = load_json(self._folder / NOTE) == self._mark
        if not self._resume:
            whose = "of an earlier call; --resume goes on with them," if same else "of a call with other settings;"
            raise DeraError(f"{self._folder} holds finished steps {whose} --overwrite throws them away, or give "
                            "another --output")  # fmt: skip
        if not same:
            raise DeraError(f"{self._folder} was begun by another call or from other inputs; --overwrite starts afresh")

    def step(self, key: str, work: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a step: read back if it is finished, else worked out and kept."""
        if self.has(key):
            return self.recall(key)
        arrays = work()
        self.keep(key, arrays)
        return arrays

    def has(self, key: str) -> bool:
        """Whether a step is finished."""
        return self._folder is not None and (self._folder / f"{key}.npz").is_file()

    def recall(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of a finished step."""
        with np.load(self._folder / f"{key}.npz", allow_pickle=False) as stored:
            return dict(stored)

    def keep(self, key: str, arrays: dict[str, np.ndarray]) -> None:
        """Keep these arrays as what the step came to so far."""
        if self._folder is None:
            return
        if not (self._folder / NOTE).is_file():
            write_atomically(self._folder / NOTE, json_bytes(self._mark))
        partial = self._folder / f"{key}.partial.npz"
        try:
            np.savez(partial, **arrays)
            partial.replace(self._folder / f"{key}.npz")
        finally:
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the steps, and the folders made for them if empty: their result is safe."""
        self._clear_all()
        if self._folder is not None:
            remove_empty([self._folder, *self._made])

    def _clear_all(self) -> None:
        if self._folder is not None and self._folder.is_dir():
            self._clear()

    def _clear(self) -> None:
        """The note last, as without it the rest says nothing."""
        for file in sorted(self._folder.iterdir(), key=lambda file: file.name == NOTE):
            if file.suffix == ".npz" or file.name == NOTE:
                file.unlink()
