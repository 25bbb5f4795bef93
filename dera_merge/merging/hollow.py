"""A model without weights, and the same with weights that come from the files as it runs."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from ..files.ahead import Ahead
from ..lambdas import Lam
from ..models.architecture import loading
from ..models.pair import Pair
from .live import config_of
from .parameters import Parameters
from .path import Course, opened
from .storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .rounding import Rounding


@dataclass(eq=False)
class Unit:
    """A module whose weights come and go together, and the names of its tensors in the whole model."""

    module: torch.nn.Module
    tensors: list[str]


def hollow(pair: Pair, dtype: torch.dtype) -> PreTrainedModel:
    """The model that holds θ(λ), without weights: parameters on the meta device, all else as it is computed."""
    from accelerate import init_empty_weights

    config, before = config_of(pair), torch.get_default_dtype()
    with loading(), init_empty_weights(include_buffers=False):
        torch.set_default_dtype(dtype)  # as transformers does while it makes one
        try:
            return pair.architecture.model_class(config).eval()
        finally:
            torch.set_default_dtype(before)


def lacking(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of all tensors of a hollow model that the files have: its parameters, and buffers that were trained."""
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.is_meta]
    return names + [name for name, _ in model.named_buffers(remove_duplicate=False) if name in weights]


def units(module: torch.nn.Module, tensors: Sequence[str], prefix: str = "") -> Iterator[Unit]:
    """The units of a module: the elements of its lists of layers, and what has weights of its own beside these.

    Args:
        tensors: names in the whole model of all that is to be put in.
        prefix: of this module's names there.
    """
    for name, child in module.named_children():
        below = [tensor for tensor in tensors if tensor.startswith(f"{prefix}{name}.")]
        own = any("." not in tensor.removeprefix(f"{prefix}{name}.") for tensor in below)
        if below and (own or isinstance(module, torch.nn.ModuleList)):
            yield Unit(child, below)
        elif below:
            yield from units(child, below, f"{prefix}{name}.")


class _Turned(Mapping[str, torch.Tensor]):
    """A model's weights, of which λ can be turned."""

    def __init__(self, at: Parameters) -> None:
        self.at = at

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.at[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.at)

    def __len__(self) -> int:
        return len(self.at)


def _read_ahead(unit: Unit, following: Unit | None, weights: _Turned, ahead: Ahead) -> None:
    """Hold what the files have of a unit while it runs, and read meanwhile what they have of the one that follows."""

    def before(*_: object) -> None:
        ahead.hold(weights.at.sources(unit.tensors))
        if following is not None:
            ahead.begin(weights.at.sources(following.tensors))

    def after(module: torch.nn.Module, args: object, result: object) -> None:
        if following is None or result is None:  # the last one, or it broke off
            ahead.close()
        else:
            ahead.let_go(weights.at.sources(unit.tensors))

    unit.module.register_forward_pre_hook(before)
    unit.module.register_forward_hook(after, always_call=True)


def offloaded(
    pair: Pair,
    lam: Lam,
    *,
    dtype: torch.dtype | str | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str | None = None,
    path: str | os.PathLike[str] | Course | None = None,
) -> PreTrainedModel:
    """As `live`, with the same values, but a layer's weights are made from the files whenever it runs, and let go.

    Held are the input embeddings (and a head that is tied to them), one layer, and what the files have of it and of the
    next one, which is read meanwhile. Every pass reads all else anew, so it is worth its time for few passes over many
    tokens. The layers have accelerate's hooks.

    Args:
        pair, lam, dtype, rounding, seed, device, compute_dtype, path: as for `live`.

    Raises:
        DeraError: as for `live`.
    """
    from accelerate.hooks import attach_align_device_hook
    from accelerate.utils import set_module_tensor_to_device

    (lam,) = pair.known([lam])
    storage = Storage.of(pair.names, torch.float32 if dtype is None else dtype, rounding, seed)
    course = opened(path, pair, [lam])
    pair.check_tokens(course.used(lam) if course else [lam])
    kind = compute_dtype or (torch.float32 if storage.dtype is None else storage.dtype)
    model = hollow(pair, getattr(torch, kind) if isinstance(kind, str) else kind)
    model.tie_weights()  # which was undone as it was made on the meta device
    weights = _Turned(Parameters.at(pair, lam, storage, course))
    names = lacking(model, weights)
    shared = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stay = [name for name in names if name not in parameters or id(parameters[name]) in shared]

    def fill() -> None:
        made: dict[int, torch.Tensor] = {}  # a tied head is the embeddings
        for name in stay:
            place = parameters.get(name)
            key = id(name if place is None else place)
            if key not in made:
                made[key] = weights[name] if place is None else weights[name].to(device, place.dtype)
            set_module_tensor_to_device(model, name, device, value=made[key])

    fill()
    ahead, coming = Ahead(), list(units(model, [name for name in names if name not in stay]))
    for unit, following in zip_longest(coming, coming[1:]):
        _read_ahead(unit, following, weights, ahead)
        place = next(name for name, module in model.named_modules() if module is unit.module)
        attach_align_device_hook(
            unit.module, execution_device=torch.device(device), offload=True, weights_map=weights, module_name=place,
            preload_module_classes=[type(unit.module).__name__],
        )  # fmt: skip
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    if config := pair.generation_config():
        model.generation_config = config

    def set_lam(model: PreTrainedModel, lam: Lam) -> None:
        """Turn λ: the next pass is at it. Not while another thread runs the model."""
        (lam,) = pair.known([lam])
        pair.check_tokens(course.used(lam) if course else [lam])
        weights.at = Parameters.at(pair, lam, storage, course)
        fill()

    model.set_lam = types.MethodType(set_lam, model)
    return model
