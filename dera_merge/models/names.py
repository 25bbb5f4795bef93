"""Which tensor of each side is which: matched once, and never changed.

Names differ between the sides where one stores a tied tensor twice, or leaves out the base model's prefix; and an
adapter speaks in names of modules in memory. `match` finds each tensor of θ(λ) on every side, or says why that cannot
be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import DeraError
from ..files.ahead import Source
from ..files.checkpoint import REAL, TensorInfo, slices
from .architecture import Architecture
from .damage import COPY
from .layout import Assembled
from .matching import match_two
from .pieces import Replacement
from .quantized import Requantised
from .side import Side
from .trust import NOTHING, Trust
from .weights import Stored, Weights


@dataclass(frozen=True, eq=False)
class Names:
    """The tensors of θ(λ), and where each side has them.

    Attributes:
        tensors: name → REF's tensor; the names, shapes and dtypes of θ(λ).
        weights: the effective weights of the reference, and then of each aligned model, by these names.
        unties: whether θ(λ) has two tensors where REF's config says that one is shared.
        vocabulary: rows of the vocabulary, where they are more than REF's base has; its tensors are as tall then.
        quantised_modules: modules of which REF stores a tensor that is no real numbers.
    """

    tensors: Mapping[str, TensorInfo]
    weights: tuple[Weights, ...]
    unties: bool
    quantised_modules: frozenset[str]
    vocabulary: int | None = None

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

    def sources(self, name: str) -> Iterator[Source]:
        """The stored tensors that θ(λ)'s is made of."""
        yield from self.ref.sources(name)
        for number, side in enumerate(self.weights[1:], 1):
            if self.differs(name, number):
                yield from side.sources(name)

    def adapts(self, name: str) -> bool:
        """Whether an adapter changes all of this tensor, so that losing the whole of it is a fault and not rounding."""
        pieces = [piece for side in self.weights for piece in side.pieces.get(name, ())]
        return any(not isinstance(piece, Replacement) for piece in pieces)


def match(
    sides: Sequence[Side], architecture: Callable[[], Architecture], base_quantization: str | None = None,
    trust: Trust = NOTHING, new_tokens: bool = False,
) -> Names:  # fmt: skip
    """Put the weights of a reference and its aligned models in correspondence.

    Args:
        sides: the reference, and each aligned model.
        architecture: makes REF's, where that is needed: checkpoints whose names agree need no model, not even an empty
            one, and building it takes seconds.
        base_quantization: what the adapters' base was quantised to in training; None where it was not.
        trust: what may be read and run of the files.
        new_tokens: whether rows of the vocabulary that only an aligned model has are tokens, not padding; then θ(λ) has
            them.

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
        match_two((ref, side), (bases[0], base), architecture, trust)
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
    weights = (first, *(weights for _, weights, _ in matches))
    tensors = {name: first.info(name) for name in first.keys}
    grown = _grown(tensors, weights if new_tokens else weights[:1])
    tensors |= {name: replace(tensors[name], shape=(rows, *tensors[name].row_shape)) for name, rows in grown.items()}
    unties = any(unties for _, _, unties in matches)
    return Names(tensors, weights, unties, quantised, max(grown.values(), default=None))


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


def _grown(tensors: Mapping[str, TensorInfo], sides: Sequence[Weights]) -> dict[str, int]:
    """Embeddings and head that some side has more rows of than REF's base, and how many.

    Raises:
        DeraError: one of them grew, and the rows of the other were not saved.
    """
    grown = {}
    for name, info in tensors.items():
        rows = max(weights.rows(name) for weights in sides if name in weights.keys)
        if rows > info.rows:
            grown[name] = rows
    for name, info in tensors.items() if grown else ():
        if name not in grown and COPY.search(name) and info.rows < max(grown.values()):
            taller, rows = next(iter(grown.items()))
            raise DeraError(f"{taller} has {rows} rows of the vocabulary, but {name} only {info.rows}; the others were "
                            "not saved with the adapter: merge it where it was trained (merge_and_unload)")  # fmt: skip
    return grown


def _requantised(side: Side, architecture: Architecture, kind: str) -> Requantised:
    """A side's linear layers as quantisation to `kind` and back leaves them."""
    if architecture.transposed:
        raise DeraError("--base-quantization does not know layers that store their weight transposed (Conv1D)")
    layout = architecture.layout(side.checkpoint.tensors)
    keys = {key for module in architecture.linear if (key := layout.key(f"{module}.weight"))}
    if odd := [key for key in keys if isinstance(key, Assembled)]:
        problem = f"layers that are stored in other shapes ({odd[0].tensors[0]})"
        raise DeraError(f"--base-quantization does not know {problem}")
    return Requantised(side.checkpoint, keys, kind)


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
        keys = [side.keys[name] for side in weights]
        same = ref.dtype == aligned.dtype and ref.shape == aligned.shape and all(isinstance(key, str) for key in keys)
        for start, stop in slices(ref) if same and ref is not aligned else ():
            rows = (side.stored.checkpoint.read(key, start, stop) for side, key in zip(weights, keys, strict=True))
            same = same and torch.equal(*rows)
        if not same:
            quantised = sides[0].quantisation or sides[1].quantisation
            reason = f"belongs to a quantised layer ({quantised})" if quantised else f"has dtype {ref.dtype}"
            raise DeraError(f"tensor {name} {reason} and differs between the two; θ_ref + λΔ needs dense weights")


def _is_padding(sides: tuple[Side, Side], ref: TensorInfo, aligned: TensorInfo) -> bool:
    """Whether it is a vocabulary matrix of which one side has more rows than the other."""
    sizes = [side.text.get("vocab_size") for side in sides]
    return ref.shape[1:] == aligned.shape[1:] and [ref.shape[0], aligned.shape[0]] == sizes
