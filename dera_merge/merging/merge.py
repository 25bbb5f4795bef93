"""θ_ref + λΔ from file to file: for every tensor, for every λ, read, blended, rounded, written.

No model is loaded. `_write_shard` takes a tensor all the way; `theta.Slice` is the arithmetic, `output.Output` the
directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import DeraError
from ..files.buffers import Buffers
from ..files.checkpoint import slices
from ..files.ordered import in_order
from ..files.shards import ShardWriter, file_order
from ..models.names import Names
from ..models.pair import Pair
from ..progress import Count
from .companions import companions, config_of, generation_file
from .output import Output, open_outputs, writing
from .path import Course, opened
from .recipe import describe_pair
from .rounding import Rounding
from .storage import Storage, split_into_shards, total_bytes
from .tally import Tally
from .theta import Sums, stored_rows


def merge(
    pair: Pair,
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
    path: str | os.PathLike[str] | Course | None = None,
    progress: Count | None = None,
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
        path: a path that `calibrate` learned, or its file, in the place of the straight line; or `parts.ByPart`.
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
    course = opened(path, pair, lams)
    used = {lam: course.used(lam) if course else {lam} for lam in lams}
    pair.check_tokens(set().union(*used.values()))
    storage = Storage.of(pair.names, dtype, rounding, seed, allow_nonfinite)
    shards = split_into_shards(storage.layout(pair.names), max_shard_size)
    share = list(shards)[shard[0] - 1 :: shard[1]] if shard else list(shards)

    recipe = describe_pair(pair, course) | {
        "dtype": "auto" if storage.dtype is None else str(storage.dtype).removeprefix("torch."),
        "rounding": storage.rounding, "seed": seed, "allow_nonfinite": allow_nonfinite,
    }  # fmt: skip
    together = shard is not None
    outputs = open_outputs(pair, out, lams, recipe, shards, resume=resume, overwrite=overwrite, together=together)
    whose = [min(used[lam]) if len(used[lam]) == 1 else None for lam in lams]  # None: several λ in one model
    endings = [pair.ending(lam, say=not output.complete) for lam, output in zip(whose, outputs, strict=True)]
    beside = companions(pair)
    with writing(outputs, overwrite=overwrite, together=together) as pending:
        for output in pending:
            output.look(share)
        if pending:
            _write_shards(pair.names, pending, share, storage, course, progress)
        for output, end in zip(outputs, endings, strict=True):
            if output in pending and output.all_done() and (not together or output.claim()):
                config = config_of(pair, end, storage.dtype)
                output.finish("config.json", config, beside | generation_file(end))
    return [output.folder for output in outputs]


def _write_shards(
    names: Names,
    outputs: list[Output],
    files: Sequence[str],
    storage: Storage,
    course: Course | None,
    progress: Count | None,
) -> None:
    """Write these weight files, one after another, to the outputs that lack them."""
    sizes = {file: total_bytes(outputs[0].shards[file]) for file in files}
    before = 0
    for file in files:
        pending = [output for output in outputs if file not in output.done]
        if pending:
            tell = (lambda done, before=before: progress(before + done, sum(sizes.values()))) if progress else None
            _write_shard(names, pending, file, storage, course, tell)
        before += sizes[file]


def _write_shard(
    names: Names,
    outputs: list[Output],
    file: str,
    storage: Storage,
    course: Course | None,
    tell: Callable[[int], None] | None,
) -> None:
    """Write one weight file of all outputs; `tell` is called with the bytes of it that are written."""
    layout, lams = outputs[0].shards[file], [output.lam for output in outputs]

    def work(task: tuple[str, int, int], scratch: Buffers, kept: Buffers) -> list[tuple[torch.Tensor, Sums | None]]:
        return stored_rows(names, *task, lams, storage, scratch, kept, course)

    writers = [ShardWriter(output.folder / file, layout) for output in outputs]
    tallies = [Tally() for _ in outputs]
    tasks = [(name, start, stop) for name in file_order(layout) for start, stop in slices(names.tensors[name])]
    written = 0
    try:
        for (name, _, stop), results in zip(tasks, in_order(tasks, work), strict=True):
            for output, writer, tally, (stored, sums) in zip(outputs, writers, tallies, results, strict=True):
                writer.begin(stored)
                if sums:
                    tally.add(name, sums)
                    if stop == names.tensors[name].rows and not tally.tensor_done() and names.adapts(name):
                        raise DeraError(_nothing_left(name, output.lam, storage.rounding))
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
    return (
        f"at λ={lam:g} nothing of the change of {name} survives rounding, the output would be the reference; {way_out}"
    )
