"""A fingerprint that tells two pairs apart."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from ..files.checkpoint import DTYPE_NAMES, TensorInfo, sampled

if TYPE_CHECKING:
    from .pair import Pair
    from .side import Side


def fingerprint(pair: Pair) -> str:
    """SHA-256 over all sides: names, shapes and dtypes of all tensors, some bytes of each, and what scales an adapter.

    It reads three times 4 KiB of each tensor: enough to tell two training runs apart, at any size of model.
    """
    digest = hashlib.sha256(f"{pair.base_quantization or 'none'}\0".encode())
    for side in pair.sides:
        for label, content in _parts_of(side):
            digest.update(label.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()


def _parts_of(side: Side) -> list[tuple[str, bytes]]:
    """What is hashed of a side: (label, content)."""
    parts = [(name, _sampled(name, info)) for name, info in sorted(side.checkpoint.tensors.items())]
    for adapter in side.adapters:
        tensors = adapter.checkpoint.tensors
        parts += [(f"adapter {name}", _sampled(name, info)) for name, info in sorted(tensors.items())]
        parts.append(("config", json.dumps(adapter.settings, sort_keys=True).encode()))
    return parts


def _sampled(name: str, info: TensorInfo) -> bytes:
    """A tensor's name, dtype, shape, and some of its bytes."""
    return f"{name} {DTYPE_NAMES.get(info.dtype)} {info.shape}".encode() + sampled(info)
