"""An adapter's side as PEFT computes it: W·x + s·B·(A·x), its low-rank sums beside the weights and not in them.

The two orders differ by what float32 rounds off W, which is large beside Δ: kl by about 1e-5, relatively.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from ..decoding.rows import add_product
from ..merging.parameters import Parameters
from ..merging.storage import Storage
from ..models.pair import Pair
from ..models.pieces import LowRank
from .traces import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sums = Mapping[str, Sequence[LowRank]]  # name of a linear layer → what is added to it


def unmerged(pair: Pair, number: int, model: PreTrainedModel) -> tuple[Parameters, Sums]:
    """The weights of a side, the reference (0) or an aligned model, float32, and the sums that are left out of them.

    Left out are sums on linear layers of the decoder; whatever else an adapter does is in the weights.

    Args:
        model: a hollow one of the pair.
    """
    part, _ = decoder_of(model)
    linear = {name for name, module in model.named_modules() if type(module) in (torch.nn.Linear, Conv1D)}
    sums: dict[str, Sequence[LowRank]] = {}
    apart = set()
    for name, pieces in pair.names.weights[number].pieces.items():
        group = pair.layout.group_of.get(name)
        if group is None or not group.is_renamed or not all(isinstance(piece, LowRank) for piece in pieces):
            continue
        module, _, last = group.targets[0].rpartition(".")
        if last == "weight" and module in linear and module.startswith(f"{part}."):
            sums[module] = pieces
            apart.add(name)
    weights = tuple(
        replace(side, pieces={name: pieces for name, pieces in side.pieces.items() if name not in apart})
        for side in pair.names.weights
    )
    names = replace(pair.names, weights=weights)
    return Parameters(pair, pair.ends()[number], Storage.of(names, torch.float32, None, 0), names=names), sums


@contextmanager
def added(model: torch.nn.Module, names: Iterable[str], sums: Sums, device: torch.device) -> Iterator[None]:
    """While this lasts, those of these layers that have sums add them to what they return."""
    hooks = []
    try:
        for name in names:
            if name in sums:
                module = model.get_submodule(name)
                down = torch.cat([piece.adapter.read_whole(piece.a).float() for piece in sums[name]])
                up = torch.cat([piece.scale * piece.adapter.read_whole(piece.b).float() for piece in sums[name]], 1)
                dtype = module.weight.dtype
                up = up.T.contiguous()  # as `LowRankRows` has it, for equal bits
                hooks.append(module.register_forward_hook(_adding(down.to(device, dtype), up.to(device, dtype))))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(down: torch.Tensor, up: torch.Tensor) -> Any:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        add_product(y, torch.nn.functional.linear(args[0], down), up)
        return y

    return hook
