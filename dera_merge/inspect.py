"""What a model is, how far two are apart, and what would stop a merge, read from the files alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .checkpoint import REAL, Checkpoint, slices, total_bytes
from .delta import Adapter
from .errors import DeraError
from .output import PARTIAL, RECIPE, read_recipe
from .pair import ModelPair, Source, load_config
from .path import Slice, layer_kind

# Where a moved weight lands, in ulps of the output dtype at θ_ref.
STEPS = ("unchanged", "<½", "½-1½", ">1½")
_MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}  # bits, the hidden one included


def describe(name: str, allow_pickle: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """What one argument is: a full checkpoint or an adapter, its size, dtypes, tokenizer, and where it was merged.

    Raises:
        DeraError: it cannot be found or read.
    """
    source = Source.locate(name, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    found: dict[str, Any] = {"name": name, "revision": source.revision}
    if (source.folder / PARTIAL).is_file():
        found["partial"] = True
    if source.is_adapter:
        adapter = Adapter(source.folder, allow_pickle)
        checkpoint = adapter.checkpoint
        found |= {"kind": "adapter", "adapter": adapter.kind, "base": adapter.base_name, "unmergeable": adapter.unmergeable}
    else:
        config = load_config(source)
        checkpoint = Checkpoint(source.folder, allow_pickle=allow_pickle)
        found |= {"kind": "full", "architecture": (config.get("architectures") or [None])[0],
                  "quantised": bool(config.get("quantization_config"))}  # fmt: skip
    infos = checkpoint.tensors.values()
    found |= {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos if info.dtype in REAL),
        "bytes": total_bytes(infos),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos}),
        "tokenizer": source.has_tokenizer(),
    }
    if (source.folder / RECIPE).is_file():
        written = read_recipe(source.folder)
        found["merged"] = {key: written.get(key) for key in ("ref", "aligned", "lambda", "rounding", "seed")}
    return found


def inspect_pair(
    pair: ModelPair, dtype: torch.dtype | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """How big Δ is beside θ_ref, per kind of layer, and how its weights move in ulps of the output dtype.

    Args:
        pair: the two models.
        dtype: the output dtype that ulps are counted in; None takes each tensor's dtype in REF.
        progress: called with (tensors read, tensors in all).

    Returns:
        `problem`: what stops a merge, or None. `layers`: kind → `relative` = ‖Δ‖/‖θ_ref‖, `weights`, and the share of
        weights in each of `STEPS`; `total`: the same for all of them.
    """
    try:
        tensors = pair.tensors
    except DeraError as error:
        return {"problem": str(error), "layers": {}, "total": None}
    sums: dict[str, torch.Tensor] = {}  # ‖Δ‖², ‖θ_ref‖², weights, then a count for each of STEPS
    for number, (name, info) in enumerate(tensors.items(), 1):
        kind = info.dtype if dtype is None else dtype
        for start, stop in slices(info) if info.dtype in REAL else ():
            row = sums.setdefault(layer_kind(name), torch.zeros(3 + len(STEPS), dtype=torch.float64))
            row += _moments(Slice.read(pair, name, start, stop, kind), kind)
        if progress:
            progress(number, len(tensors))

    def figures(row: torch.Tensor) -> dict[str, Any]:
        delta, ref, count, *steps = row.tolist()
        shares = {step: n / count for step, n in zip(STEPS, steps, strict=True)} if count else {}
        return {"relative": (delta / ref) ** 0.5 if ref else None, "weights": int(count), "steps": shares}

    layers = {kind: figures(row) for kind, row in sorted(sums.items())}
    problem = "ALIGNED's tokenizer has tokens that REF has no embedding for; only λ=1" if pair.new_tokens else None
    return {"problem": problem, "layers": layers, "total": figures(sum(sums.values(), torch.zeros(3 + len(STEPS))))}


def _moments(piece: Slice, dtype: torch.dtype) -> torch.Tensor:
    ref = piece.ref.double()
    delta = torch.zeros_like(ref) if piece.aligned is None else piece.aligned.double() - ref
    exponent = torch.frexp(ref.abs().clamp(min=torch.finfo(dtype).tiny)).exponent
    ulps = (delta.abs() / torch.ldexp(torch.ones_like(ref), exponent - _MANTISSA[dtype])).flatten()
    edges = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)
    steps = torch.bincount(torch.bucketize(ulps, edges, right=False).clamp(max=len(STEPS) - 1), minlength=len(STEPS))
    head = torch.stack([(delta**2).sum(), (ref**2).sum(), torch.tensor(float(ref.numel()), dtype=torch.float64)])
    return torch.cat([head, steps.double()])

