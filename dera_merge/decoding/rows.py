"""One set of weights, an adapter strength for each row of the batch.

Reference and aligned models over one base differ in what an adapter adds. So one forward pass can serve all of them, or
many λ: each row (sequence) of the batch has a strength s_k for each aligned model, and an adapted module gives

    y = W·x + Σ s_k·(scale_k·B_k·A_k·x)                     low-rank sums
    y = (1-Σ s_k)·reference(x) + Σ s_k·aligned_k(x)         other adapters (DoRA, …) of linear layers, embeddings, norms

s = 0 is the reference, s_k = 1 alone the k-th aligned model, and s = λ is θ_ref + Σ λ_k·Δ_k, because the modules that
adapters change are linear in their weights. The base weights are read once for all rows. Exact decoding, whose rows are
each one side's alone, need not multiply: each side adds its own to its own rows.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import DeraError
from ..models import doors
from .mix import shares_of

_REGROUPED = "this model regroups its tokens between layers, so that rows of a batch cannot have a λ each"


class Strength(threading.local):
    """The strengths of the forward pass that this thread is in.

    They are None outside of a pass, where modules act as the aligned model's (of several, the first's).
    """

    rows: torch.Tensor | None = None  # (rows,); with several aligned models (rows, models)
    shares: torch.Tensor | None = None  # of the reference and each aligned model in a row, (rows, 1 + models)
    sides: int = 0  # instead of these: how many equal blocks the rows are, each of one side's rows alone
    count: int = 0  # rows
    tokens: int = 0  # of each row, in this pass

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Strength, ()  # a copied model begins outside of any pass

    def of(self, rows: torch.Tensor, tokens: int) -> AbstractContextManager[None]:
        """Strengths (rows,) or (rows, models) for one forward pass over (rows, tokens) ids; then those of before."""
        return self._in_pass(rows, shares_of(rows), 0, len(rows), tokens)

    def each(self, sides: int, count: int, tokens: int) -> AbstractContextManager[None]:
        """The same for rows that are the reference's, then the aligned model's (or models'): `sides` equal blocks.

        No strength is multiplied: each side computes its own rows, the reference's as if nothing else were there.
        """
        return self._in_pass(None, None, sides, count, tokens)

    @contextmanager
    def _in_pass(self, *now: Any) -> Iterator[None]:
        before = self.rows, self.shares, self.sides, self.count, self.tokens
        self.rows, self.shares, self.sides, self.count, self.tokens = now
        try:
            yield
        finally:
            self.rows, self.shares, self.sides, self.count, self.tokens = before

    def blocks(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A module's values, (rows, …) or (rows·tokens, n), of each side's rows.

        Raises:
            DeraError: as for `spread`.
        """
        if len(values) != self.count and not (values.ndim == 2 and len(values) == self.count * self.tokens):
            raise DeraError(_REGROUPED)
        size = len(values) // self.sides
        return tuple(values[start : start + size] for start in range(0, len(values), size))

    def spread(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Numbers by row, in a shape that multiplies a module's values.

        Args:
            rows: (rows,), or (rows, n) for each row and place on the last axis.
            values: (rows, tokens, …) or (rows·tokens, n).

        Raises:
            DeraError: the model regroups its tokens (experts do), so that rows cannot be told apart.
        """
        rows = (rows[:, None] if rows.ndim == 1 else rows).to(values.device)
        if values.ndim > 2 and len(values) == len(rows):
            return rows.view(len(rows), *[1] * (values.ndim - 2), -1)
        if values.ndim == 2 and len(values) == len(rows) * self.tokens:
            return rows.repeat_interleave(self.tokens, 0)
        raise DeraError(_REGROUPED)


class LowRankRows(torch.nn.Module):
    """A linear layer with low-rank sums: the reference's own (strength 1-Σs), if any, and the aligned ones' (s).

    Args:
        base: the layer that all sides share, quantised or not.
        factors: (A (rank, in), scale·B (out, rank)) or None of the reference and of each aligned model.
    """

    def __init__(
        self,
        base: torch.nn.Module,
        factors: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
        strength: Strength,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.strength = strength
        pairs = [pair for pair in factors if pair]
        self.register_buffer("down", torch.cat([a for a, _ in pairs]).to(dtype), persistent=False)
        self.register_buffer("up", torch.cat([b for _, b in pairs], 1).T.contiguous().to(dtype), persistent=False)
        self.ranks = [0 if pair is None else len(pair[0]) for pair in factors]  # of each side
        # The side that each rank belongs to; None where all are the one aligned model's, so that each has its strength.
        sides = [number for number, rank in enumerate(self.ranks) for _ in range(rank)]
        plain = len(factors) == 2 and 0 not in sides
        side_of = None if plain else torch.tensor(sides, device=self.down.device)
        self.register_buffer("side_of", side_of, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.strength.sides:
            downs, ups = self.down.split(self.ranks), self.up.split(self.ranks)
            for rows, own, down, up in zip(self.strength.blocks(x), self.strength.blocks(y), downs, ups, strict=True):
                if len(down):
                    add_product(own, torch.nn.functional.linear(rows.to(down.dtype), down), up)
            return y
        t = torch.nn.functional.linear(x.to(self.down.dtype), self.down)
        if self.strength.rows is not None:
            by_rank = self.strength.rows if self.side_of is None else self.strength.shares.to(t.device)[:, self.side_of]
            s = self.strength.spread(by_rank, t)
            t = (t * s).to(t.dtype)
        elif self.side_of is not None:
            t = t * (self.side_of == 1)
        add_product(y, t, self.up)
        return y


def add_product(y: torch.Tensor, t: torch.Tensor, up: torch.Tensor) -> None:
    """y += t·up, in one kernel: y (…, out), t (…, rank), up (rank, out)."""
    y.view(-1, y.shape[-1]).addmm_(t.flatten(0, -2).to(y.dtype), up.to(y.dtype))


class MixedRows(torch.nn.Module):
    """A linear layer, embedding or norm that differs between the sides: (1-Σs)·reference(x) + Σ s_k·aligned_k(x)."""

    def __init__(self, ref: torch.nn.Module, aligned: Sequence[torch.nn.Module], strength: Strength) -> None:
        super().__init__()
        self.ref = ref
        self.aligned = torch.nn.ModuleList(aligned)
        self.strength = strength

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self.strength.sides:
            sides = zip((self.ref, *self.aligned), self.strength.blocks(x), strict=True)
            return torch.cat([side(rows, *args, **kwargs) for side, rows in sides])
        if self.strength.rows is None:
            return self.aligned[0](x, *args, **kwargs)
        mixed: torch.Tensor | float = 0.0
        for share, side in zip(self.strength.shares.unbind(1), (self.ref, *self.aligned), strict=True):
            y = side(x, *args, **kwargs)
            mixed = mixed + self.strength.spread(share, y) * y
        return mixed.to(y.dtype)

    def __getattr__(self, name: str) -> object:
        """What a model asks of the module itself (`embed_tokens.padding_idx`, say) is the reference's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("ref"), name)


def in_rows(base: PreTrainedModel, ref: PreTrainedModel, *aligned: PreTrainedModel) -> PreTrainedModel | None:
    """Models over one set of base weights as one model with strengths for each row.

    Args:
        base: the plain base model.
        ref, aligned: `base`, or PEFT's model of it with an adapter unmerged, sharing the base's storages; one aligned
            model or several.

    Returns:
        A model of the same class that shares all weights and acts as the aligned one, with its `Strength` as
        `model.dera_strength`, and as `model.dera_sees_apart` whether sides differ outside of the text decoder and its
        head; None where rows cannot be told apart: mixtures of experts regroup their tokens, and of
        modules that differ only those are mixed that are linear in their weights and do nothing but map their input.
    """
    if any("expert" in name for name, _ in base.named_modules()):
        return None
    strength = Strength()
    model = second_tree(base)

    def walk(name: str, base: torch.nn.Module, sides: list[torch.nn.Module]) -> bool:
        """Put rows where the sides differ; False where that cannot be done."""
        sides = [_trained_whole(side) for side in sides]
        if all(_same(base, side) for side in sides):
            return True
        if (low_rank := _low_rank(base, sides, strength, model.dtype)) is not None:
            model.set_submodule(name, low_rank)
            return True
        if (
            {type(side) for side in sides} == {type(base)}
            and list(base.children())
            and not list(base.parameters(False))
        ):
            return all(
                walk(f"{name}.{c}", m, [side.get_submodule(c) for side in sides]) for c, m in base.named_children()
            )
        if not (isinstance(base, torch.nn.Linear | torch.nn.Embedding | Conv1D) or "Norm" in type(base).__name__):
            return False  # attention or a state-space layer, say: it has a cache, or methods besides forward
        if isinstance(base, torch.nn.Linear) and len({getattr(side, "out_features", None) for side in sides}) > 1:
            return False  # heads over vocabularies of different sizes
        model.set_submodule(name, MixedRows(sides[0], sides[1:], strength))
        return True

    if not all(walk(c, m, [side.get_submodule(c) for side in (ref, *aligned)]) for c, m in base.named_children()):
        return None
    model.dera_strength = strength
    text = {id(module) for end in (base.get_decoder(), base.get_output_embeddings()) if end is not None
            for module in end.modules()}  # fmt: skip
    ours = (name for name, module in model.named_modules() if isinstance(module, LowRankRows | MixedRows))
    model.dera_sees_apart = not all(id(base.get_submodule(name)) in text for name in ours)
    return model.eval()


def _trained_whole(module: torch.nn.Module) -> torch.nn.Module:
    """What stands in PEFT's wrapper of a module that was trained whole; any other module as it is."""
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
        doors.check("adapters", module)
        return module.modules_to_save[module.active_adapters[0]]
    return module


def second_tree(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules can be replaced, over the same layers (quantised ones hold more) and tensors."""
    leaves = [module for module in model.modules() if not list(module.children())]
    return copy.deepcopy(model, memo={id(leaf): leaf for leaf in (*leaves, *model.parameters(), *model.buffers())})


def _same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether two modules are built alike over the same storages."""
    if [type(m) for m in first.modules()] != [type(m) for m in second.modules()]:
        return False
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(p.data_ptr() == q.data_ptr() and p.shape == q.shape for p, q in pairs)


def _low_rank(
    base: torch.nn.Module, sides: Sequence[torch.nn.Module], strength: Strength, dtype: torch.dtype
) -> LowRankRows | None:
    """A layer with every side's low-rank sum; None where a side is anything else."""
    factors = []
    for side in sides:
        if _same(base, side):
            factors.append(None)
        elif (side_factors := _factors(side)) and _same(base, side.get_base_layer()):
            factors.append(side_factors)
        else:
            return None
    return LowRankRows(base, factors, strength, dtype)


def _factors(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(A, scale·B) of a PEFT layer that is nothing but W·x + scale·B·A·x, else None; of stacked adapters, all ranks."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return None
    doors.check("adapters", layer)
    pairs = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            if name in layer.lora_embedding_A:
                return None
            continue  # of stacked adapters, one that leaves this layer alone
        if layer.lora_variant.get(name) or layer.lora_bias.get(name):
            return None
        if not all(type(part[name]) is torch.nn.Linear for part in (layer.lora_A, layer.lora_B)):
            return None
        pairs.append((layer.lora_A[name].weight.detach(), layer.scaling[name] * layer.lora_B[name].weight.detach()))
    return (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)) if pairs else None
