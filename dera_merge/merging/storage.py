"""How θ(λ) is stored: dtypes, rounding, shards."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import DeraError
from ..files.checkpoint import REAL
from ..models.names import Names
from .rounding import NARROW, Rounding

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def total_bytes(layout: Layout) -> int:
    """Bytes of all tensors of a layout."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())


@dataclass(frozen=True)
class Storage:
    """How θ(λ) is stored; `of` makes one from what users type.

    Attributes:
        dtype: of all real tensors; None keeps each tensor's dtype in REF.
        rounding: see `rounding.round_to`.
        seed: of stochastic rounding.
        allow_nonfinite: store NaN and infinity where θ(λ) is that, instead of raising.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = "nearest"
    seed: int = 0
    allow_nonfinite: bool = False

    @classmethod
    def of(
        cls, names: Names, dtype: torch.dtype | str | None, rounding: Rounding | None, seed: int = 0,
        allow_nonfinite: bool = False,
    ) -> Storage:  # fmt: skip
        """From a dtype or its name, and a rounding: default stochastic where a tensor of θ(λ) has 16 bits.

        Raises:
            DeraError: it is no dtype to store weights in.
        """
        storage = cls(parse_dtype(dtype), rounding or "nearest", seed, allow_nonfinite)
        narrow = any(kind in NARROW for kind, _ in storage.layout(names).values())
        return replace(storage, rounding="stochastic") if rounding is None and narrow else storage

    def dtype_of(self, names: Names, name: str) -> torch.dtype:
        """What a tensor is stored as: REF's dtype where that is to be kept, or the tensor is opaque."""
        in_ref = names.tensors[name].dtype
        return in_ref if self.dtype is None or names.is_opaque(name) else self.dtype

    def layout(self, names: Names) -> Layout:
        """The dtype and shape of each tensor of θ(λ)."""
        return {name: (self.dtype_of(names, name), info.shape) for name, info in names.tensors.items()}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype to store weights in from its name; None for `"auto"`. Raises DeraError for any other."""
    if isinstance(dtype, torch.dtype) or dtype is None:
        return dtype
    if dtype == "auto":
        return None
    named = getattr(torch, dtype, None)
    if named not in REAL:
        raise DeraError(f"{dtype!r} is not a dtype to store weights in; use auto, float32, float16 or bfloat16")
    return named


def split_into_shards(layout: Layout, max_shard_size: int | str) -> dict[str, Layout]:
    """The layout of each weight file, by its name.

    Args:
        layout: of all tensors.
        max_shard_size: bytes, or a text such as `"5GB"`.

    Raises:
        DeraError: `max_shard_size` is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in layout.items()}
    try:
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise DeraError(f"{max_shard_size!r} is not a shard size such as 5GB: {error}") from error
    return {file: {name: layout[name] for name in names} for file, names in split.filename_to_tensors.items()}
