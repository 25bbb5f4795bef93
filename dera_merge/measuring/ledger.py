"""Long measurements in steps: finished steps are kept on disk and not done again."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..files.atomic import json_bytes, load_json, write_atomically

FOLDER = ".unfinished"
NOTE = "settings.json"


class Ledger:
    """Results of finished steps, each a dict of arrays, kept in `<folder>/.unfinished`; not kept without a folder.

    Args:
        folder: the report's, or None.
        settings: what two runs must have in common for one to go on with the other's steps.
        resume: keep what an earlier run of the same settings left; else begin afresh.
        writes: whether this process writes (the first of several).
    """

    def __init__(
        self, folder: Path | None, settings: dict[str, Any], resume: bool = False, writes: bool = True
    ) -> None:
        self._folder = None if folder is None else folder / FOLDER
        self._writes = writes
        self._mark = {"settings": hashlib.sha256(json_bytes(settings)).hexdigest()}
        self._made = [] if self._folder is None else [p for p in (folder, *folder.parents) if not p.exists()]
        if self._folder is None or not writes:
            return
        note = self._folder / NOTE
        if not (resume and note.is_file() and load_json(note) == self._mark):
            shutil.rmtree(self._folder, ignore_errors=True)

    def step(self, key: str, work: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays of a step: read back if it is finished, else worked out and kept."""
        if self.has(key):
            with np.load(self._folder / f"{key}.npz", allow_pickle=False) as stored:
                return dict(stored)
        arrays = work()
        if self._folder is not None and self._writes:
            if not (self._folder / NOTE).is_file():
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._folder / NOTE, json_bytes(self._mark))
            file = self._folder / f"{key}.npz"
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, **arrays)
            partial.replace(file)
        return arrays

    def has(self, key: str) -> bool:
        """Whether a step is finished."""
        return self._folder is not None and (self._folder / f"{key}.npz").is_file()

    def close(self) -> None:
        """Remove the steps, and the folders made for them if empty: everything is done, or cannot be done."""
        if self._folder is not None and self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)
            for folder in self._made:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
