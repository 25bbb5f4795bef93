"""The directory of one λ, from nothing through partial to complete, by one process or by several together.

While it is partial, `dera_merge.partial.json` says what it will be, and each finished weight file has a record beside
it (`<file>.done`), written after the file is safe on disk. The directory becomes a model in one step at the very end,
when its config appears.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import lambdas
from ..errors import DeraError, warn
from ..files.atomic import fsync_folder, json_bytes, load_json, sha256_of, write_atomically
from ..files.checkpoint import DTYPE_NAMES
from ..files.room import alone, check_space
from ..models.pair import Pair
from ..models.source import GENERATION, PROCESSOR_FILES, TOKENIZER_FILES
from .parts import output_name
from .recipe import CONFIGS, PARTIAL, RECIPE, verify
from .storage import Layout, total_bytes
from .tally import Tally, doubt

LOCK = "dera_merge.finishing"


@dataclass
class Output:
    """One directory to be written.

    Attributes:
        folder: where.
        lam: λ.
        recipe: what `dera_merge.json` says of how it was made, λ and statistics left out.
        plan: a fingerprint of the recipe, the layout and the input files: what a resumed run must have in common.
        shards: weight file → its tensors.
        done: weight files that are finished → their records.
        complete: the directory holds the whole result already.
        joined: another call or process has begun it, and this one goes on with it.
    """

    folder: Path
    lam: lambdas.Lam
    recipe: dict[str, Any]
    plan: str
    shards: dict[str, Layout]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False
    joined: bool = False

    def check(self, resume: bool, overwrite: bool, newest: int, together: bool) -> None:
        """Look at what is in the directory and set `joined` or `complete`; write nothing.

        Args:
            resume, overwrite: as for `merge`.
            newest: the inputs' last change.
            together: several processes write this directory, so that a partial one of the same plan is ours.

        Raises:
            DeraError: what is there is not to be touched.
        """
        if self._is_free():
            return
        partial, recipe = self.folder / PARTIAL, self.folder / RECIPE
        if (resume or together) and partial.is_file():
            state = load_json(partial)
            begun = (state.get("plan"), lambdas.loaded(state.get("lambda"))) if isinstance(state, dict) else None
            if begun != (self.plan, self.lam):
                raise DeraError(
                    f"{self.folder} was begun by another call or from other inputs; --overwrite starts afresh"
                )
            self.joined = True
        elif (resume or together) and recipe.is_file():
            written = verify(self.folder)
            asked = {**self.recipe, "lambda": self.lam}
            shards = {name for name in written["files"] if name.endswith(".safetensors")}
            self.complete = shards == self.shards.keys() and all(
                written.get(key) == value for key, value in asked.items()
            )
            if self.complete and newest > recipe.stat().st_mtime_ns:
                raise DeraError(f"an input has changed since {self.folder} was written; --overwrite merges anew")
        if self.joined or self.complete:
            return
        if not overwrite:
            remedy = (
                "--resume goes on with it, --overwrite starts afresh"
                if partial.is_file()
                else "--overwrite replaces it"
            )
            raise DeraError(f"{self.folder} exists and is not empty; {remedy}, or give another --output")
        if not (partial.is_file() or recipe.is_file()):
            raise DeraError(f"{self.folder} was not written by dera-merge, so --overwrite does not touch it")
        if strange := sorted({path.name for path in self.folder.iterdir()} - {path.name for path in self._our_files()}):
            raise DeraError(f"{self.folder} holds {strange[0]}, which dera-merge did not write; move it away first")

    def _is_free(self) -> bool:
        """Whether nothing is there, or files under temporary names alone, which another process begins or died with."""
        return not self.folder.exists() or all(path.name.endswith(".partial") for path in self.folder.iterdir())

    def look_again(self, overwrite: bool) -> None:
        """Raises DeraError where another run has come in between `check` and the lock."""
        if not (self.folder / PARTIAL).is_file() if self.joined else not (overwrite or self._is_free()):
            raise DeraError(f"another run has written to {self.folder} meanwhile; look at it before you go on")

    def _our_files(self) -> list[Path]:
        """What lies in the directory and was written by dera-merge."""
        names = {
            RECIPE,
            PARTIAL,
            LOCK,
            *CONFIGS,
            "model.safetensors.index.json",
            GENERATION,
            *TOKENIZER_FILES,
            *PROCESSOR_FILES,
        }
        for record in (RECIPE, PARTIAL):
            data = load_json(self.folder / record) if (self.folder / record).is_file() else None
            if isinstance(data, dict) and isinstance(files := data.get("files"), list | dict):
                names |= set(files)
        names |= self.shards.keys()
        paths = self.folder.iterdir()
        return [path for path in paths if path.name.removesuffix(".done") in names or path.name.endswith(".partial")]

    def begin(self, overwrite: bool) -> None:
        """Make the directory, marked as partial."""
        if overwrite and not self.joined and self.folder.is_dir():
            self.discard()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.joined:
            state = {"plan": self.plan, "lambda": self.lam, "files": list(self.shards)}
            write_atomically(self.folder / PARTIAL, json_bytes({"partial": "this is not a model yet", **state}))

    def look(self, files: Sequence[str]) -> None:
        """Find which of these weight files are finished; each is hashed, since a broken disk or copy must not pass."""
        for file in files:
            record = self._record(file)
            if record and (self.folder / file).is_file() and sha256_of(self.folder / file) == record["sha256"]:
                self.done[file] = record

    def _record(self, file: str) -> dict[str, Any] | None:
        """What is written beside a finished weight file; None where it is not finished."""
        place = self.folder / f"{file}.done"
        return load_json(place) if place.is_file() else None

    def shard_done(self, file: str, digest: str, tally: Tally) -> None:
        """Record that a weight file is finished: its SHA-256, and what became of λΔ in it."""
        self.done[file] = {"sha256": digest, **tally.record()}
        write_atomically(self.folder / f"{file}.done", json_bytes(self.done[file]))

    def all_done(self) -> bool:
        """Whether every weight file is finished, by this process or, going by their records, by others."""
        for file in self.shards.keys() - self.done.keys():
            if record := self._record(file):
                self.done[file] = record
        return self.shards.keys() == self.done.keys()

    def claim(self) -> bool:
        """Whether this process is the one that finishes: of several that find all files done, the first."""
        try:
            os.close(os.open(self.folder / LOCK, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except FileNotFoundError:  # the directory was finished and is someone else's by now
            return False
        return (self.folder / PARTIAL).is_file()

    def finish(
        self,
        config_name: str,
        config: dict[str, Any],
        companions: Mapping[str, bytes],
        statistics: dict[str, Any] | None = None,
    ) -> None:
        """Write everything but the weights; the config, which makes the directory a model, last.

        Args:
            config_name: `config.json` or `adapter_config.json`.
            config: its content.
            companions: what lies beside the weights: name → content.
            statistics: what `dera_merge.json` says of the weights; default: what became of λΔ.

        Raises:
            DeraError: Δ is not zero, and the output would be the reference all the same.
        """
        files = {file: self.done[file]["sha256"] for file in self.shards}

        def write(name: str, content: bytes) -> None:
            files[name] = write_atomically(self.folder / name, content)

        if len(self.shards) > 1:
            weight_map = {name: file for file, names in self.shards.items() for name in names}
            size = sum(map(total_bytes, self.shards.values()))
            write("model.safetensors.index.json", json_bytes(
                {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}))  # fmt: skip
        for name, companion in companions.items():
            write(name, companion)
        content = json_bytes(config)
        files[config_name] = hashlib.sha256(content).hexdigest()
        tally = Tally()
        for file in self.shards:
            tally.merge(self.done[file])
        if reason := tally.why_reference(self.lam):
            raise DeraError(reason)
        kept = tally.summary()
        if said := doubt(kept["kept"], kept["error"], self.recipe["rounding"], self.lam):
            warn(said)
        record = {**self.recipe, "lambda": self.lam, "statistics": statistics or kept, "files": files}
        write_atomically(self.folder / RECIPE, json_bytes(record))
        fsync_folder(self.folder)
        write_atomically(self.folder / config_name, content)
        for path in self.folder.iterdir():
            if path.name.endswith((".partial", ".done")):
                path.unlink()
        (self.folder / LOCK).unlink(missing_ok=True)
        (self.folder / PARTIAL).unlink()
        fsync_folder(self.folder)

    def discard(self) -> None:
        """Remove what dera-merge wrote, and the directory if that leaves it empty; one behind a link stays."""
        if not self.folder.is_dir():
            return
        # The config first: without it the rest is no model, whatever happens to this process next. The records of what
        # dera-merge wrote go last.
        for path in sorted(self._our_files(), key=_place_in_removal):
            path.unlink()
        if not (self.folder.is_symlink() or any(self.folder.iterdir())):
            self.folder.rmdir()


def open_outputs(
    pair: Pair, out: str | os.PathLike[str], lams: Sequence[lambdas.Lam], recipe: dict[str, Any],
    shards: dict[str, Layout], *, resume: bool, overwrite: bool, together: bool = False,
) -> list[Output]:  # fmt: skip
    """The output of each λ, after every check that can be made before the first byte is written.

    Args:
        pair: whose files are read.
        out: the directory of the one λ; with several, they go to `out/lambda-<λ>`.
        lams: λ of each output.
        recipe, shards: as in `Output`.
        resume, overwrite, together: as for `Output.check`.

    Raises:
        DeraError: the output is not to be touched, or would touch an input; or the disk has no room.
    """
    inputs = _input_files(pair)
    plan = _fingerprint(recipe, shards, inputs)
    newest = max(changed for _, _, changed in inputs)
    root = Path(out).expanduser()
    folders = [root] if len(lams) == 1 else [root / output_name(lam, recipe["path"]) for lam in lams]
    for folder in [root, *folders]:
        if folder.exists() and not folder.is_dir():
            raise DeraError(f"{folder} is a file; give a directory as --output")
        check_clear_of_inputs(folder, pair)
    if len(lams) > 1 and any((root / name).exists() for name in (*CONFIGS, RECIPE, PARTIAL)):
        raise DeraError(f"{root} is a model itself; several λ need a directory of their own")
    outputs = [Output(folder, lam, recipe, plan, shards) for folder, lam in zip(folders, lams, strict=True)]
    for output in outputs:
        output.check(resume, overwrite, newest, together)
    check_space(root, sum(map(total_bytes, shards.values())) * len(outputs))
    return outputs


@contextmanager
def writing(outputs: Sequence[Output], *, overwrite: bool, together: bool = False) -> Iterator[list[Output]]:
    """Begin what is not complete yet, and leave nothing half-written that could be taken for a result.

    Other runs are kept out, unless they write shares of the same. A broken disk or an interrupt leaves what is
    finished, marked as partial; broken input leaves nothing.
    """
    pending = [output for output in outputs if not output.complete]
    with ExitStack() as locks:
        for output in pending:
            locks.enter_context(alone(output.folder, shared=together))
            if not together:
                output.look_again(overwrite)
        with _broken_off(outputs, pending, together):
            for output in pending:
                output.begin(overwrite)
            yield pending


@contextmanager
def _broken_off(outputs: Sequence[Output], pending: Sequence[Output], together: bool) -> Iterator[None]:
    """Leave of an error what may stay."""
    try:
        yield
    except OSError as error:
        place = outputs[0].folder
        raise DeraError(f"writing {place} broke off: {error}; what is finished stays, go on with --resume") from error
    except DeraError:
        if not together:  # others may be at work in the same directory
            for output in pending:
                output.discard()
        raise


def _place_in_removal(path: Path) -> int:
    """Sorts files into the order in which they are removed."""
    return -1 if path.name in CONFIGS else 1 if path.name in (RECIPE, PARTIAL) else 0


def _fingerprint(recipe: dict[str, Any], shards: dict[str, Layout], inputs: list[tuple[str, int, int]]) -> str:
    """What a resumed run must have in common with the run that it goes on with."""
    names = {file: [(n, DTYPE_NAMES[d], s) for n, (d, s) in layout.items()] for file, layout in shards.items()}
    return hashlib.sha256(json_bytes([recipe, names, inputs])).hexdigest()


def _input_files(pair: Pair) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change (ns) of every weight file that the pair reads."""
    inputs = set()
    for side in pair.sides:
        for checkpoint in side.checkpoints:
            for file in {info.file for info in checkpoint.tensors.values()}:
                state = file.stat()
                inputs.add((file.name, state.st_size, state.st_mtime_ns))
    return sorted(inputs)


def check_clear_of_inputs(folder: Path, pair: Pair) -> None:
    """Raises DeraError where `folder` is, holds or lies in a directory that is read."""
    place = folder.resolve()
    for side in pair.sides:
        for source in (side.source, side.base):
            if place == source.folder or source.folder.is_relative_to(place) or place.is_relative_to(source.folder):
                raise DeraError(
                    f"the output {folder} is, holds or lies in the input {source.name}; give another --output"
                )
