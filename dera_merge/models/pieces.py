"""What an adapter does to one tensor: a low-rank sum, a replacement, or whatever PEFT makes of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import DeraError
from ..files.ahead import Source
from ..files.checkpoint import Checkpoint
from . import doors
from .layout import Runs

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


ALL = slice(None)


class Piece(Protocol):
    """One thing that an adapter does to one tensor."""

    @property
    def rows(self) -> int:
        """How many rows the tensor has after it, where it brings them; a vocabulary may have grown. Else 0."""
        ...

    @property
    def sources(self) -> Iterable[Source]:
        """The stored tensors that it reads, but for those that the tensor itself is made of."""
        ...

    def apply(self, rows: torch.Tensor, start: int, stop: int, columns: slice = ALL) -> None:
        """Put the change into the tensor's rows [start, stop), float32 or float64, in place.

        Rows of the vocabulary that it does not know stay as they are.

        Args:
            rows: these rows, or `columns` of them.
            start, stop: which.
            columns: which part of each row.
        """
        ...


@dataclass(frozen=True)
class LowRank:
    """scale·B·A, or its transpose for layers that store (in, out): LoRA (Hu et al., 2021, eq. 3).

    `a` and `b` are the keys of the factors in the adapter.
    """

    adapter: Checkpoint
    a: str
    b: str
    scale: float
    transposed: bool
    rows = 0

    @property
    def sources(self) -> Iterable[Source]:
        return (self.adapter, self.a), (self.adapter, self.b)

    def apply(self, rows: torch.Tensor, start: int, stop: int, columns: slice = ALL) -> None:
        right = _factor(self.adapter, self.b if self.transposed else self.a, rows.dtype)
        if self.transposed:
            left, right = _factor(self.adapter, self.a, rows.dtype)[:, start:stop].T, right.T
        else:
            left = self.adapter.read(self.b, *_within(self.adapter, self.b, start, stop)).to(rows.dtype)
        rows[: len(left)].addmm_(left, right[:, columns], alpha=self.scale)


@lru_cache(maxsize=4)  # the slices of one tensor come one after another, and each needs the whole factor
def _factor(adapter: Checkpoint, key: str, dtype: torch.dtype) -> torch.Tensor:
    return adapter.read_whole(key).to(dtype)


def _within(adapter: Checkpoint, key: str, start: int, stop: int) -> tuple[int, int]:
    """Those of the rows [start, stop) that a tensor has."""
    count = adapter.tensors[key].rows
    return min(start, count), min(stop, count)


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained whole: `modules_to_save`, or biases with `bias="all"`."""

    adapter: Checkpoint
    key: str

    @property
    def rows(self) -> int:
        return self.adapter.tensors[self.key].rows

    @property
    def sources(self) -> Iterable[Source]:
        return ((self.adapter, self.key),)

    def apply(self, rows: torch.Tensor, start: int, stop: int, columns: slice = ALL) -> None:
        known = self.adapter.read(self.key, *_within(self.adapter, self.key, start, stop))
        rows[: len(known)] = known[:, columns] if known.ndim > 1 else known


@dataclass(frozen=True, eq=False)
class LowRankStack:
    """scale·B·A of each matrix of a stack, experts' say: LoRA on a parameter (PEFT's `target_parameters`).

    Attributes:
        left: (matrices, rows, r), float32.
        right: (matrices, r, columns), float32.
        scale: of the sum.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float
    rows = 0
    sources = ()

    def apply(self, rows: torch.Tensor, start: int, stop: int, columns: slice = ALL) -> None:
        height = self.left.shape[1]
        for number in range(start // height, -(-stop // height)):
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            left = self.left[number, first - number * height : last - number * height].to(rows.dtype)
            right = self.right[number, :, columns].to(rows.dtype)
            rows[first - start : last - start].addmm_(left, right, alpha=self.scale)


@dataclass(frozen=True, eq=False)
class Spread:
    """What is done to tensors in memory, to a stored one that becomes rows of them, or columns.

    Attributes:
        pieces: what is done to each tensor in memory.
        runs: where the stored tensor's rows are in these.
        height: None; or, where `runs` speak of the stored tensor's columns, the rows of one of its matrices.
    """

    pieces: tuple[Sequence[Piece], ...]
    runs: Runs
    height: int | None = None
    rows = 0

    @property
    def sources(self) -> Iterable[Source]:
        return (source for pieces in self.pieces for piece in pieces for source in piece.sources)

    def apply(self, rows: torch.Tensor, start: int, stop: int, columns: slice = ALL) -> None:
        assert columns == ALL  # it is the outermost
        if self.height is None:
            return self._straight(rows, start, stop, ALL)
        height, width = self.height, rows.shape[-1]
        for block in range(start // height, -(-stop // height)):
            first, last = max(start, block * height), min(stop, (block + 1) * height)
            part = rows[first - start : last - start]
            turned = part.T.contiguous()
            columns = slice(first - block * height, last - block * height)
            self._straight(turned, block * width, (block + 1) * width, columns)
            part.copy_(turned.T)
        return None

    def _straight(self, rows: torch.Tensor, start: int, stop: int, columns: slice) -> None:
        for first, last, which, row in self.runs.within(start, stop):
            for piece in self.pieces[which] if which >= 0 else ():
                piece.apply(rows[first - start : last - start], row, row + last - first, columns)


@dataclass(frozen=True, eq=False)
class ThroughPeft:
    """A parameter of a module that PEFT merges: DoRA, OFT, IA³ and whatever else is no plain sum s·BA."""

    modules: PeftModules
    module: str
    parameter: str
    sources = ()

    @property
    def rows(self) -> int:
        return self.modules.rows(self.module, self.parameter)

    def apply(self, rows: torch.Tensor, start: int, stop: int, columns: slice = ALL) -> None:
        merged = self.modules.merged(self.module)[self.parameter]
        lines = merged.reshape(-1, merged.shape[-1]) if merged.ndim > 1 else merged
        known = lines[start:stop, columns] if merged.ndim > 1 else lines[start:stop]
        rows[: len(known)] = known


class PeftModules:
    """The adapted modules of a model that has no weights: PEFT merges each when its base weight is put in.

    The model is built of zeros that take no memory, so what is held is the adapter, and one module at a time.

    Args:
        folder: of the adapter, for messages.
        load: puts the adapter on a model.
        read_base: gives the whole base tensor of a parameter, by its name in memory, in float32.
        model: an empty one, which is used up.
        written: whether PEFT writes base embeddings that came with the adapter; they get memory of their own.
    """

    def __init__(
        self, folder: Path, load: Callable[[PreTrainedModel], PeftModel], read_base: Callable[[str], torch.Tensor],
        model: PreTrainedModel, written: bool = False,
    ) -> None:  # fmt: skip
        self._folder = folder
        self._read_base = read_base
        self._lock = Lock()
        self._latest: tuple[str, dict[str, torch.Tensor]] | None = None
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        ends = (model.get_input_embeddings(), model.get_output_embeddings()) if written else ()
        _hollow(model)
        for end in ends:
            if end is not None:
                end.weight = torch.nn.Parameter(end.weight.detach().clone(), requires_grad=False)
        root = load(model).get_base_model()
        self.modules: dict[str, torch.nn.Module] = {}
        for name, module in root.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in self.modules)
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
                self.modules[name] = module

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """What the adapter may change, by parameter name in memory, and what it does there."""
        for name, module in self.modules.items():
            if stacks := _stacks(module):
                yield from ((f"{name}.{parameter}", stack) for parameter, stack in stacks.items())
                continue
            for parameter, _ in _base_of(module).named_parameters():
                yield f"{name}.{parameter}", ThroughPeft(self, name, parameter)

    def rows(self, name: str, parameter: str) -> int:
        """Rows of a parameter, seen as `TensorInfo` sees them."""
        shape = dict(_base_of(self.modules[name]).named_parameters())[parameter].shape
        return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]

    def merged(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of one module with the adapter in them, float32. Raises DeraError where PEFT cannot."""
        with self._lock:  # the slices of one tensor are asked for by several threads, one after another
            if self._latest is None or self._latest[0] != name:
                self._latest = None
                self._latest = (name, self._merge(name))
            return self._latest[1]

    def _merge(self, name: str) -> dict[str, torch.Tensor]:
        module = self.modules[name]
        weights = {
            id(hollow): torch.nn.Parameter(self._read_base(f"{name}.{parameter}"), requires_grad=False)
            for parameter, hollow in _base_of(module).named_parameters()
        }
        twin = copy.deepcopy(module, dict(weights))
        try:
            if hasattr(twin, "unload_and_optionally_merge_module"):
                merged = twin.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                twin.merge()
                merged = twin.get_base_layer()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise DeraError(f"{self._folder}: PEFT cannot merge {name}: {error}; decode exactly") from error
        return {parameter: tensor.detach().float() for parameter, tensor in merged.named_parameters()}


def _stacks(module: torch.nn.Module) -> dict[str, LowRankStack]:
    """The sums on parameters of one module, which PEFT wraps once for each; none where it is wrapped otherwise."""
    from peft.tuners.lora import ParamWrapper

    stacks = {}
    while isinstance(module, ParamWrapper):
        doors.check("adapters", module)
        ((adapter, first),) = module.lora_A.items()
        a, b, count = first.weight.detach(), module.lora_B[adapter].weight.detach(), module.num_experts
        left = b.reshape(len(b), -1, count).permute(2, 0, 1)  # (matrices, out, r): PEFT's order of the columns of B
        right = a.reshape(count, -1, a.shape[-1])  # (matrices, r, in)
        if getattr(module.get_base_layer(), "is_transposed", False) and module.get_param().ndim == 3:
            left, right = right.mT, left.mT
        stacks[module.parameter_name] = LowRankStack(left, right, module.scaling[adapter])
        module = module.base_layer
    return stacks


def _base_of(module: Any) -> torch.nn.Module:
    """The base's module inside of PEFT's wrapper."""
    doors.check("adapters", module)
    if hasattr(module, "token_adapter"):
        return module.token_adapter.get_base_layer()
    return module.original_module if hasattr(module, "original_module") else module.get_base_layer()


def _hollow(model: torch.nn.Module) -> None:
    """Put zeros that share one element in the place of all parameters and buffers."""
    for module in model.modules():
        options = {"recurse": False, "remove_duplicate": False}
        tensors = [*module.named_parameters(**options), *module.named_buffers(**options)]
        for name, tensor in tensors:
            zeros = torch.zeros((), dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
            hollow = zeros.expand(tensor.shape)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            setattr(module, name, torch.nn.Parameter(hollow, requires_grad=False) if is_parameter else hollow)
