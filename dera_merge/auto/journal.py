"""What the steps of a run were, in a file: a finished one whose settings have not changed is not done again."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DeraError
from ..files.atomic import json_bytes, load_json, write_atomically

FILE = "steps.json"
T = TypeVar("T")
log = logging.getLogger(__name__)


class Journal:
    """The steps of one directory.

    Args:
        folder: where `steps.json` lies, or will.

    Raises:
        DeraError: there is something in the directory that no run has written.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._before: dict[str, dict[str, Any]] = load_json(self._file) if self._file.is_file() else {}
        self.steps: dict[str, dict[str, Any]] = {}
        strange = folder.is_dir() and any(not path.name.endswith(".partial") for path in folder.iterdir())
        if not self._before and strange:
            raise DeraError(f"{folder} is not empty, and auto did not write it; give another --output")

    def step(self, name: str, settings: Any, work: Callable[[bool], T], load: Callable[[], T]) -> T:
        """The result of a step: loaded where it is finished, else worked out.

        Args:
            name: of the step.
            settings: everything that could change the result, as JSON.
            work: does it; called with whether an earlier run with these settings broke off, so that it can go on.
            load: reads the result back; a DeraError means that it is not there any more.
        """
        mark = hashlib.sha256(json_bytes(settings)).hexdigest()
        before = self._before.get(name, {})
        same = before.get("mark") == mark
        if same and before.get("seconds") is not None:
            try:
                result = load()
            except DeraError as error:
                log.info("%s: %s; it is done again", name, error)
                same = False
            else:
                self.steps[name] = before | {"reused": True}
                log.info("%s: done before, used again", name)
                return result
        elif before and not same:
            log.info("%s: the settings are others than before; it is done again", name)
        self.steps[name] = {"mark": mark, "seconds": None, "reused": False}
        self._save()
        begun = time.monotonic()
        try:
            result = work(same)
        except DeraError as error:
            if not isinstance(error.__cause__, OSError):  # which leaves what is finished, to go on with
                self._forget(name)
            raise
        self.steps[name]["seconds"] = time.monotonic() - begun
        self._save()
        return result

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file, json_bytes(self._before | self.steps))

    def _forget(self, name: str) -> None:
        """Bad input leaves nothing."""
        del self.steps[name]
        self._before.pop(name, None)
        if self._before or self.steps:
            self._save()
        else:
            self._file.unlink()
