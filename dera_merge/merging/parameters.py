"""θ(λ) by the names that a model has in memory, each tensor made of the files when it is asked for, and not kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from ..files.ahead import Source
from ..files.buffers import Buffers
from ..files.checkpoint import TensorInfo, slices
from ..files.ordered import in_order
from ..lambdas import Lam
from ..models.names import Names
from ..models.pair import Pair
from ..models.weights import Stored
from .path import Course
from .storage import Storage
from .theta import stored_rows


class Parameters(Mapping[str, torch.Tensor]):
    """A model's weights at λ: name in memory → tensor, in the dtype that it would be stored in.

    Values are those of `live`, bit for bit: rows are made in the same way, on one thread of torch each, whatever calls
    for them. A name that shares its tensor with another (a tied head) is that tensor.

    Args:
        pair: whose.
        lam: λ.
        storage: how the values are stored.
        course: what is followed in the place of the straight line with one λ.
        names: in the place of the pair's own, where a side stands alone, or has less of its adapters.
    """

    def __init__(
        self, pair: Pair, lam: Lam, storage: Storage, course: Course | None = None, names: Names | None = None
    ) -> None:
        self._names = names or pair.names
        self._keys = {name: pair.layout.key(name) for name in pair.layout.groups}
        self._homes = {name: home for name, home in pair.architecture.tied.items() if name not in self._keys}
        self._theta = _Theta(self._names, lam, storage, course)
        self._stored = Stored(self._theta)

    @classmethod
    def at(cls, pair: Pair, lam: Lam, storage: Storage, course: Course | None = None) -> Parameters:
        """The same; where one side stands alone and has all of it in REF's dtypes, no other's files are read."""
        end = pair.ends().index(lam) if course is None and lam in pair.ends() else None
        side = None if end is None else pair.names.weights[end]
        own = {} if side is None else {name: (side.rows(name), side.info(name).dtype) for name in side.keys}
        if own != {name: (info.rows, info.dtype) for name, info in pair.tensors.items()}:
            return cls(pair, lam, storage, course)
        return cls(pair, 0.0, storage, names=replace(pair.names, weights=(side, side)))

    def __getitem__(self, name: str) -> torch.Tensor:
        key = self._keys[self._homes.get(name, name)]
        info = self._stored.info(key)
        tasks = [(0, info.rows)] if not isinstance(key, str) else list(slices(info))
        dtype = self._theta.tensors[key if isinstance(key, str) else key.tensors[0]].dtype
        whole = torch.empty(info.shape, dtype=dtype)
        rows = whole.view(info.rows, *info.row_shape)

        def work(task: tuple[int, int], scratch: Buffers, kept: Buffers) -> None:
            self._stored.rows(key, *task, rows[task[0] : task[1]], scratch)

        for _ in in_order(tasks, work):
            pass
        return whole

    def sources(self, names: Iterable[str]) -> dict[Source, None]:
        """The stored tensors that some of these are made of, in this order."""
        keys = (self._keys[self._homes.get(name, name)] for name in names)
        stored = (name for key in keys for name in ((key,) if isinstance(key, str) else key.tensors))
        return dict.fromkeys(source for name in stored for source in self._names.sources(name))

    def __iter__(self) -> Iterator[str]:
        yield from self._keys
        yield from (name for name, home in self._homes.items() if home in self._keys)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: Any) -> bool:
        return self._homes.get(name, name) in self._keys


class _Theta:
    """θ(λ) where `Stored` expects a checkpoint."""

    _spare: ClassVar[list[tuple[Buffers, Buffers]]] = []  # as many as ever read at a time

    def __init__(self, names: Names, lam: Lam, storage: Storage, course: Course | None) -> None:
        if course:
            course.check_lambda(lam)
        self._names, self._lam, self._storage, self._course = names, lam, storage, course
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(info, dtype=storage.dtype_of(names, name)) for name, info in names.tensors.items()
        }

    def read(self, name: str, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Rows [start, stop) into `out`."""
        memory = self._spare.pop() if self._spare else (Buffers(), Buffers())
        [(rows, _)] = stored_rows(
            self._names, name, start, stop, [self._lam], self._storage, *memory, self._course, summed=False
        )  # fmt: skip
        out.copy_(rows)
        self._spare.append(memory)
        return out
