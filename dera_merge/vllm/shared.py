"""An adapter and its base over one set of weights, in vLLM's layers.

The two models of such a pair are two trees of modules. `share` puts the reference's own layers into the aligned model's
tree; only attention stays apart, as each model has its own keys and values. `load_shared` then puts `W·x + scale·B·A·x`
where an adapter changes a layer. Which of vLLM's fused and sharded layers that is, and which part of it, the
architecture says itself, by where it wants to load the checkpoint's tensor; the layer's own loader cuts B, or A, for
this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, LinearMethodBase, RowParallelLinear
from vllm.model_executor.parameter import ModelWeightParameter

from ..errors import DeraError
from ..models.pair import Pair
from ..models.pieces import LowRank
from ..models.side import Side
from ..models.weights import Weights

Factors = tuple[torch.Tensor, torch.Tensor]  # A of this rank (r, in), B of this rank (out, r)


class LowRankMethod(LinearMethodBase):
    """How a layer computes that is another layer plus B·A."""

    def __init__(self, base: LinearBase, a: torch.Tensor, b: torch.Tensor) -> None:
        self.base, self.a, self.b = base, a, b

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("made of a layer that has its weights")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """The base is processed by itself."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.base.quant_method.apply(self.base, x, bias) + linear(linear(x, self.a), self.b)


def share(ref: nn.Module, aligned: nn.Module) -> None:
    """Put the layers of `ref` into `aligned`, which was built without memory, and give memory to the rest.

    Raises:
        DeraError: something is left without memory.
    """
    ref_modules = dict(ref.named_modules())
    for name, module in list(aligned.named_modules()):
        for child_name, child in list(module.named_children()):
            path = f"{name}.{child_name}".lstrip(".")
            if next(child.children(), None) is None and next(child.parameters(recurse=False), None) is not None:
                setattr(module, child_name, ref_modules[path])
    for name, module in aligned.named_modules():
        for target, source in (
            (module, ref_modules[name]),
            (getattr(module, "impl", None), getattr(ref_modules[name], "impl", None)),
        ):
            for tensors in (
                (vars(target), getattr(target, "_parameters", {}), getattr(target, "_buffers", {})) if target else ()
            ):
                for key, value in tensors.items():
                    if isinstance(value, torch.Tensor) and value.is_meta:
                        tensors[key] = _same(source, key)
    left = [name for name, tensor in (*aligned.named_parameters(), *aligned.named_buffers()) if tensor.is_meta]
    if left:
        raise DeraError(f"this architecture cannot be held once ({left[0]}); export the pair with --merge-adapter")


def _same(source: Any, key: str) -> torch.Tensor:
    """The reference's own parameter, or a copy of any other tensor."""
    value = getattr(source, key)
    return value if isinstance(value, nn.Parameter) else value.clone()


def load_shared(pair: Pair, ref: nn.Module, aligned: nn.Module) -> None:
    """Put the adapters of both sides into their trees.

    Raises:
        DeraError: an adapter changes something else than linear layers, or is no sum of B·A.
    """
    layers = dict(ref.named_modules())  # before any is replaced
    names = pair.names
    for side, weights, tree in zip(pair.sides, names.weights, (ref, aligned), strict=True):
        adapted_tensors = list(_low_rank(side, weights, names.unties))
        with _places(ref) as place:
            places = [place(weights.keys[name]) for name, _ in adapted_tensors]
        parts: dict[str, list[Factors]] = {}
        for (layer, shard), (_, terms) in zip(places, adapted_tensors, strict=True):
            for piece in terms:
                parts.setdefault(layer, []).append(_factors(layers[layer], piece, shard))
        for layer, factors in parts.items():
            adapted = copy.copy(layers[layer])
            a, b = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], 1)
            adapted.quant_method = LowRankMethod(layers[layer], a, b)
            parent, _, child = layer.rpartition(".")
            setattr(tree.get_submodule(parent), child, adapted)


def _low_rank(side: Side, weights: Weights, unties: bool) -> Iterator[tuple[str, Sequence[LowRank]]]:
    """The tensors that an adapter changes and their sums. Raises DeraError where one is more than B·A."""
    for name, pieces in weights.pieces.items():
        if unties or not all(isinstance(piece, LowRank) for piece in pieces):
            raise DeraError(
                f"{side.source.name} changes {name} by more than B·A on a linear layer, which cannot be held once; "
                "export the pair with --merge-adapter"
            )
        yield name, pieces


@contextmanager
def _places(model: nn.Module) -> Iterator[Callable[[str], tuple[str, Any]]]:
    """Gives a function: vLLM's layer into which a checkpoint's tensor is loaded, and which part fused in it."""
    loaded_into: list[tuple[str, Any]] = []
    weights = {layer: module.weight for layer, module in model.named_modules() if isinstance(module, LinearBase)}
    loaders = {layer: weight._weight_loader for layer, weight in weights.items()}

    def place(name: str) -> tuple[str, Any]:
        loaded_into.clear()
        model.load_weights([(name, torch.empty(0))])
        if len(loaded_into) != 1:
            raise DeraError(f"{name} is no linear layer here, which cannot be held once; export with --merge-adapter")
        return loaded_into[0][0], loaded_into[0][1] if len(loaded_into[0]) > 1 else None

    try:
        for layer, weight in weights.items():
            weight._weight_loader = lambda _, loaded, *shard, layer=layer: loaded_into.append((layer, *shard))
        yield place
    finally:
        for layer, weight in weights.items():
            weight._weight_loader = loaders[layer]


def _factors(layer: LinearBase, piece: LowRank, shard: Any) -> Factors:
    """A and scale·B of one part of a layer, cut for this rank; B is 0 for the other parts."""
    a = piece.adapter.read_whole(piece.a).float()
    b = piece.scale * piece.adapter.read_whole(piece.b).float()
    weight, extra = layer.weight, () if shard is None else (shard,)

    def cut(shape: tuple[int, int], whole: torch.Tensor) -> torch.Tensor:
        data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        part = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=weight.weight_loader)
        part.weight_loader(part, whole, *extra)
        return part.data

    if isinstance(layer, ColumnParallelLinear):
        b = cut((weight.shape[0], len(a)), b)
    elif isinstance(layer, RowParallelLinear):
        a = cut((len(a), weight.shape[1]), a)
    return a.to(weight), b.to(weight)
