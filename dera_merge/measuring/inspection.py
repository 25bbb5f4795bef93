"""What a model is, how far two are apart, and what would stop a merge, read from the files alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ..errors import DeraError
from ..files.buffers import Buffers
from ..files.checkpoint import REAL, Checkpoint, slices, total_bytes
from ..merging.parts import rules_of
from ..merging.recipe import FIGURES, PARTIAL, RECIPE, read_recipe
from ..merging.storage import Storage
from ..merging.tally import ENOUGH, NO_CHANGE, doubt
from ..merging.theta import Slice, Sums
from ..models.adapter import Adapter
from ..models.layout import Key
from ..models.names import layer_kind
from ..models.pair import Pair
from ..models.source import Source, load_config
from ..models.trust import Trust
from ..models.weights import Stored
from .layouts import described
from .report import Report

# Where a moved weight lands, in ulps of the output dtype at θ_ref.
STEPS = ("unchanged", "<½", "½-1½", ">1½")
_MANTISSA = {
    torch.bfloat16: 8,
    torch.float16: 11,
    torch.float32: 24,
    torch.float64: 53,
}  # bits, the hidden one included


def describe(name: str, allow_pickle: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """What one model is: a checkpoint or an adapter, its size, dtypes, tokenizer, how it was made and measured.

    Of a checkpoint also `layout` and `works`, see `layouts`.

    Args:
        name: a directory or a Hub id.
        allow_pickle, trust_remote_code: what the user allows.

    Raises:
        DeraError: it cannot be found or read.
    """
    source = Source.locate(name, trust=Trust(allow_pickle, trust_remote_code))
    facts: dict[str, Any] = {"name": name, "revision": source.revision}
    if (source.folder / PARTIAL).is_file():
        facts["partial"] = True
    if source.is_adapter:
        adapter = Adapter(source.folder, allow_pickle)
        checkpoint = adapter.checkpoint
        facts |= {
            "kind": "adapter",
            "adapter": adapter.kind,
            "base": adapter.base_name,
            "unmergeable": adapter.unmergeable,
        }
    else:
        config = load_config(source)
        checkpoint = Checkpoint(source.folder, allow_pickle=allow_pickle)
        facts |= {"kind": "full", "architecture": (config.get("architectures") or [None])[0],
                  "quantised": bool(config.get("quantization_config")),
                  **described(source, config, checkpoint.tensors, Trust(allow_pickle, trust_remote_code))}  # fmt: skip
    infos = checkpoint.tensors.values()
    facts |= {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos if info.dtype in REAL),
        "bytes": total_bytes(infos),
        "dtypes": sorted({str(info.dtype).removeprefix("torch.") for info in infos}),
        "tokenizer": source.has_tokenizer(),
    }
    if (source.folder / RECIPE).is_file():
        written = read_recipe(source.folder)
        facts["merged"] = {key: written.get(key) for key in ("ref", "aligned", "others", "lambda", "rounding", "seed")}
        if rules := rules_of(written.get("path")):
            facts["merged"]["lambda_for"] = rules
        if (source.folder / FIGURES).is_file():  # published with a report
            row = Report.load(source.folder / FIGURES).at(written["lambda"])
            facts["fidelity"] = {key: row.get(key) for key in ("kl", "kl_ci", "tv", "top1", "captured", "verdict")}
    return facts


def inspect_pair(
    pair: Pair,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    merged: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """How big Δ is beside θ_ref, how its weights move in ulps of the output dtype, and what a merge at λ=1 keeps of it.

    Args:
        pair: the two models.
        dtype: the output dtype that ulps are counted in; None takes each tensor's dtype in REF.
        progress: called with (tensors read, tensors in all).
        merged: a checkpoint that some tool has merged at λ=1, to be checked against base and adapter.

    Returns:
        `problem`: what stops a merge, or None. `layers`: kind → `relative` = ‖Δ‖/‖θ_ref‖, `weights`, and the share of
        weights in each of `STEPS`; `total`: the same for all of them, and what is `kept` and the `error`. `tensors`:
        for each one with Δ ≠ 0, `kept` = ⟨stored-θ_ref, Δ⟩/‖Δ‖² and `error` = ‖stored-θ_aligned‖/‖Δ‖ of `merged`, or of
        what `merge` would store at λ=1; `lost`: those of which less than `ENOUGH` is kept or that `merged` lacks.
        `doubt`: what `merge` would say of its output, or None.

    Raises:
        DeraError: `merged` cannot be read or is another architecture.
    """
    try:
        names = pair.names
    except DeraError as error:
        return {"problem": str(error), "layers": {}, "total": None, "tensors": {}, "lost": [], "doubt": None}
    other, places = None, {}
    if merged is not None:
        source = Source.locate(merged, trust=pair.trust)
        other = Stored(Checkpoint(source.folder, allow_pickle=pair.trust.pickle))
        places = _places(pair, other)
    storage = Storage.of(names, dtype, None)
    sums: dict[str, torch.Tensor] = {}  # ‖Δ‖², ‖θ_ref‖², weights, then a count for each of STEPS
    kept: dict[str, Sums] = {}
    buffers = Buffers()
    for number, (name, info) in enumerate(names.tensors.items(), 1):
        kind = info.dtype if dtype is None else dtype
        key = places.get(name)
        for start, stop in slices(info) if not names.is_opaque(name) else ():
            row = sums.setdefault(layer_kind(name), torch.zeros(3 + len(STEPS), dtype=torch.float64))
            piece = Slice.read(names, name, start, stop, storage, buffers)[0]
            row += _moments(piece, kind)
            if other is None and piece.aligned is not None:
                piece.at(1.0, sums=kept.setdefault(name, Sums()))
            elif other is not None and key is not None:
                rows = torch.empty((stop - start, *info.row_shape), dtype=other.info(key).dtype)
                other.rows(key, start, stop, rows, buffers)
                kept.setdefault(name, Sums()).add(piece.against(rows))
        if other is not None and key is None and not names.is_same(name):
            kept[name] = Sums(square=1.0, error=1.0)  # `merged` lacks it, so nothing of Δ is kept
        if progress:
            progress(number, len(names.tensors))

    def figures(row: torch.Tensor) -> dict[str, Any]:
        delta, ref, count, *steps = row.tolist()
        shares = {step: n / count for step, n in zip(STEPS, steps, strict=True)} if count else {}
        return {"relative": (delta / ref) ** 0.5 if ref else None, "weights": int(count), "steps": shares}

    def survival(row: Sums) -> dict[str, float]:
        return {"kept": row.cross / row.square, "error": (row.error / row.square) ** 0.5}

    changed = {name: survival(row) for name, row in kept.items() if row.square}
    lost = [name for name, row in changed.items() if row["kept"] < ENOUGH]
    lost += [name for name, row in kept.items() if not row.square and row.error]  # changed where nothing should be
    layers = {kind: figures(row) for kind, row in sorted(sums.items())}
    problem = None
    if pair.brings_tokens and pair.new_tokens == "refuse":
        problem = "ALIGNED's tokenizer has tokens that REF has no embedding for; only λ=1, or --new-tokens aligned"
    total, together = figures(sum(sums.values(), torch.zeros(3 + len(STEPS)))), Sums()
    for row in kept.values():
        if row.weights:
            together.add(row)
    said = None
    if together.square:
        total |= survival(together)
        said = None if merged is not None else doubt(total["kept"], total["error"], storage.rounding, 1.0)
    elif not pair.brings_tokens:
        problem = NO_CHANGE
    return {"problem": problem, "layers": layers, "total": total, "tensors": changed, "lost": lost, "doubt": said}


def _places(pair: Pair, other: Stored) -> dict[str, Key]:
    """Where a checkpoint that another tool wrote has the tensors of θ(λ); those that it lacks are not there."""
    places: dict[str, Key] = {name: name for name in pair.tensors if name in other.checkpoint.tensors}
    if len(places) < len(pair.tensors):  # it may have them in another layout
        layout = pair.architecture.layout(other.checkpoint.tensors)
        for name in [name for name in pair.tensors if name in pair.layout.group_of and name not in places]:
            if (key := layout.of_another(pair.layout, name, {})) is not None:
                places[name] = key
    for name, key in places.items():
        if (shape := other.info(key).shape) != pair.tensors[name].shape:
            folder, expected = other.checkpoint.folder, list(pair.tensors[name].shape)
            raise DeraError(f"{folder} has {name} of shape {list(shape)}, expected {expected}")
    return places


def _moments(piece: Slice, dtype: torch.dtype) -> torch.Tensor:
    """‖Δ‖², ‖θ_ref‖², the number of weights, and how many are in each of `STEPS`; float64, (3 + len(STEPS),)."""
    ref = piece.ref.double()
    delta = torch.zeros_like(ref) if piece.aligned is None else piece.aligned.double() - ref
    exponent = torch.frexp(ref.abs().clamp(min=torch.finfo(dtype).tiny)).exponent
    ulps = (delta.abs() / torch.ldexp(torch.ones_like(ref), exponent - _MANTISSA[dtype])).flatten()
    edges = torch.tensor([0.0, 0.5, 1.5], dtype=torch.float64)
    steps = torch.bincount(torch.bucketize(ulps, edges, right=False).clamp(max=len(STEPS) - 1), minlength=len(STEPS))
    head = torch.stack([(delta**2).sum(), (ref**2).sum(), torch.tensor(float(ref.numel()), dtype=torch.float64)])
    return torch.cat([head, steps.double()])
