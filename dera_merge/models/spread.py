"""Whether what is loaded lies on one device, or has its layers spread over all accelerators that this process sees.

It is a property of the process, as its share of the prompts is: whoever loads a model asks here, so that measurements,
which load many, need not hand it on. The layers have accelerate's hooks, which take states from device to device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_on: ContextVar[bool] = ContextVar("spread", default=False)


def begin() -> torch.device:
    """Spread from now on what is loaded; the device on which inputs and results lie.

    Raises:
        DeraError: several processes share this machine's devices.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise DeraError("--device spread takes all devices of a machine; start one process on each")
    _on.set(True)
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@contextmanager
def over_all_devices() -> Iterator[torch.device]:
    """Within, what is loaded is spread. Gives and raises what `begin` does."""
    before = _on.get()
    try:
        yield begin()
    finally:
        _on.set(before)


def devices(one: torch.device | str) -> list[torch.device]:
    """All devices over which models are spread, where they are; else the one."""
    if not _on.get() or torch.device(one).type != "cuda":
        return [torch.device(one)]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def how() -> dict[str, Any]:
    """Arguments of `from_pretrained` that spread a model, where models are spread."""
    return {"device_map": "auto"} if _on.get() else {}


def checked(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was loaded so. Raises DeraError where a part of it did not fit on the accelerators."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 and places & {"cpu", "disk"} and _on.get():
        raise DeraError("the model does not fit on all devices together; --max-memory reads it a layer at a time")
    return model
