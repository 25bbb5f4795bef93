"""Room to work in: a directory for one run at a time, and space on its disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DeraError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run out there
    fcntl = None

LOCK = ".dera_merge.lock.partial"  # one of the names that are passed over where a directory is looked at
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def alone(folder: Path | None, shared: bool = False) -> Iterator[None]:
    """Keep other runs out of a directory; it is made, and removed again if it is empty in the end.

    The lock dies with its process, however that ends.

    Args:
        folder: where the work is; None locks nothing.
        shared: others that say so may work there too.

    Raises:
        DeraError: another run is at work there, or the directory cannot be written to.
    """
    if folder is None:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, shared) if fcntl else None
    except OSError as error:
        raise DeraError(f"{folder} cannot be written to: {error.strerror or error}; give another --output") from error
    try:
        yield
    finally:
        if lock is not None:
            _release(folder / LOCK, lock)
        remove_empty(made)


def _locked(folder: Path, shared: bool) -> int:
    """The descriptor of the locked file."""
    file = folder / LOCK
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            whose = os.read(lock, 20).decode("ascii", "replace").strip()
            os.close(lock)
            who = f"process {whose}" if whose.isdigit() else "a process"
            raise DeraError(f"another run ({who}) works in {folder}; wait for it, or give another --output") from None
        except OSError:  # a file system without locks
            return lock
        # Its last owner may have removed the file between our opening and locking it.
        if file.exists() and os.path.samestat(os.fstat(lock), file.stat()):
            os.truncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return lock
        os.close(lock)


def _release(file: Path, lock: int) -> None:
    """Remove the file if nobody else holds it, and give the lock up."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), file.stat()):
            file.unlink()
    except OSError:  # others have it, or it is gone
        pass
    finally:
        os.close(lock)


def remove_empty(folders: list[Path]) -> None:
    """Remove those of these directories, the innermost first, that are empty."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def check_space(root: Path, needed: int) -> None:
    """Raises DeraError where fewer than `needed` bytes are free."""
    place = root.resolve()
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < needed:
        unit, name = (1e9, "GB") if needed >= 1e9 else (1e6, "MB")
        raise DeraError(f"{root} needs {needed / unit:.2f} {name}, but {free / unit:.2f} {name} are free there; make "
                        "room, or write to another place")  # fmt: skip


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit of file size is what stopped the writing."""
    return error.errno in _FULL
