"""θ_ref + λΔ from file to file: for every tensor, for every λ, read, blended, rounded, written.

No model is loaded. `_write_shards` is the whole way of a tensor; `path.Slice` is the arithmetic, `output.Output` the
directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .checkpoint import REAL, Buffers, ShardWriter, file_order, slices
from .curve import Curve, fingerprint, opened
from .errors import DeraError
from .lambdas import Lam
from .output import RECIPE, Layout, Output, Tally, open_outputs, read_recipe, total_bytes, writing
from .pair import TOKENIZER_FILES, ModelPair, Side, warn
from .path import Sums, output_dtype, stored_rows
from .pipeline import in_order
from .rounding import NARROW, Rounding

SCHEMA = 2

Progress = Callable[[int, int], None]


def merge(
    pair: ModelPair,
    out: str | os.PathLike[str],
    lams: Sequence[float | Sequence[float]],
    *,
    dtype: torch.dtype | str | None = "auto",
    rounding: Rounding | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    shard: tuple[int, int] | None = None,
    path: str | os.PathLike[str] | Curve | None = None,
    report: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write θ_ref + λΔ as ordinary checkpoints, all λ in one pass over the inputs.

    Args:
        pair: the two models.
        out: the directory of the one λ; with several, they go to `out/lambda-<λ>`.
        lams: finite λ; 0 is the reference, 1 the aligned model. With several aligned models, a number for each.
        dtype: of the output: `"auto"` (each tensor's dtype in REF), or a torch dtype or its name.
        rounding: `"stochastic"` (default for bfloat16 and float16 output) or `"nearest"`.
        seed: of the stochastic rounding.
        max_shard_size: bytes, or a text such as `"5GB"`.
        resume: go on with a partial output of the same call.
        overwrite: replace an output that dera-merge wrote.
        allow_nonfinite: store NaN and infinity where θ(λ) is that, and count them, instead of raising.
        shard: `(i, n)`, 1 ≤ i ≤ n: write the i-th of n shares of the weight files. The n calls, on one host or several
            with a common disk, write one output; whichever ends last completes it.
        path: a path that `calibrate` learned, or its file, in the place of the straight line.
        report: a report of `compare` on this pair; λ outside of what it calls safe are warned of.
        progress: called with (bytes of θ written, bytes in all).

    Returns:
        The directories, in the order of `lams`. With `shard`, they are models once all shares are there.

    Raises:
        DeraError: the pair cannot be merged, the output exists or touches an input, the disk is full, an input breaks
            off, or a change that is not zero would be rounded away whole. Nothing is left of an output that failed; an
            interrupted one stays, marked as partial.
    """
    lams = pair.known(lams)
    if shard and not (1 <= shard[0] <= shard[1]):
        raise DeraError(f"--shard {shard[0]}/{shard[1]} is not a share; give i/n with 1 ≤ i ≤ n")
    if shard and overwrite:
        raise DeraError("--shard does not go with --overwrite: one process would remove what another writes")
    source, curve = pair, opened(path, pair, lams)
    if report is not None:
        warn_of_unsafe(pair, lams, report, curve)
    if pair.new_tokens:
        if set(lams) != {1.0} or pair.others:
            raise DeraError("ALIGNED's tokenizer has tokens that REF has no embedding for; only λ=1 can be merged")
        source = ModelPair(pair.aligned, pair.aligned, base_quantization=pair.base_quantization)
    layout, rounding = output_layout(source, dtype, rounding)
    shards = _split(layout, max_shard_size)
    share = list(shards)[shard[0] - 1 :: shard[1]] if shard else list(shards)

    wanted = parse_dtype(dtype)
    recipe = describe_pair(pair, curve) | {
        "dtype": "auto" if wanted is None else str(wanted).removeprefix("torch."), "rounding": rounding, "seed": seed,
        "allow_nonfinite": allow_nonfinite,
    }  # fmt: skip
    together = shard is not None
    outputs = open_outputs(pair, out, lams, recipe, shards, resume=resume, overwrite=overwrite, together=together)
    with writing(outputs, overwrite=overwrite, together=together) as pending:
        for output in pending:
            output.look(share)
        if pending:
            _write_shards(source, pending, share, rounding, seed, allow_nonfinite, curve, progress)
        beside = companions(pair) if pending else []
        for output in pending:
            if output.all_done() and (not together or output.claim()):
                output.finish("config.json", _config(source, wanted), beside)
    return [output.folder for output in outputs]


def warn_of_unsafe(pair: ModelPair, lams: Sequence[Lam], report: str | os.PathLike[str], curve: Curve | None) -> None:
    """Warn of λ that lie outside of every stretch that a report calls safe.

    Raises:
        DeraError: the report is of another pair, or of another path.
    """
    from .fidelity import Report

    found = Report.load(report)
    if found.settings.get("fingerprint") != fingerprint(pair):
        raise DeraError(f"{report} is a report of another pair, or of other weights; compare this one")
    measured = (found.settings.get("path") or {}).get("sha256")
    if measured != (curve.sha256 if curve else None):
        raise DeraError(f"{report} measured {'another' if measured else 'no'} path; compare with the --path that you merge")
    stretches = found.safe_stretches()
    for lam in lams:
        if lam not in (0.0, 1.0) and not any(low <= lam <= high for low, high in stretches):
            safe = ", ".join(f"{low:g} to {high:g}" if low < high else f"{low:g}" for low, high in stretches) or "nowhere"
            warn(f"λ={lam:g} lies outside of what {report} calls safe ({safe})")


def _write_shards(
    pair: ModelPair, outputs: list[Output], files: Sequence[str], rounding: Rounding, seed: int, allow_nonfinite: bool,
    curve: Curve | None, progress: Progress | None,
) -> None:  # fmt: skip
    sizes = {file: total_bytes(outputs[0].shards[file]) for file in files}
    before = 0
    for file in files:
        pending = [output for output in outputs if file not in output.done]
        if pending:
            tell = (lambda done, before=before: progress(before + done, sum(sizes.values()))) if progress else None
            _write_shard(pair, pending, file, rounding, seed, allow_nonfinite, curve, tell)
        before += sizes[file]


def _write_shard(
    pair: ModelPair, outputs: list[Output], file: str, rounding: Rounding, seed: int, allow_nonfinite: bool,
    curve: Curve | None, tell: Callable[[int], None] | None,
) -> None:  # fmt: skip
    names, lams = outputs[0].shards[file], [output.lam for output in outputs]

    def work(task: tuple[str, int, int], scratch: Buffers, kept: Buffers) -> list[tuple[torch.Tensor, Sums | None]]:
        dtype, _ = names[task[0]]
        return stored_rows(pair, *task, lams, dtype, rounding, seed, scratch, kept, allow_nonfinite, curve)

    writers = [ShardWriter(output.folder / file, names) for output in outputs]
    tallies = [Tally() for _ in outputs]
    tasks = [(name, start, stop) for name in file_order(names) for start, stop in slices(pair.tensors[name])]
    written = 0
    try:
        for (name, _, stop), results in zip(tasks, in_order(tasks, work), strict=True):
            for output, writer, tally, (stored, sums) in zip(outputs, writers, tallies, results, strict=True):
                writer.begin(stored)
                if sums:
                    tally.add(name, sums)
                    if stop == pair.tensors[name].rows and not tally.tensor_done() and pair.adapts(name):
                        raise DeraError(_nothing_left(name, output.lam, rounding))
            for writer in writers:
                writer.settle()  # the next result may lie in the same memory
            written += results[0][0].nbytes
            if tell:
                tell(written)
        for output, writer, tally in zip(outputs, writers, tallies, strict=True):
            output.shard_done(file, writer.close(), tally)
    finally:
        for writer in writers:
            writer.abandon()


def _nothing_left(name: str, lam: float, rounding: Rounding) -> str:
    way_out = "--rounding stochastic keeps it on average" if rounding == "nearest" else "--dtype float32 keeps it"
    return f"at λ={lam:g} nothing of the change of {name} survives rounding, the output would be the reference; {way_out}"


def output_layout(
    pair: ModelPair, dtype: torch.dtype | str | None, rounding: Rounding | None
) -> tuple[Layout, Rounding]:
    """The dtype and shape of each tensor of θ(λ), and the rounding to use where none was chosen."""
    wanted = parse_dtype(dtype)
    layout = {
        name: (info.dtype if pair.is_opaque(name) else output_dtype(info, wanted), info.shape)
        for name, info in pair.tensors.items()
    }
    narrow = any(kind in NARROW for kind, _ in layout.values())
    return layout, rounding or ("stochastic" if narrow else "nearest")


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


def _split(layout: Layout, max_shard_size: int | str) -> dict[str, Layout]:
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


def _config(pair: ModelPair, dtype: torch.dtype | None) -> dict[str, Any]:
    config = dict(pair.ref.config)
    config.pop("_name_or_path", None)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if pair.unties:
        config["tie_word_embeddings"] = False
    return config


def companions(pair: ModelPair) -> list[Path]:
    """The files that go beside the weights, as they are."""
    found: list[Path] = []
    if pair.generation_folder:
        found.append(pair.generation_folder / "generation_config.json")
    try:
        found += [path for name in TOKENIZER_FILES if (path := pair.tokenizer_folder / name).is_file()]
    except DeraError:
        warn("neither side brings a tokenizer; the output has none")
    if pair.trust_remote_code:
        found += sorted(pair.ref.base.folder.glob("*.py"))
    return found


def describe_pair(pair: ModelPair, curve: Curve | None = None) -> dict[str, Any]:
    """What `dera_merge.json` says of the inputs and of the program."""

    def describe(side: Side) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": side.source.name, "revision": side.source.revision}
        if (side.source.folder / RECIPE).is_file():  # a merge of a merge
            made = read_recipe(side.source.folder)
            entry["merge"] = {"lambda": made["lambda"], **{key: made[key].get("name") for key in ("ref", "aligned")}}
        if side.adapter:
            entry |= {"adapter": side.adapter.kind, "base": side.base.name, "base_revision": side.base.revision}
        return entry

    return {
        "schema_version": SCHEMA,
        "ref": describe(pair.ref),
        "aligned": describe(pair.aligned),
        **({"others": [describe(other.aligned) for other in pair.others]} if pair.others else {}),
        "fingerprint": fingerprint(pair),
        "base_quantization": None if pair.base_quantization == "none" else pair.base_quantization,
        "path": curve.describe() if curve else "line",
        "versions": {name: _version(name) for name in ("dera-merge", "torch", "numpy", "numba")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
