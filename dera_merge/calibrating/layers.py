"""Linear layers that bend: a gain in the place of λ, and a low-rank curve."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from ..decoding.mix import shares_of
from ..decoding.rows import LowRankRows, MixedRows, Strength
from ..errors import DeraError
from ..measuring.traces import padded
from ..merging.path import Part, along
from ..models.pair import Pair
from .lessons import Lesson

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AXES = 64  # directions of a layer's input that are scaled one by one
EVENED = 0.5  # how much of the differences of their variances is evened out, as a power: 0 nothing, 1 all
RIDGE = 0.01  # share of their mean variance; any smaller variance is taken to be that
SINKS = 4  # first tokens of a text, left out: their huge activations would rule all measurements


@dataclass(frozen=True)
class Evener:
    """A linear map W for vectors x that vary far more in some directions: the variance of W·x is more even, its mean 1.

    Attributes:
        axes: the directions of the largest variances, (size, n), orthonormal.
        stretch: the factor of each of these relative to `unit`, less 1, (n,).
        unit: the factor of all other directions.
    """

    axes: torch.Tensor
    stretch: torch.Tensor
    unit: torch.Tensor

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Evener:
        """From a sample of vectors (count, size), any float dtype."""
        vectors = vectors.float()
        total = vectors.square().sum(0).mean() / len(vectors)  # mean variance, of one direction
        _, sigma, axes = torch.svd_lowrank(vectors, q=min(AXES + 8, *vectors.shape), niter=2)
        sigma, axes = sigma[:AXES], axes[:, :AXES]
        variances = sigma.square() / len(vectors)
        others = len(axes) - len(sigma)
        rest = (total * len(axes) - variances.sum()) / others if others else variances.min()
        floor = (RIDGE * total).clamp(min=1e-30)
        rest, variances = rest.clamp(min=floor), variances.clamp(min=floor)
        scale = (rest / variances) ** (EVENED / 2)
        unit = ((scale.square() * variances).sum() + others * rest).div(len(axes)).rsqrt()
        return cls(axes, scale - 1, unit)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows·W, (rows, size)."""
        return (rows + (rows @ self.axes * self.stretch) @ self.axes.T) * self.unit


class Bent(torch.nn.Module):
    """A linear layer of `decoding/rows.py` with a gain in the place of λ, and a low-rank curve.

    Args:
        module: its name in the model.
        inner: `LowRankRows`, or `MixedRows` of linear layers.
        strength: λ of the rows.
        rank: of the curve; 0 leaves it out.

    Attributes:
        evener: evens out the layer's inputs; the right factor of the curve is `down` in its coordinates.
        scale: what Δ adds to the output, root mean square.
    """

    def __init__(self, module: str, inner: LowRankRows | MixedRows, strength: Strength, rank: int) -> None:
        super().__init__()
        self.module = module
        self.inner = inner
        self.strength = strength
        inner.strength = _Gained(self)
        into, out = _sizes(inner)
        self.gain = torch.nn.Parameter(torch.zeros(2))
        self.down = torch.nn.Parameter(torch.randn(rank, into) / math.sqrt(into))
        self.up = torch.nn.Parameter(torch.zeros(out, rank))
        self.profile = torch.nn.Parameter(torch.zeros(rank, 2))
        self.evener: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
        self.scale = 1.0

    @property
    def rank(self) -> int:
        """Of the curve."""
        return len(self.down)

    def gains(self) -> torch.Tensor:
        """g(λ) of the rows, (rows,)."""
        lam = self.strength.rows
        c, d = self.gain
        return lam + lam * (1 - lam) * (c + d * lam)

    def right(self) -> torch.Tensor:
        """The right factor of the curve, (rank, in)."""
        return self.evener(self.down)

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        """Δ·x: the layer's output as the aligned model's, less its output as the reference's."""
        ends = []
        for fill in (torch.zeros, torch.ones):
            with self.strength.of(fill(len(self.strength.rows), device=x.device), self.strength.tokens):
                ends.append(self.inner(x))
        return ends[1] - ends[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.strength.rows is None or not self.rank:
            return y
        right = self.right()
        t = torch.nn.functional.linear(x.to(right.dtype), right)
        t = t * self.strength.spread(along(self.profile, self.strength.rows), t)
        return y + torch.nn.functional.linear(t, self.up).to(y.dtype)


class _Gained:
    """Stands in for the `Strength` of a bent layer's inner module, with the gains g(λ) in the place of λ."""

    sides = 0  # rows have a λ each

    def __init__(self, layer: Bent) -> None:
        self._layer = layer

    @property
    def rows(self) -> torch.Tensor | None:
        return None if self._layer.strength.rows is None else self._layer.gains()

    @property
    def shares(self) -> torch.Tensor:
        return shares_of(self._layer.gains())

    def spread(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self._layer.strength.spread(rows, values)


def _sizes(inner: LowRankRows | MixedRows) -> tuple[int, int]:
    """The sizes of a linear layer's input and output."""
    if isinstance(inner, LowRankRows):
        return inner.down.shape[1], inner.up.shape[1]
    weight = inner.ref.weight
    base = inner.ref.get_base_layer() if hasattr(inner.ref, "get_base_layer") else inner.ref
    return tuple(weight.shape) if isinstance(base, Conv1D) else (weight.shape[1], weight.shape[0])


def bendable(pair: Pair) -> dict[str, str]:
    """Linear modules that Δ changes → the name of their weight in θ(λ). Raises DeraError where there are none."""
    names = {}
    for module in pair.architecture.linear:
        name = pair.layout.name(f"{module}.weight")
        if name is not None and not pair.names.is_same(name):
            names[module] = name
    if not names:
        raise DeraError("no linear layer differs between the two; there is no path to learn")
    return names


def bend(student: PreTrainedModel, names: dict[str, str], rank: int, device: str | torch.device) -> dict[str, Bent]:
    """Put a `Bent` on each of these modules; returns them by the name of their weight."""
    layers = {}
    for module, name in names.items():
        inner = student.get_submodule(module)
        if isinstance(inner, LowRankRows | MixedRows):
            layers[name] = Bent(module, inner, student.dera_strength, rank).to(device)
            student.set_submodule(module, layers[name])
    return layers


@torch.no_grad()
def measure(student: PreTrainedModel, layers: dict[str, Bent], lessons: Sequence[Lesson]) -> None:
    """Set each layer's evener and scale: the straight line reads these texts, all in one batch."""
    texts = [lesson.text for lesson in lessons]
    ids, mask = padded(texts, student.device)
    lam = torch.tensor([lesson.lam for lesson in lessons], device=student.device)
    kept = mask.bool()
    if ids.shape[1] > SINKS:
        kept[:, :SINKS] = False
    last: list[Any] = [None, None]  # an input and its evener: queries, keys and values have one input

    def look(layer: Bent, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if last[0] is not args[0]:
            last[:] = args[0], Evener.of(args[0][kept])
        layer.evener = last[1]
        layer.scale = float(layer.moved(args[0])[kept].float().square().mean().sqrt())

    hooks = [layer.register_forward_hook(look) for layer in layers.values()]
    try:
        read_states(student, ids, mask, lam)
    finally:
        for hook in hooks:
            hook.remove()


def learned(pair: Pair, layers: dict[str, Bent]) -> dict[str, Part]:
    """What the layers have learned, by tensor of θ(λ)."""
    parts: dict[str, Part] = {}
    for name, layer in layers.items():
        parts[name] = _part(layer, layer.module in pair.architecture.transposed)
        bias = pair.layout.name(f"{layer.module}.bias")
        if bias is not None and not pair.names.is_same(bias):  # the gain is that of the whole layer
            parts[bias] = Part(parts[name].gain)
    return parts


def _part(layer: Bent, transposed: bool) -> Part:
    """What one layer has learned; `transposed`: its weight is stored as (in, out)."""
    gain, up, down, profile = (
        value.detach().float().cpu() for value in (layer.gain, layer.up, layer.right(), layer.profile)
    )
    if not layer.rank:
        return Part(gain)
    return Part(gain, down.T.contiguous(), up.T.contiguous(), profile) if transposed else Part(gain, up, down, profile)


def read_states(student: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, lams: torch.Tensor) -> torch.Tensor:
    """Last hidden states of these texts (texts, tokens, hidden size), each at its own λ (texts,)."""
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(student.base_model.forward).parameters:
        # Positions of every row, not of one for all: learned position embeddings differ between rows with λ.
        inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    with student.dera_strength.of(lams, ids.shape[1]):
        return student.base_model(**inputs)[0]
