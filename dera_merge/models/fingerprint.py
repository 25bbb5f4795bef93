"""A fingerprint that tells two pairs apart."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from ..files.checkpoint import DTYPE_NAMES, TensorInfo

if TYPE_CHECKING:
    from .pair import Pair
    from .side import Side

_SAMPLE = 4096  # bytes, from the beginning, the middle and the end of each tensor


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
    if side.adapter:
        tensors = side.adapter.checkpoint.tensors
        parts += [(f"adapter {name}", _sampled(name, info)) for name, info in sorted(tensors.items())]
        irrelevant = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
        config = {key: value for key, value in side.adapter.config.items() if key not in irrelevant}
        parts.append(("config", json.dumps(config, sort_keys=True).encode()))
    return parts


def _sampled(name: str, info: TensorInfo) -> bytes:
    """A tensor's name, dtype, shape, and some of its bytes."""
    head = f"{name} {DTYPE_NAMES.get(info.dtype)} {info.shape}".encode()
    with info.file.open("rb") as stream:
        for start in sorted({0, max(0, info.nbytes // 2 - _SAMPLE // 2), max(0, info.nbytes - _SAMPLE)}):
            stream.seek(info.offset + start)
            head += stream.read(min(_SAMPLE, info.nbytes - start))
    return head
