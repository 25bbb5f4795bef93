"""Which tensor of each side is which: matched once, and never changed.

Names differ between the sides where one stores a tied tensor twice, or leaves out the base model's prefix; and an
adapter speaks in names of modules in memory. `match` finds each tensor of θ(λ) on every side, or says why that cannot
be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..errors import DeraError, warn
from ..files.buffers import Buffers, as_bytes
from ..files.checkpoint import REAL, TensorInfo, slices
from .architecture import Architecture, empty_model
from .pieces import Piece, Replacement
from .quantized import Requantised
from .side import Side
from .trust import NOTHING, Trust
from .weights import Stored, Weights

Pieces = dict[str, list[Piece]]


@dataclass(frozen=True, eq=False)
class Names:
    """The tensors of θ(λ), and where each side has them.

    Attributes:
        tensors: name → REF's tensor; the names, shapes and dtypes of θ(λ).
        weights: the effective weights of the reference, and then of each aligned model, by these names.
        unties: whether θ(λ) has two tensors where REF's config says that one is shared.
        quantised_modules: modules of which REF stores a tensor that is no real numbers.
    """

    tensors: Mapping[str, TensorInfo]
    weights: tuple[Weights, ...]
    unties: bool
    quantised_modules: frozenset[str]

    @property
    def ref(self) -> Weights:
        """The reference's weights."""
        return self.weights[0]

    def is_opaque(self, name: str) -> bool:
        """Whether a tensor is no plain array of weights, but quantised or a scale that belongs to quantised ones.

        It must be the same on all sides, and its bits stay.
        """
        return _is_opaque(name, self.tensors[name], self.quantised_modules)

    def is_same(self, name: str) -> bool:
        """Whether all sides are one tensor, so that θ(λ) is its stored bits at every λ."""
        return not any(self.differs(name, number) for number in range(1, len(self.weights)))

    def differs(self, name: str, number: int) -> bool:
        """Whether the number-th aligned model (from 1 on) may have other weights there than the reference."""
        ref, aligned = self.ref, self.weights[number]
        if name not in aligned.keys:  # of no use to a model, and on REF's side only
            return False
        changed = name in ref.pieces or name in aligned.pieces or ref.info(name) is not aligned.info(name)
        return changed and not self.is_opaque(name)

    def adapts(self, name: str) -> bool:
        """Whether an adapter changes all of this tensor, so that losing the whole of it is a fault and not rounding."""
        pieces = [piece for side in self.weights for piece in side.pieces.get(name, ())]
        return any(not isinstance(piece, Replacement) for piece in pieces)


def match(
    sides: Sequence[Side], architecture: Callable[[], Architecture], base_quantization: str | None = None,
    trust: Trust = NOTHING,
) -> Names:  # fmt: skip
    """Put the weights of a reference and its aligned models in correspondence.

    Args:
        sides: the reference, and each aligned model.
        architecture: makes REF's, where that is needed: checkpoints whose names agree need no model, not even an empty
            one, and building it takes seconds.
        base_quantization: what the adapters' base was quantised to in training; None where it was not.
        trust: what may be read and run of the files.

    Raises:
        DeraError: they do not correspond, or are quantised.
    """
    ref, *aligned = sides
    stored: dict[tuple[int, bool], Stored] = {}
    for side in sides:
        quantise = base_quantization is not None and is_requantised(side, ref)
        if (id(side.checkpoint), quantise) not in stored:
            requantised = _requantised(side, architecture(), base_quantization) if quantise else None
            stored[id(side.checkpoint), quantise] = Stored(side.checkpoint, requantised)
    bases = [
        stored[id(side.checkpoint), base_quantization is not None and is_requantised(side, ref)] for side in sides
    ]
    quantised = _quantised_modules(ref)
    matches = [
        _match_two((ref, side), (bases[0], base), architecture, trust)
        for side, base in zip(aligned, bases[1:], strict=True)
    ]
    for side, matched in zip(aligned, matches, strict=True):
        for name in matched[1].keys:
            _check_tensor(name, (ref, side), matched[:2], quantised)
    first = matches[0][0]
    for side, (ref_weights, _, _) in zip(aligned[1:], matches[1:], strict=True):
        if odd := sorted(first.keys.keys() ^ ref_weights.keys.keys()):
            names = f"{side.source.name} and {aligned[0].source.name}"
            raise DeraError(f"{names} tie embeddings differently ({odd[0]}); they cannot be merged, decode exactly")
    tensors = {name: first.info(name) for name in first.keys}
    unties = any(unties for _, _, unties in matches)
    return Names(tensors, (first, *(weights for _, weights, _ in matches)), unties, quantised)


def is_requantised(side: Side, ref: Side) -> bool:
    """Whether a side's base is to be what its adapter was trained on: of adapters, and of REF, which Δ is added to.

    An aligned model that is a full checkpoint is what it is.
    """
    return side is ref or side.adapter is not None


def layer_kind(name: str) -> str:
    """What kind of layer a tensor belongs to: `self_attn.q_proj` for `model.layers.7.self_attn.q_proj.weight`."""
    parts = name.removesuffix(".weight").split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    inner = parts[numbers[-1] + 1 :] if numbers else parts[-1:]
    return ".".join(inner) or name


def _requantised(side: Side, architecture: Architecture, kind: str) -> Requantised:
    """A side's linear layers as quantisation to `kind` and back leaves them."""
    if architecture.transposed:
        raise DeraError("--base-quantization does not know layers that store their weight transposed (Conv1D)")
    stored = side.checkpoint.tensors
    linear = {architecture.stored_name(f"{module}.weight", stored) for module in architecture.linear}
    return Requantised(side.checkpoint, linear - {None}, kind)


def _match_two(
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
    """Find each tensor on two sides where names differ, tensors are tied, or an adapter speaks in module names."""

    def __init__(
        self, sides: tuple[Side, Side], bases: tuple[Stored, Stored], architecture: Architecture, trust: Trust
    ) -> None:
        self.sides, self.bases, self.trust = sides, bases, trust
        self.architecture = architecture
        shared = sides[0].checkpoint.folder == sides[1].checkpoint.folder
        self.architectures = architecture, architecture if shared else Architecture.of(sides[1].base.folder, trust)

    def match(self) -> tuple[Weights, Weights, bool]:
        pieces = [self.pieces(number) for number in (0, 1)]
        names = dict.fromkeys([*self.stored(0), *map(self.output_name, self.stored(1))])
        ties = {self.output_name(name): self.output_name(owner) for name, owner in self.architecture.tied.items()}
        parted = [
            name for name, owner in ties.items()
            if not all(self.stay_one(number, name, owner, pieces[number]) for number in (0, 1))
        ]  # fmt: skip
        if parted:  # a config says of all ties at once that they are none, so that each end needs a tensor of its own
            names |= dict.fromkeys([*ties, *ties.values()])
        else:  # one tensor for both ends, by the owner's name, whichever of the two a file has
            names = dict.fromkeys(ties.get(name, name) for name in names)
            pieces = [{name: found for name, found in own.items() if name not in ties} for own in pieces]
        keys: tuple[dict[str, str], dict[str, str]] = ({}, {})
        unused: list[str] = []
        for name in names:
            homes = [self.home(number, name) for number in (0, 1)]
            for side, other, key in zip(self.sides, reversed(self.sides), homes, strict=True):
                if key is None and self.is_built(name):
                    raise DeraError(f"{side.base.name} has no tensor {name}, which {other.base.name} has")
            if None in homes:  # no model has it: REF's stays as it is, ALIGNED's is left out
                unused.append(name)
            if homes[0] is not None:
                keys[0][name] = homes[0]
            if homes[0] is not None and homes[1] is not None:
                keys[1][name] = homes[1]
        if unused:
            which = unused[0] if len(unused) == 1 else f"{unused[0]} and {len(unused) - 1} more tensors"
            warn(f"only one side has {which}, which no model that transformers builds uses; REF's stay as they are")
        ref, aligned = (Weights(*parts) for parts in zip(self.bases, keys, pieces, strict=True))
        return ref, aligned, bool(parted)

    def is_built(self, name: str) -> bool:
        """Whether the model in memory has a tensor of this name, which a file may lack the prefix of."""
        return self.architecture.stored_name(name, self.architecture.shapes) is not None

    def stored(self, number: int) -> dict[str, TensorInfo]:
        return self.sides[number].checkpoint.tensors

    def home(self, number: int, name: str) -> str | None:
        """The stored tensor that is `name` on a side: its own, or one that it is tied to."""
        stored, architecture = self.stored(number), self.architectures[number]
        tied = [architecture.owner(name)]
        tied += [other for other in architecture.tied if architecture.owns(name, other)]
        candidates = (self.architecture.stored_name(end, stored) for end in (name, *tied) if end)
        return next((key for key in candidates if key is not None), None)

    def output_name(self, name: str) -> str:
        """The name of a tensor in θ(λ): as REF stores it."""
        return self.architecture.stored_name(name, self.stored(0)) or name

    def adapted(self, number: int, name: str) -> str:
        """The stored tensor that a side's adapter changes."""
        side = self.sides[number]
        for index, holder in ((0, self.sides[0]), (number, side)):
            key = self.home(index, name)
            if key is None:
                form = "in packed, quantised form" if holder.quantisation else "under another name"
                raise DeraError(
                    f"{side.source.name} changes {name}, which {holder.base.name} stores {form} "
                    "(transformers converts it on load); that is not merged, decode exactly"
                )
            if holder.checkpoint.tensors[key].dtype not in REAL:
                kind = str(holder.checkpoint.tensors[key].dtype).removeprefix("torch.")
                raise DeraError(
                    f"{side.source.name} changes {name}, which {holder.base.name} stores quantised ({kind}); "
                    "merge onto the dense base instead"
                )
        return key

    def pieces(self, number: int) -> Pieces:
        """What a side's adapter does, by the names of θ(λ)."""
        side = self.sides[number]
        if side.adapter is None:
            return {}

        def read_base(name: str) -> torch.Tensor:
            return self.bases[number].whole(self.adapted(number, name))

        build = partial(empty_model, side.base.folder, self.trust)
        by_name = {}
        for name, pieces in side.adapter.bind(self.architecture, read_base, build).items():
            self.adapted(number, name)
            by_name[self.output_name(name)] = pieces
        return by_name

    def stay_one(self, number: int, name: str, owner: str, pieces: Pieces) -> bool:
        """Whether a tied tensor and its owner are still one on a side: stored as one, and changed alike if at all.

        Only the values say so: an adapter may change one end, or both by what is the same or is not.
        """
        keys = [self.home(number, end) for end in (name, owner)]
        if None in keys:  # both are, for each is the other's home; `match` says what is missing
            return True
        changes = [pieces.get(end, ()) for end in (name, owner)]
        if not any(changes) and keys[0] == keys[1]:
            return True
        infos = [self.stored(number)[key] for key in keys]
        if infos[0].shape != infos[1].shape or infos[0].dtype != infos[1].dtype:
            return False
        dtype = torch.float32 if any(changes) else infos[0].dtype
        digests = {self.digest(number, key, change, dtype) for key, change in zip(keys, changes, strict=True)}
        return len(digests) == 1

    def digest(self, number: int, key: str, pieces: Sequence[Piece], dtype: torch.dtype) -> bytes:
        """SHA-256 of a stored tensor with what an adapter does to it, in this dtype, a few rows at a time."""
        info, buffers, digest = self.stored(number)[key], Buffers(), hashlib.sha256()
        for start, stop in slices(info):
            rows = buffers.take("rows", (stop - start, *info.row_shape), dtype)
            self.bases[number].rows(key, start, stop, rows, buffers)
            for piece in pieces:
                piece.apply(rows, start, stop)
            if dtype == torch.float32:
                rows.add_(0.0)  # -0 and +0 are one value
            digest.update(as_bytes(rows))
        return digest.digest()


# Checks of what was matched


def _quantised_modules(ref: Side) -> frozenset[str]:
    stored = ref.checkpoint.tensors if ref.config.get("quantization_config") else {}
    return frozenset(name.rpartition(".")[0] for name, info in stored.items() if info.dtype not in REAL)


def _is_opaque(name: str, ref: TensorInfo, quantised_modules: frozenset[str]) -> bool:
    return ref.dtype not in REAL or name.rpartition(".")[0] in quantised_modules


def _check_tensor(
    name: str, sides: tuple[Side, Side], weights: tuple[Weights, Weights], quantised_modules: frozenset[str]
) -> None:
    """Raise DeraError where a tensor has two shapes, or is quantised and not the same on both sides."""
    ref, aligned = (side.info(name) for side in weights)
    if ref.shape != aligned.shape and not _is_padding(sides, ref, aligned):
        raise DeraError(
            f"tensor {name} is {list(ref.shape)} in {sides[0].base.name} and {list(aligned.shape)} in "
            f"{sides[1].base.name}; the two are not the same architecture"
        )
    if _is_opaque(name, ref, quantised_modules) or aligned.dtype not in REAL:
        same = ref.dtype == aligned.dtype and ref.shape == aligned.shape
        for start, stop in slices(ref) if same and ref is not aligned else ():
            rows = (side.stored.checkpoint.read(side.keys[name], start, stop) for side in weights)
            same = same and torch.equal(*rows)
        if not same:
            quantised = sides[0].quantisation or sides[1].quantisation
            reason = f"belongs to a quantised layer ({quantised})" if quantised else f"has dtype {ref.dtype}"
            raise DeraError(f"tensor {name} {reason} and differs between the two; θ_ref + λΔ needs dense weights")


def _is_padding(sides: tuple[Side, Side], ref: TensorInfo, aligned: TensorInfo) -> bool:
    """Whether it is a vocabulary matrix of which one side has more rows than the other."""
    sizes = [side.config.get("vocab_size") for side in sides]
    return ref.shape[1:] == aligned.shape[1:] and [ref.shape[0], aligned.shape[0]] == sizes
