"""Texts of exact DeRa of models larger than the memory: every pass reads their weights from the files anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from ..decoding.exact import DeraForCausalLM
from ..merging.hollow import offloaded
from ..models.pair import Pair

log = logging.getLogger(__name__)


def offloaded_exact(
    pair: Pair,
    lam: float | Sequence[float] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | Sequence[str | torch.device] = "cpu",
    **kwargs: Any,
) -> DeraForCausalLM:
    """Exact DeRa that holds a layer of each model at a time, see `merging.hollow.offloaded`.

    Args:
        pair, lam, dtype, device, kwargs: as for `DeraForCausalLM.from_pair`. An adapter's side computes with its
            effective weights.

    Raises:
        DeraError: as for `offloaded`.
    """
    places = [device] if isinstance(device, str | torch.device) else list(device)
    sides = [
        offloaded(pair, end, device=places[min(number, 1) % len(places)], compute_dtype=dtype)
        for number, end in enumerate(pair.ends())
    ]
    return DeraForCausalLM.from_pair(pair, lam, dtype=dtype, device=device, sides=sides, **kwargs)


def stored_dtype(pair: Pair) -> torch.dtype:
    """The dtype that most of the reference's weights are stored in."""
    return max(pair.tensors.values(), key=lambda info: info.numel).dtype


def pass_bytes(pair: Pair) -> int:
    """Bytes of the files that a pass of `offloaded_exact` reads: each model's base, and what an adapter adds apart."""
    return sum(side.info(name).nbytes for side in pair.names.weights for name in side.keys)


@contextmanager
def counted_passes(
    model: DeraForCausalLM, pair: Pair, texts: int, batches: int, tokens: int, tell: Callable[[int, int], None]
) -> Iterator[None]:
    """Within, passes of a model that takes its weights from the files are told, and how long all will take is said.

    Said before the first pass is what they read, and after it, by its time, when they will be done.

    Args:
        texts, batches, tokens: how many texts, in how many batches, of how many new tokens each.
        tell: called with passes done, and in all; there are fewer where all texts of a batch end early.
    """
    passes = batches * tokens
    size = pass_bytes(pair)
    log.info(f"sampling with offload: {texts} texts by {passes} passes, each of which reads {size / 1e9:.2g} GB")
    started, done = time.perf_counter(), 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == 1 < passes:
            took = time.perf_counter() - started
            left = timedelta(seconds=round(took * (passes - 1)))
            rate = size / took / 1e9
            log.info(f"the first pass took {took:.2g} s, {rate:.2g} GB/s; the others will take {left} or less")
        tell(done, passes)

    hook = model.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()
