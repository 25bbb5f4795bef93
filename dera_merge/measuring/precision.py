"""In what models run where figures depend on it: float32 where it fits, bfloat16 where only that does, TF32 never."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import DeraError
from ..models import spread
from ..models.pair import Pair
from ..texts.batches import free_memory

log = logging.getLogger(__name__)
ROOM = 1.25  # of the weights' size: what activations, heads and logits take beside them


def chosen(
    pair: Pair, dtype: torch.dtype | str, device: torch.device | str, limit: int | None = None
) -> torch.dtype:  # fmt: skip
    """The compute dtype: what was asked for; of `"auto"` float32 where it fits, else bfloat16.

    A line says when it is bfloat16, and why.

    Args:
        limit: bytes that may be taken; None: what is free.
    """
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    why = too_large(pair, device, 1 if pair.shared_base else 2, limit)
    if why is None:
        return torch.float32
    log.info(f"compute dtype bfloat16: {why}; --compute-dtype float32 insists")
    return torch.bfloat16


def too_large(
    pair: Pair, device: torch.device | str, models: int = 1, limit: int | None = None, dtype: torch.dtype | str = "auto"
) -> str | None:
    """Why so many models do not fit, with what they need beside their weights; None where they do.

    Args:
        limit: as for `chosen`.
        dtype: of their weights; `"auto"`: float32.
    """
    kind = torch.float32 if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    free = available(device) if limit is None else limit
    try:
        numbers = sum(info.numel for info in pair.tensors.values())
    except DeraError:  # it cannot be merged, which whoever merges will say; exact DeRa may run
        return None
    needed = int(ROOM * models * kind.itemsize * numbers)
    if free is None or needed <= free:
        return None
    there = f"{free / 1e9:.3g} GB are free on {device}" if limit is None else f"--max-memory is {limit / 1e9:.3g} GB"
    which, name = "one model" if models == 1 else f"{models} models", str(kind).removeprefix("torch.")
    return f"in {name} {which} would take {needed / 1e9:.3g} GB, {there}"


def in_bytes(size: int | str | None) -> int | None:
    """A size such as `"8GB"` in bytes. Raises DeraError where it is none."""
    if size is None or isinstance(size, int):
        return size
    from accelerate.utils import convert_file_size_to_int

    try:
        return convert_file_size_to_int(size)
    except ValueError as error:
        raise DeraError(f"{size!r} is no size such as 8GB") from error


def available(device: torch.device | str) -> int | None:
    """Bytes that are free on a CUDA device, or on this machine for the CPU (Linux); None where nothing says.

    Where models are spread, of all devices.
    """
    if torch.device(device).type != "cpu":
        free = [free_memory(place) for place in spread.devices(device)]
        return None if None in free else sum(free)
    try:
        with open("/proc/meminfo") as stream:
            return next((1024 * int(line.split()[1]) for line in stream if line.startswith("MemAvailable")), None)
    except OSError:
        return None


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products and convolutions of float32 in float32: TF32, with 10 bits, would decide small figures."""
    product, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(product)
        torch.backends.cudnn.allow_tf32 = convolution
