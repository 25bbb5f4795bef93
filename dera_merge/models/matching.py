"""Two sides put in correspondence where names or layouts differ, tensors are tied, or an adapter speaks of modules.

All of it is done in the names of REF's model in memory: `Layout` says what each file has of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from ..errors import DeraError, warn
from ..files.buffers import Buffers, as_bytes
from ..files.checkpoint import REAL, TensorInfo, slices
from .architecture import Architecture, empty_model
from .layout import Key
from .pieces import Piece, Replacement, Spread
from .side import Side
from .trust import Trust
from .weights import Stored, Weights

Pieces = dict[str, list[Piece]]
# Model types → linear layers whose weight the model's code reads itself, past the adapter's layer around them. PEFT's
# own forward has nothing of an adapter's change there, so a merge would be another model.
_READ_PAST = {"mamba": "dt_proj", "falcon_mamba": "dt_proj", "jamba": "dt_proj", "longcat_flash": "classifier"}


def match_two(
    sides: tuple[Side, Side], bases: tuple[Stored, Stored], architecture: Callable[[], Architecture], trust: Trust
) -> tuple[Weights, Weights, bool]:
    """The weights of a reference and of one aligned model, and whether a tie of REF's config is broken."""
    for side, other in (sides, sides[::-1]):
        if side.quantisation and not other.quantisation:
            raise DeraError(f"{side.base.name} is quantised ({side.quantisation}) and {other.base.name} is not; "
                            "θ_ref + λΔ needs dense weights, give those")  # fmt: skip
    stored = [side.checkpoint.tensors for side in sides]
    ties = [side.config.get("tie_word_embeddings") for side in sides]
    ties_matter = ties[0] != ties[1] or (ties[0] and {"lm_head.weight", "embed_out.weight"} & stored[0].keys())
    if stored[0].keys() == stored[1].keys() and not ties_matter and not any(side.adapter for side in sides):
        keys = {name: name for name in stored[0]}
        return Weights(bases[0], keys, {}), Weights(bases[1], keys, {}), False
    return _Matching(sides, bases, architecture(), trust).match()


class _Matching:
    """Find each tensor of θ(λ) on two sides."""

    def __init__(
        self, sides: tuple[Side, Side], bases: tuple[Stored, Stored], architecture: Architecture, trust: Trust
    ) -> None:
        self.sides, self.bases, self.trust = sides, bases, trust
        self.architecture = architecture
        shared = sides[0].checkpoint.folder == sides[1].checkpoint.folder
        self.architectures = architecture, architecture if shared else Architecture.of(sides[1].base.folder, trust)
        first = architecture.layout(self.stored(0))
        self.layouts = first, first if shared else self.architectures[1].layout(self.stored(1))
        self.wraps = self.architectures[0].model_class is not self.architectures[1].model_class

    def stored(self, number: int) -> dict[str, TensorInfo]:
        return self.sides[number].checkpoint.tensors

    def match(self) -> tuple[Weights, Weights, bool]:
        pieces = [self.pieces(number) for number in (0, 1)]
        ties = self.architecture.tied
        parted = not all(
            self.stay_one(number, name, owner, pieces[number]) for number in (0, 1) for name, owner in ties.items()
        )
        if parted:  # a config says of all ties at once that they are none, so that each end needs a tensor of its own
            ties = {}
        else:  # one tensor for both ends, by the owner's name, whichever of the two a file has
            pieces = [{name: found for name, found in own.items() if name not in ties} for own in pieces]
        keys: tuple[dict[str, Key], dict[str, Key]] = ({}, {})
        alone: list[str] = []
        for name, used, homes in self.tensors(ties, parted):
            for side, other, own, home in zip(self.sides, reversed(self.sides), keys, homes, strict=True):
                if home is not None:
                    own[name] = home
                elif used:
                    raise DeraError(f"{side.base.name} has no tensor {name}, which {other.base.name} has")
            if None in homes:  # the other model has no such tensor: REF's stays as it is, ALIGNED's is left out
                alone.append(name)
                keys[1].pop(name, None)
        if alone:
            which = alone[0] if len(alone) == 1 else f"{alone[0]} and {len(alone) - 1} more tensors"
            reason = "no model that transformers builds uses"
            if self.wraps:
                reason = "the other is made without"
            warn(f"only one side has {which}, which {reason}; REF's stay as they are")
        ref, aligned = (
            Weights(base, own, self.as_stored(made)) for base, own, made in zip(self.bases, keys, pieces, strict=True)
        )
        return ref, aligned, parted

    def tensors(
        self, ties: Mapping[str, str], parted: bool
    ) -> Iterator[tuple[str, bool, tuple[Key | None, Key | None]]]:  # fmt: skip
        """The tensors of θ(λ), in REF's order and layout: name, whether both models use it, what it is on each side.

        Args:
            ties: name in memory → the name that it shares its tensor with in θ(λ).
            parted: whether each end of REF's ties has a tensor of its own.
        """
        first, second = self.layouts
        names: dict[str, str] = {}  # of θ(λ) → in memory, where it is one tensor there
        for key in self.stored(0):
            group = first.group_of.get(key)
            if group is None:
                yield key, False, (key, key if key in self.stored(1) else None)
            elif group.is_renamed:
                owner = ties.get(group.targets[0])
                names.setdefault(self.output_name(owner) if owner else key, group.targets[0])
            else:
                homes = {name: self.home(1, name) or name for name in group.targets}
                used = all(self.is_built(name) for name in group.targets)
                yield key, used, (key, second.of_another(first, key, homes))
        ends = dict.fromkeys([*self.architecture.tied, *self.architecture.tied.values()]) if parted else {}
        for end in ends:
            if self.home(0, end) or self.home(1, end):
                names.setdefault(self.output_name(end), end)
        for name, memory in names.items():
            yield name, self.is_built(memory), (self.key(0, memory), self.key(1, memory))
        for key in self.stored(1):
            group = second.group_of.get(key)
            if group is None and key not in self.stored(0):
                yield key, False, (None, key)
            for name in map(self.in_ref, group.targets if group else ()):
                if self.home(0, name) is None:
                    yield name, not self.wraps or name in self.architecture.shapes, (None, key)

    def in_ref(self, name: str) -> str:
        """The name in REF's memory of a tensor of ALIGNED's: their decoders may lie in other places."""
        here, there = (architecture.decoder for architecture in self.architectures)
        return here + name.removeprefix(there) if name.startswith(there) else name

    def in_aligned(self, name: str) -> str:
        """The name in ALIGNED's memory of a tensor of REF's."""
        here, there = (architecture.decoder for architecture in self.architectures)
        return there + name.removeprefix(here) if name.startswith(here) else name

    def is_built(self, name: str) -> bool:
        """Whether ALIGNED's model has a tensor of REF's memory; a text model has no towers."""
        return not self.wraps or self.in_aligned(name) in self.architectures[1].shapes

    def home(self, number: int, name: str) -> str | None:
        """The tensor of its memory that a side's files have as `name` of REF's: itself, or one that it is tied to."""
        name = self.in_aligned(name) if number else name
        groups, tied = self.layouts[number].groups, self.architectures[number].tied
        owner = tied.get(name, name)
        return next((end for end in (name, owner, *tied) if end in groups and owner in (end, tied.get(end))), None)

    def key(self, number: int, name: str) -> Key | None:
        """Where a side's files have a tensor of REF's memory."""
        home = self.home(number, name)
        return None if home is None else self.layouts[number].key(home)

    def output_name(self, name: str) -> str:
        """The name of a tensor of memory in θ(λ): as REF stores it."""
        return self.layouts[0].name(name) or name

    def as_stored(self, pieces: Pieces) -> Pieces:
        """What is done to tensors of memory, by the names and in the layout of θ(λ)."""
        made: Pieces = {}
        for name, found in pieces.items():
            group = self.layouts[0].groups.get(name)
            if group is None or group.is_renamed:
                made[self.output_name(name)] = found
                continue
            for key in group.sources if group.sources[0] not in made else ():
                runs, transposed = group.backward(key)
                height = self.stored(0)[key].shape[-2] if transposed else None
                if any(group.targets[which] in pieces for which in runs.which if which >= 0):
                    made[key] = [Spread(tuple(pieces.get(target, ()) for target in group.targets), runs, height)]
        return made

    def check_adapted(self, number: int, name: str) -> None:
        """Raise DeraError where an adapter changes what REF's or its own base's files do not hold as numbers."""
        side = self.sides[number]
        for index, holder in ((0, self.sides[0]), (number, side)):
            key = self.key(index, name)
            if key is None:
                form = "in packed, quantised form" if holder.quantisation else "under no name that transformers knows"
                raise DeraError(
                    f"{side.source.name} changes {name}, which {holder.base.name} stores {form}; "
                    "that is not merged, decode exactly"
                )
            if (dtype := self.bases[index].info(key).dtype) not in REAL:
                kind = str(dtype).removeprefix("torch.")
                raise DeraError(
                    f"{side.source.name} changes {name}, which {holder.base.name} stores quantised ({kind}); "
                    "merge onto the dense base instead"
                )

    def pieces(self, number: int) -> Pieces:
        """What a side's adapters do, by the names of REF's memory."""
        side = self.sides[number]
        into_ref = self.in_ref if number else str
        build = partial(empty_model, side.base.folder, self.trust)
        by_name: Pieces = {}
        for adapter in side.adapters:
            below = {name: list(pieces) for name, pieces in by_name.items()}

            def read_base(name: str, below: Pieces = below) -> torch.Tensor:
                self.check_adapted(number, into_ref(name))
                return self.changed(number, into_ref(name), below.get(into_ref(name), ()))

            for own_name, pieces in adapter.bind(self.architectures[number], read_base, build).items():
                name = into_ref(own_name)
                self.check_adapted(number, name)
                self.check_read(number, name, pieces)
                by_name.setdefault(name, []).extend(pieces)
        return by_name

    def changed(self, number: int, name: str, pieces: Sequence[Piece]) -> torch.Tensor:
        """A whole tensor of a side's base in float32, with what adapters do to it."""
        return self.bases[number].whole(self.key(number, name), pieces)

    def check_read(self, number: int, name: str, pieces: Sequence[Piece]) -> None:
        """Raise DeraError where an adapter changes a weight that the model reads without the adapter."""
        side, kind = self.sides[number], self.architectures[number].model.config.model_type
        if kind not in _READ_PAST or not name.endswith(f".{_READ_PAST[kind]}.weight"):
            return
        sums = [piece for piece in pieces if not isinstance(piece, Replacement)]
        if not torch.allclose(self.changed(number, name, sums), self.changed(number, name, ()), rtol=1e-5, atol=0):
            raise DeraError(
                f"{side.source.name} changes {name}, which transformers' {kind} reads past PEFT's layer: the adapted "
                "model computes nothing of that change, and a merge would; decode exactly"
            )

    def stay_one(self, number: int, name: str, owner: str, pieces: Pieces) -> bool:
        """Whether a tied tensor and its owner are still one on a side: stored as one, and changed alike if at all.

        Only the values say so: an adapter may change one end, or both by what is the same or is not.
        """
        homes = [self.home(number, end) for end in (name, owner)]
        if None in homes:  # both are, for each is the other's home; `match` says what is missing
            return True
        changes = [pieces.get(end, ()) for end in (name, owner)]
        if not any(changes) and homes[0] == homes[1]:
            return True
        keys = [self.layouts[number].key(home) for home in homes]
        infos = [self.bases[number].info(key) for key in keys]
        if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
            return False
        dtype = torch.float32 if any(changes) else infos[0].dtype
        digests = {self.digest(number, key, change, dtype) for key, change in zip(keys, changes, strict=True)}
        return len(digests) == 1

    def digest(self, number: int, key: Key, pieces: Sequence[Piece], dtype: torch.dtype) -> bytes:
        """SHA-256 of a tensor of the files with what an adapter does to it, in this dtype, a few rows at a time."""
        base, buffers, digest = self.bases[number], Buffers(), hashlib.sha256()
        info = base.info(key)
        for start, stop in slices(info, stop=base.height(key, pieces)):
            rows = buffers.take("rows", (stop - start, *info.row_shape), dtype)
            base.changed(key, pieces, start, stop, rows, buffers)
            if dtype == torch.float32:
                rows.add_(0.0)  # -0 and +0 are one value
            digest.update(as_bytes(rows))
        return digest.digest()
