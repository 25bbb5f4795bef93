"""How a run ends early: what stops it as Ctrl-C does, and the command that goes on."""

from __future__ import annotations

import os
import shlex
import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

# A scheduler's notice, a terminal that closes; Windows has no SIGHUP.
_STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_stopped: list[int] = []  # signals that came
_TICK = 0.1  # seconds by which a file system's clock may be behind


@dataclass(frozen=True)
class Begun:
    """What a command began with: where it writes, whether it goes on with what was there, and when that was."""

    output: Path | None
    resumes: bool = False
    at: float = field(default_factory=time.time)

    @property
    def has_left(self) -> bool:
        """Whether there is something of it that another run could go on with."""
        if self.output is None:
            return False
        for place in (self.output, self.output.with_name(f"{self.output.name}.unfinished")):
            for file in (place, *place.rglob("*")):
                if file.is_file() and (self.resumes or file.stat().st_mtime >= self.at - _TICK):
                    return True
        return False


def listen() -> None:
    """From now on a signal to stop raises KeyboardInterrupt; one that is ignored (nohup) stays so.

    Of several processes the first alone listens: what waits for others, out of Python's reach, has to end at once.
    """
    if threading.current_thread() is threading.main_thread() and os.environ.get("RANK", "0") == "0":
        for number in _STOPS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, _stop)


def listen_no_more() -> None:
    """From now on a signal ends the process at once: all that is left is to exit."""
    for number in _STOPS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    _stopped.append(number)
    raise KeyboardInterrupt


def came() -> bool:
    """Whether a signal to stop came."""
    return bool(_stopped)


def check() -> None:
    """Raises KeyboardInterrupt where a signal came and its exception was lost, in a finaliser or a callback of C."""
    if came():
        raise KeyboardInterrupt


def how_to_go_on(words: list[str], resumable: Collection[str], again: Collection[str] = ()) -> str | None:
    """The command that goes on with what this one began, None where nothing does.

    Args:
        words: what was typed behind the program's name.
        resumable: commands that take --resume.
        again: commands that go on where they are typed again.
    """
    if words and words[0] in again:
        return shlex.join(["dera-merge", *words])
    if not words or words[0] not in resumable:
        return None
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return shlex.join(["dera-merge", *kept, "--resume"])
