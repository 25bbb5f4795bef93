"""How a checkpoint's tensors become a model's: renamed, stacked, joined, split, transposed, as transformers says.

transformers knows for each class how files become its memory, and turns them while it loads. `Layout` asks it for
names, and finds what it does to values by letting it convert the numbers of rows in the place of weights: whatever
transformers does, each row in memory then says which stored row it is. So one layer's experts are never put together.
"""

from __future__ import annotations

import bisect
import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeraError
from ..files.checkpoint import REAL, TensorInfo
from . import doors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Runs:
    """Where the rows of one tensor are in others: runs of rows that follow each other there.

    Attributes:
        starts: the first row of each run, ascending.
        which: the number of the other tensor; -1 where the rows are in none.
        rows: the row there of the first row.
        total: how many rows there are.
    """

    starts: Sequence[int]
    which: Sequence[int]
    rows: Sequence[int]
    total: int

    @classmethod
    def of(cls, which: torch.Tensor, rows: torch.Tensor) -> Runs:
        """From the number of the other tensor and the row there of each row, int64."""
        follows = (which[1:] == which[:-1]) & ((rows[1:] == rows[:-1] + 1) | (which[1:] < 0))
        starts = torch.cat([torch.zeros(min(1, len(rows)), dtype=torch.int64), (~follows).nonzero().flatten() + 1])
        return cls(starts.tolist(), which[starts].tolist(), rows[starts].tolist(), len(rows))

    @classmethod
    def joined(cls, runs: Sequence[tuple[int, int, int]], total: int) -> Runs:
        """From (first row, the other tensor, the row there) of runs, of which one may go on where another ends."""
        kept: list[tuple[int, int, int]] = []
        for start, which, row in runs:
            if not kept or kept[-1][1] != which or kept[-1][2] + start - kept[-1][0] != row:
                kept.append((start, which, row))
        return cls(*(tuple(values) for values in zip(*kept, strict=True)), total)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The runs of rows [start, stop): first and last row (exclusive), the other tensor, the row there."""
        index = max(0, bisect.bisect_right(self.starts, start) - 1)
        while index < len(self.starts) and self.starts[index] < stop:
            end = self.starts[index + 1] if index + 1 < len(self.starts) else self.total
            first, last = max(start, self.starts[index]), min(stop, end)
            if first < last:
                yield first, last, self.which[index], self.rows[index] + first - self.starts[index]
            index += 1

    def is_whole(self) -> bool:
        """Whether they are, in order and from its first row on, rows of one tensor."""
        return tuple(self.starts) == (0,) and tuple(self.which) == (0,) and tuple(self.rows) == (0,)


@dataclass(frozen=True, eq=False)
class Assembled:
    """A tensor that a checkpoint holds in other shapes; `weights.Stored` puts its rows together.

    Attributes:
        info: its shape; dtype and file of the first tensor that it is made of.
        tensors: the stored tensors that it is made of.
        runs: where its rows are in these.
        columns: whether they are columns there.
        transposed: whether `runs` speak of this tensor's columns.
    """

    info: TensorInfo
    tensors: tuple[str, ...]
    runs: Runs
    columns: tuple[bool, ...]
    transposed: bool = False


Key = str | Assembled  # a tensor of a checkpoint: stored under this name, or to be put together


@dataclass(frozen=True, eq=False)
class _Trace:
    """Where rows go in one conversion: of each target in the sources, and of each source in the targets."""

    columns: bool
    forward: tuple[Runs, ...]
    backward: tuple[Runs, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Stored tensors that transformers makes one or several of in memory.

    Attributes:
        sources: stored, in transformers' order.
        targets: in memory.
        layout: which it belongs to.
        converter: transformers' own; None where it renames.
        patterns: of each source, which of the converter's it has.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layout: Layout
    converter: Any = None
    patterns: tuple[str, ...] = ()
    alike: dict[Group, bool] = field(default_factory=dict)  # groups of other checkpoints → whether they look the same

    @cached_property
    def position(self) -> dict[str, int]:
        """The number of each source."""
        return {key: number for number, key in enumerate(self.sources)}

    @property
    def is_renamed(self) -> bool:
        """Whether it is one tensor on both sides, as it is stored."""
        return self.converter is None

    @cached_property
    def _trace(self) -> _Trace:
        return self.layout.trace(self)

    def forward(self, target: str) -> tuple[Runs, bool]:
        """Where the rows of a tensor in memory are in `sources`, and whether they are columns there."""
        if self.is_renamed:
            return _whole(self.layout.tensors[self.sources[0]].rows), False
        return self._trace.forward[self.targets.index(target)], self._trace.columns

    def backward(self, source: str) -> tuple[Runs, bool]:
        """Where the rows of a stored tensor are in `targets`; or, if the answer says so, its columns."""
        if self.is_renamed:
            return _whole(self.layout.tensors[source].rows), False
        return self._trace.backward[self.position[source]], self._trace.columns


def _whole(rows: int) -> Runs:
    return Runs((0,), (0,), (0,), rows)


class Layout:
    """Which tensors of a checkpoint make which of a model.

    Args:
        model: an empty one.
        shapes: name in memory → shape.
        tensors: name in the files → what is stored.

    Attributes:
        groups: name in memory → what it is made of; names that the files do not hold are not there.
        group_of: name in the files → the group that it belongs to; names that no model uses are not there.
    """

    def __init__(
        self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        doors.check("models")
        self.shapes, self.tensors = shapes, tensors
        self._model = model
        self._traces: dict[Any, _Trace] = {}
        conversions = get_model_conversion_mapping(model)
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = model.base_model_prefix
        found: dict[str, list[tuple[str, str | None]]] = {}
        for key in sorted(tensors, key=dot_natural_key):  # as transformers loads them
            name, pattern = rename_source_key(key, renamings, converters, prefix, shapes)
            if name not in shapes and key in shapes:
                name, pattern = rename_source_key(key, [], [], prefix, shapes)
            if name in shapes:
                found.setdefault(name, []).append((key, pattern))
        self.groups: dict[str, Group] = {}
        self.group_of: dict[str, Group] = {}
        for name, sources in found.items():
            converter = by_pattern.get(sources[0][1])
            if converter is None:
                group = Group((sources[0][0],), (name,), self)
            else:
                keys, patterns = zip(*((key, pattern) for key, pattern in sources if pattern), strict=True)
                group = Group(keys, (name,), self, converter, patterns)
                if len(converter.target_patterns) > 1 and (made := self._convert(group, False)):
                    group = Group(keys, tuple(made), self, converter, patterns)
            self.groups |= dict.fromkeys(group.targets, group)
            self.group_of |= dict.fromkeys(group.sources, group)

    def key(self, name: str) -> Key | None:
        """The tensor `name` of memory in the files; None where they do not hold it."""
        group = self.groups.get(name)
        if group is None or group.is_renamed:
            return self.name(name)
        runs, columns = group.forward(name)
        return self._assembled(self.shapes[name], group.sources, runs, [columns] * len(group.sources))

    def name(self, name: str) -> str | None:
        """What the files call a tensor of memory; None where they hold it in other shapes, or not at all."""
        group = self.groups.get(name)
        return group.sources[0] if group and group.is_renamed else None

    def of_another(self, other: Layout, key: str, homes: Mapping[str, str]) -> Key | None:
        """The tensor that another checkpoint stores as `key`, in this one's files; None where they do not hold it.

        Args:
            other: that checkpoint's.
            key: one of its names.
            homes: name in memory → the name of what it shares its tensor with, where these files hold that only.
        """
        if other is self:
            return key
        group = other.group_of[key]
        names = [homes.get(name, name) for name in group.targets]
        if any(name not in self.groups for name in names):
            return None
        if self._has_alike(group, names):
            return self.groups[names[0]].sources[group.position[key]]
        if any(other.shapes[one] != self.shapes[two] for one, two in zip(group.targets, names, strict=True)):
            return self.key(names[0])  # of another shape, which the caller says
        runs, transposed = group.backward(key)
        places: dict[tuple[int, str], tuple[int, bool]] = {}  # number of the target, source → its number, by columns
        found: list[tuple[int, int, int]] = []
        for first, last, number, row in runs.within(0, runs.total):
            if number < 0:
                raise DeraError(f"{key} holds rows that no model uses, and the other side stores it in another layout")
            mine = self.groups[names[number]]
            forward, by_columns = mine.forward(names[number])
            for start, _, which, line in forward.within(row, row + last - first):
                place = places.setdefault((number, mine.sources[which]), (len(places), by_columns))
                found.append((first + start - row, place[0], line))
        tensors, columns = [source for _, source in places], [by_columns for _, by_columns in places.values()]
        made = self._assembled(other.tensors[key].shape, tensors, Runs.joined(found, runs.total), columns, transposed)
        alone = len(tensors) == 1 and made.runs.is_whole() and columns[0] == transposed
        return tensors[0] if alone and self.tensors[tensors[0]].shape == made.info.shape else made

    def _assembled(
        self, shape: tuple[int, ...], tensors: Sequence[str], runs: Runs, columns: Sequence[bool],
        transposed: bool = False,
    ) -> Assembled:  # fmt: skip
        """A tensor of these; of their dtype, or the widest, or that of what is no real numbers."""
        dtypes = {self.tensors[key].dtype for key in tensors}
        odd = [dtype for dtype in dtypes if dtype not in REAL]
        dtype = odd[0] if odd else reduce(torch.promote_types, dtypes)
        info = TensorInfo(dtype, shape, self.tensors[tensors[0]].file)
        return Assembled(info, tuple(tensors), runs, tuple(columns), transposed)

    def _has_alike(self, group: Group, names: Sequence[str]) -> bool:
        """Whether the files hold another checkpoint's group as it does: equal shapes, in one order, or one tensor."""
        mine = self.groups[names[0]]
        if group not in mine.alike:
            if group.is_renamed or mine.is_renamed:
                mine.alike[group] = group.is_renamed and mine.is_renamed
            else:
                shapes = ([of.layout.tensors[key].shape for key in of.sources] for of in (mine, group))
                same_targets = mine.targets == tuple(names) and mine.patterns == group.patterns
                mine.alike[group] = same_targets and operator.eq(*shapes)
        return mine.alike[group]

    # What a conversion does to rows

    def trace(self, group: Group) -> _Trace:
        """Where rows go, found by letting transformers convert their numbers. Raises DeraError where it is no order."""
        shapes = tuple(self.tensors[key].shape for key in group.sources)
        alike = id(group.converter), group.patterns, shapes, tuple(self.shapes[name] for name in group.targets)
        if alike not in self._traces:  # the layers of a model are
            found = next(filter(None, (self._attempt(group, columns) for columns in (False, True))), None)
            if found is None:
                raise DeraError(
                    f"{group.sources[0]} and {len(group.sources) - 1} more tensors do not make {group.targets[0]} of "
                    f"shape {list(self.shapes[group.targets[0]])}; is one missing?"
                )
            self._traces[alike] = found
        return self._traces[alike]

    def _attempt(self, group: Group, columns: bool) -> _Trace | None:
        """Where rows go, or columns that become rows; None where transformers does something else."""
        made = self._convert(group, columns)
        if made is None or made.keys() != set(group.targets) or not made.keys() <= self.shapes.keys():
            return None
        if any(tuple(made[name].shape) != _narrow(self.shapes[name]) for name in group.targets):
            return None
        counts = [_lines(self.tensors[key].shape, columns) for key in group.sources]
        begins = torch.tensor([0, *counts]).cumsum(0)
        values = [made[name].flatten().to(torch.int64) - 1 for name in group.targets]
        every = torch.cat(values)
        if len(every.unique()) != len(every) or every.min() < 0 or every.max() >= begins[-1]:
            return None
        forward = []
        for each in values:
            which = torch.bucketize(each, begins[1:], right=True)
            forward.append(Runs.of(which, each - begins[which]))
        target = torch.full((int(begins[-1]),), -1)
        row = torch.zeros_like(target)
        target[every] = torch.cat([torch.full_like(each, number) for number, each in enumerate(values)])
        row[every] = torch.cat([torch.arange(len(each)) for each in values])
        spans = zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True)
        backward = [Runs.of(target[first:last], row[first:last]) for first, last in spans]
        return _Trace(columns, tuple(forward), tuple(backward))

    def _convert(self, group: Group, columns: bool) -> dict[str, torch.Tensor] | None:
        """What transformers makes of the numbers of all sources' rows (or columns), from 1 on: 0 is none's.

        None where it cannot: a shape is not what the class expects, or a tensor is missing.
        """
        converter, begin = copy.deepcopy(group.converter), 1
        for key, pattern in zip(group.sources, group.patterns, strict=True):
            shape = self.tensors[key].shape
            if columns and len(shape) < 2:
                return None
            count = _lines(shape, columns)
            narrow = (*shape[:-2], 1, shape[-1]) if columns else _narrow(shape)
            converter.add_tensor(group.targets[0], key, pattern, torch.arange(begin, begin + count).view(narrow))
            begin += count
        try:
            made = converter.convert(group.targets[0], model=_Narrow(self._model), config=self._model.config)
        except Exception:  # an operation of any kind, which raises whatever it meets
            return None
        return {name: each[0] if isinstance(each, list) else each for name, each in made.items()}


def _lines(shape: tuple[int, ...], columns: bool) -> int:
    """How many rows a tensor has, or columns in all its blocks."""
    kept = (*shape[:-2], shape[-1]) if columns else shape[: max(1, len(shape) - 1)]
    return torch.Size(kept).numel()


def _narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor with one number for each row."""
    return (*shape[:-1], 1) if len(shape) > 1 else shape


class _Narrow:
    """A model of which conversions see the parameters with one number for each row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty(_narrow(tuple(self._model.get_parameter(name).shape)), device="meta", dtype=torch.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
