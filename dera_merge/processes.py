"""Several processes at one task, where `accelerate launch` or `torchrun` started them."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")


def launched() -> tuple[int, int]:
    """This process's number and how many there are, where a launcher started several; else (0, 1)."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or int(size) < 2:
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=not _accelerators())
    return state.process_index, state.num_processes


def _accelerators() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def gathered(value: list[T]) -> list[T]:
    """The lists of all processes in the order of their numbers, the same for each; alone, the list."""
    if launched()[1] == 1:
        return value
    from accelerate.utils import gather_object

    return gather_object(value)
