"""θ_ref + λΔ from file to file: for every tensor, for every λ, read, blended, rounded, written.

No model is loaded. A directory becomes a model in one step at the very end, when its config.json appears; until then
`dera_merge.partial.json` says what it will be and which shards are done, so that an interrupted run can go on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import lambdas
from .checkpoint import (
    DTYPE_NAMES,
    REAL,
    ShardWriter,
    file_order,
    fsync_folder,
    json_bytes,
    load_json,
    sha256_of,
    slices,
    write_atomically,
)
from .errors import DeraError
from .pair import TOKENIZER_FILES, ModelPair, Side, warn
from .path import Slice, layer_kind, output_dtype
from .rounding import Rounding

RECIPE = "dera_merge.json"
PARTIAL = "dera_merge.partial.json"
SCHEMA = 1

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[int, int], None]


def merge(
    pair: ModelPair,
    out: str | os.PathLike[str],
    lams: Sequence[float],
    *,
    dtype: torch.dtype | str | None = "auto",
    rounding: Rounding | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write θ_ref + λΔ as ordinary checkpoints, all λ in one pass over the inputs.

    Args:
        pair: the two models.
        out: the directory of the one λ; with several, they go to `out/lambda-<λ>`.
        lams: finite λ; 0 is the reference, 1 the aligned model.
        dtype: of the output: `"auto"` (each tensor's dtype in REF), or a torch dtype or its name.
        rounding: `"stochastic"` (default for bfloat16 and float16 output) or `"nearest"`.
        seed: of the stochastic rounding.
        max_shard_size: bytes, or a text such as `"5GB"`.
        resume: go on with a partial output of the same call.
        overwrite: replace an output that dera-merge wrote.
        progress: called with (bytes of θ written, bytes in all).

    Returns:
        The directories, in the order of `lams`.

    Raises:
        DeraError: the pair cannot be merged, the output exists or touches an input, the disk is full, or an input
            breaks off. Nothing is left of an output that failed; an interrupted one stays, marked as partial.
    """
    lams = [float(lam) + 0.0 for lam in lams]
    lambdas.check_names(lams)
    source = pair
    if pair.new_tokens:
        if set(lams) != {1.0}:
            raise DeraError("ALIGNED's tokenizer has tokens that REF has no embedding for; only λ=1 can be merged")
        source = ModelPair(pair.aligned, pair.aligned)
    layout, rounding = output_layout(source, dtype, rounding)
    shards = _split(layout, max_shard_size)
    recipe = _recipe(pair, dtype, rounding, seed)
    inputs = _input_files(pair)
    plan = _fingerprint(recipe, shards, inputs)
    newest = max(changed for _, _, changed in inputs)

    root = Path(out).expanduser()
    folders = [root] if len(lams) == 1 else [root / lambdas.folder_name(lam) for lam in lams]
    for folder in [root, *folders]:
        if folder.exists() and not folder.is_dir():
            raise DeraError(f"{folder} is a file; give a directory as --output")
        _check_clear_of_inputs(folder, pair)
    if len(lams) > 1 and any((root / name).exists() for name in ("config.json", RECIPE, PARTIAL)):
        raise DeraError(f"{root} is a model itself; several λ need a directory of their own")
    outputs = [_Output(folder, lam, recipe, plan, shards) for folder, lam in zip(folders, lams, strict=True)]
    for output in outputs:
        output.check(resume, overwrite, newest)
    _check_space(root, _total_bytes(layout) * len(outputs))
    outputs = [output for output in outputs if not output.complete]
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        for output in outputs:
            output.begin(overwrite)
        _write_shards(source, outputs, shards, rounding, seed, progress)
        for output in outputs:
            output.finish(pair, source, dtype)
    except OSError as error:
        raise DeraError(f"writing {root} broke off: {error}; what is finished stays, go on with --resume") from error
    except DeraError:
        for output in outputs:
            output.discard()
        for folder in made:  # parents that this call made; the innermost comes first
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return folders


def output_layout(
    pair: ModelPair, dtype: torch.dtype | str | None, rounding: Rounding | None
) -> tuple[Layout, Rounding]:
    """The dtype and shape of each tensor of θ(λ), and the rounding to use where none was chosen."""
    wanted = _dtype(dtype)
    layout = {name: (output_dtype(info, wanted), info.shape) for name, info in pair.tensors.items()}
    narrow = any(kind in (torch.bfloat16, torch.float16) for kind, _ in layout.values())
    return layout, rounding or ("stochastic" if narrow else "nearest")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
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


def _write_shards(
    pair: ModelPair,
    outputs: list[_Output],
    shards: dict[str, Layout],
    rounding: Rounding,
    seed: int,
    progress: Progress | None,
) -> None:
    total, written = sum(map(_total_bytes, shards.values())), 0
    for file, names in shards.items():
        pending = [output for output in outputs if file not in output.done]
        writers = [ShardWriter(output.folder / file, names) for output in pending]
        tallies = [Tally() for _ in pending]
        try:
            for name in file_order(names) if pending else ():
                dtype, _ = names[name]
                for start, stop in slices(pair.tensors[name]):
                    piece = Slice.read(pair, name, start, stop, dtype)
                    for output, writer, tally in zip(pending, writers, tallies, strict=True):
                        value = piece.value(output.lam)
                        stored = piece.rounded(value, rounding, seed)
                        writer.write(stored)
                        tally.add(piece, value, stored)
                    if progress:
                        progress(written := written + stored.numel() * dtype.itemsize, total)
            for output, writer, tally in zip(pending, writers, tallies, strict=True):
                output.shard_done(file, writer.close(), tally)
        finally:
            for writer in writers:
                writer.abandon()


@dataclass
class Tally:
    """How much of λΔ the stored weights kept, per kind of layer; sums in float64, in the order of the file.

    Each row is ⟨stored-θ_ref, λΔ⟩, ‖λΔ‖², ‖stored-θ_ref-λΔ‖².
    """

    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, piece: Slice, value: torch.Tensor, stored: torch.Tensor) -> None:
        if piece.aligned is None:
            return
        # An infinity that both inputs hold has Δ = 0, though ∞ - ∞ is NaN; any other is refused before this.
        step = (value - piece.ref).double().nan_to_num()
        moved = (stored.double() - piece.ref.double()).nan_to_num()
        row = self.sums.setdefault(layer_kind(piece.name), [0.0, 0.0, 0.0])
        for index, product in enumerate((moved * step, step * step, (moved - step) ** 2)):
            row[index] += product.sum().item()

    def merge(self, sums: dict[str, list[float]]) -> None:
        for kind, row in sums.items():
            mine = self.sums.setdefault(kind, [0.0, 0.0, 0.0])
            self.sums[kind] = [a + b for a, b in zip(mine, row, strict=True)]

    def summary(self) -> dict[str, Any]:
        """`kept` = ⟨stored-θ_ref, λΔ⟩/‖λΔ‖² and `error` = ‖stored-θ_ref-λΔ‖/‖λΔ‖, null where λΔ = 0."""

        def ratios(row: list[float]) -> dict[str, float | None]:
            dot, square, error = row
            return {"kept": dot / square if square else None, "error": (error / square) ** 0.5 if square else None}

        overall = [sum(column) for column in zip(*self.sums.values(), strict=True)] or [0.0, 0.0, 0.0]
        return ratios(overall) | {"per_kind": {kind: ratios(row) for kind, row in sorted(self.sums.items())}}


@dataclass
class _Output:
    """The directory of one λ, from nothing through partial to complete."""

    folder: Path
    lam: float
    recipe: dict[str, Any]
    plan: str
    shards: dict[str, Layout]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # shard → its SHA-256 and Tally
    complete: bool = False
    resumed: bool = False

    def check(self, resume: bool, overwrite: bool, newest: int) -> None:
        """Look at what is there, write nothing; `newest` is the inputs' last change. Raises DeraError: not to be touched."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return
        partial, recipe = self.folder / PARTIAL, self.folder / RECIPE
        if resume and partial.is_file():
            state = load_json(partial)
            if not isinstance(state, dict) or state.get("plan") != self.plan or state.get("lambda") != self.lam:
                raise DeraError(f"{self.folder} was begun by another call or from other inputs; --overwrite starts afresh")
            self.done = {file: entry for file, entry in state["shards"].items() if self._is_intact(file, entry)}
            self.resumed = True
        elif resume and recipe.is_file():
            written = verify(self.folder)
            asked = {**self.recipe, "lambda": self.lam}
            shards = {name for name in written["files"] if name.endswith(".safetensors")}
            self.complete = shards == self.shards.keys() and all(written.get(key) == value for key, value in asked.items())
            if self.complete and newest > recipe.stat().st_mtime_ns:
                raise DeraError(f"an input has changed since {self.folder} was written; --overwrite merges anew")
        if self.resumed or self.complete:
            return
        if not overwrite:
            how = "--resume goes on with it, --overwrite starts afresh" if partial.is_file() else "--overwrite replaces it"
            raise DeraError(f"{self.folder} exists and is not empty; {how}, or give another --output")
        if not (partial.is_file() or recipe.is_file()):
            raise DeraError(f"{self.folder} was not written by dera-merge, so --overwrite does not touch it")
        if strange := sorted(path.name for path in self.folder.iterdir() if path.name not in self._ours()):
            raise DeraError(f"{self.folder} holds {strange[0]}, which dera-merge did not write; move it away first")

    def _is_intact(self, file: str, entry: dict[str, Any]) -> bool:
        return (self.folder / file).is_file() and sha256_of(self.folder / file) == entry["sha256"]

    def _ours(self) -> set[str]:
        names = {RECIPE, PARTIAL, "model.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES}
        for record in (RECIPE, PARTIAL):
            data = load_json(self.folder / record) if (self.folder / record).is_file() else None
            if isinstance(data, dict) and isinstance(files := data.get("files"), list | dict):
                names |= set(files)
        return names | {f"{name}.partial" for name in names}

    def begin(self, overwrite: bool) -> None:
        if overwrite and not self.resumed and self.folder.is_dir():
            self.discard()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def _save(self) -> None:
        state = {"plan": self.plan, "lambda": self.lam, "files": list(self.shards), "shards": self.done}
        write_atomically(self.folder / PARTIAL, json_bytes({"partial": "this is not a model yet", **state}))

    def shard_done(self, file: str, digest: str, tally: Tally) -> None:
        self.done[file] = {"sha256": digest, "sums": tally.sums}
        self._save()

    def finish(self, pair: ModelPair, source: ModelPair, dtype: torch.dtype | str | None) -> None:
        """Everything but the weights; config.json, which makes the directory a model, last."""
        files = {file: self.done[file]["sha256"] for file in self.shards}

        def write(name: str, content: bytes) -> None:
            files[name] = write_atomically(self.folder / name, content)

        if len(self.shards) > 1:
            weight_map = {name: file for file, names in self.shards.items() for name in names}
            size = sum(_total_bytes(names) for names in self.shards.values())
            write("model.safetensors.index.json", json_bytes(
                {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}))  # fmt: skip
        for origin in _companions(pair):
            write(origin.name, origin.read_bytes())
        config = dict(source.ref.config)
        config.pop("_name_or_path", None)
        if (wanted := _dtype(dtype)) is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(wanted).removeprefix("torch.")
        if source.unties:
            config["tie_word_embeddings"] = False
        content = json_bytes(config)
        files["config.json"] = hashlib.sha256(content).hexdigest()
        tally = Tally()
        for file in self.shards:
            tally.merge(self.done[file]["sums"])
        record = {**self.recipe, "lambda": self.lam, "statistics": tally.summary(), "files": files}
        write_atomically(self.folder / RECIPE, json_bytes(record))
        fsync_folder(self.folder)
        write_atomically(self.folder / "config.json", content)
        (self.folder / PARTIAL).unlink()
        fsync_folder(self.folder)

    def discard(self) -> None:
        """Remove what dera-merge wrote, and the directory if that leaves it empty."""
        if not self.folder.is_dir():
            return
        ours = self._ours()
        # config.json first: without it the rest is no model, whatever happens to this process next.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != "config.json"):
            if path.name in ours or path.name.removesuffix(".partial") in self.shards:
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def _total_bytes(layout: Layout) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())


def _companions(pair: ModelPair) -> list[Path]:
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


def _recipe(pair: ModelPair, dtype: torch.dtype | str | None, rounding: Rounding, seed: int) -> dict[str, Any]:
    def describe(side: Side) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": side.source.name, "revision": side.source.revision}
        if side.adapter:
            entry |= {"adapter": side.adapter.kind, "base": side.base.name, "base_revision": side.base.revision}
        return entry

    wanted = _dtype(dtype)
    return {
        "schema_version": SCHEMA,
        "ref": describe(pair.ref),
        "aligned": describe(pair.aligned),
        "path": "line",
        "dtype": "auto" if wanted is None else str(wanted).removeprefix("torch."),
        "rounding": rounding,
        "seed": seed,
        "versions": {name: _version(name) for name in ("dera-merge", "torch", "numpy")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _input_files(pair: ModelPair) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change (ns) of every weight file that the pair reads."""
    inputs = set()
    for side in (pair.ref, pair.aligned):
        checkpoints = [side.checkpoint] + ([side.adapter.checkpoint] if side.adapter else [])
        for checkpoint in checkpoints:
            for info in checkpoint.tensors.values():
                state = info.file.stat()
                inputs.add((info.file.name, state.st_size, state.st_mtime_ns))
    return sorted(inputs)


def _fingerprint(recipe: dict[str, Any], shards: dict[str, Layout], inputs: list[tuple[str, int, int]]) -> str:
    """What a resumed run must have in common with the run that it goes on with."""
    names = {file: [(n, DTYPE_NAMES[d], s) for n, (d, s) in layout.items()] for file, layout in shards.items()}
    return hashlib.sha256(json_bytes([recipe, names, inputs])).hexdigest()


def _check_clear_of_inputs(folder: Path, pair: ModelPair) -> None:
    place = folder.resolve()
    for side in (pair.ref, pair.aligned):
        for source in (side.source, side.base):
            if place == source.folder or source.folder.is_relative_to(place) or place.is_relative_to(source.folder):
                raise DeraError(f"the output {folder} is, holds or lies in the input {source.name}; give another --output")


def _check_space(root: Path, needed: int) -> None:
    place = root.resolve()
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < needed:
        raise DeraError(f"{root} needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there")


def read_recipe(folder: Path) -> dict[str, Any]:
    """dera_merge.json of a merged directory. Raises DeraError where there is none or it is not one of ours."""
    if not (folder / RECIPE).is_file():
        raise DeraError(f"{folder} holds no {RECIPE}; it was not written by dera-merge")
    recipe = load_json(folder / RECIPE)
    shape = {"ref": dict, "aligned": dict, "files": dict, "lambda": (int, float)}
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(key), kind) for key, kind in shape.items()):
        raise DeraError(f"{folder / RECIPE} is not one that dera-merge wrote")
    return recipe


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe of a merged directory, after checking that it is complete and its files are those that were written.

    Raises:
        DeraError: partial, not written by dera-merge, or changed since.
    """
    place = Path(folder)
    if (place / PARTIAL).is_file() and not (place / "config.json").is_file():
        raise DeraError(f"{place} is a partial merge; finish it with --resume")
    recipe = read_recipe(place)
    for name, digest in recipe["files"].items():
        if not (place / name).is_file() or sha256_of(place / name) != digest:
            raise DeraError(f"{place / name} is missing or has changed since it was merged; merge again")
    return recipe


__all__ = ["PARTIAL", "RECIPE", "Tally", "merge", "output_layout", "verify"]
