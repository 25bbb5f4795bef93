"""Memory that is used again and again."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import Any

import torch


class Buffers:
    """Memory that one worker uses again and again: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}  # a view costs some microseconds

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor; the next `take` for the same `use` overwrites it."""
        view = self._views.get((use, shape, dtype))
        if view is None:
            size = math.prod(shape) * dtype.itemsize
            if use not in self._memory or self._memory[use].numel() < size:
                self._memory[use] = torch.empty(size, dtype=torch.uint8)
                self._views = {key: kept for key, kept in self._views.items() if key[0] != use}
            view = self._views[use, shape, dtype] = self._memory[use][:size].view(dtype).view(shape)
        return view


def as_bytes(tensor: torch.Tensor) -> Any:
    """The bytes of a contiguous CPU tensor as a numpy array that shares its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def give_back() -> None:
    """Return freed memory to the system. glibc keeps much of it, for each thread that ever had some by itself."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of another C library
        ctypes.CDLL(None).malloc_trim(0)
