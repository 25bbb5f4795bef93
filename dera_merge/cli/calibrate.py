"""`dera-merge calibrate`: learn a path that follows exact DeRa."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import DeraError
from .checks import choose_device, given_prompts
from .help import how, where
from .options import (
    BatchSize,
    ComputeDtype,
    Device,
    Given,
    Lambdas,
    Limit,
    MaxMemory,
    OwnPrompts,
    Resume,
    Seed,
    with_models,
)
from .show import print_json, progress, say

PathKind = Literal["curve", "gains"]

EXAMPLES = (
    "dera-merge calibrate demo/reference demo/aligned-lora -l 0,2 -o path.safetensors",
    "dera-merge calibrate demo/reference demo/aligned-lora -l 0,1 -o gains.safetensors --kind gains --texts 64",
)


@with_models()
def run(
    given: Given,
    lam: Lambdas,
    output: Annotated[Path, where("-o", "--output", help="The path file to write (.safetensors).")],
    prompts: OwnPrompts = None,
    limit: Limit = None,
    kind: Annotated[PathKind, how(help="curve: gains and low-rank curves; gains: a number a layer.")] = "curve",
    rank: Annotated[int, how(min=1, help="Of the curve.")] = 16,
    texts: Annotated[int, how(min=1, help="How many to sample from exact DeRa.")] = 256,
    max_new_tokens: Annotated[int, how(min=1, help="Length of these texts.")] = 48,
    passes: Annotated[int, how(min=1, help="How often to go over them.")] = 3,
    learning_rate: Annotated[float, how(min=0.0, help="Relative to the size of what it changes.")] = 0.02,
    resume: Resume = False,
    overwrite: Annotated[bool, where("--overwrite", help="Replace a path file and what a run left.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    batch_size: BatchSize = None,
    max_memory: MaxMemory = None,
    load_in: Annotated[
        Literal["4bit"] | None, where(metavar="4bit", help="Hold an adapter's base in 4 bits (bitsandbytes).")
    ] = None,
) -> None:
    """Learn a path that follows exact DeRa. merge, compare, sweep and generate take it with --path."""
    lams = given.lams(lam)
    if not 0 < learning_rate < 1:
        raise typer.BadParameter("must be between 0 and 1", param_hint="--learning-rate")
    rows = given_prompts(prompts, limit)
    pair = given.open()
    place = choose_device(device)
    _check_path_file(output, overwrite or resume)
    from ..calibrating.calibrate import calibrate as learn

    with progress("calibrating") as tell:
        curve = learn(
            pair, lams, rows, kind=kind, rank=rank, texts=texts,
            max_new_tokens=max_new_tokens, passes=passes, learning_rate=learning_rate, seed=seed, device=place,
            batch_size=batch_size, max_memory=max_memory, load_in=load_in,
            compute_dtype=compute_dtype, progress=tell, out=output,
            resume=resume, overwrite=overwrite,
        )  # fmt: skip
    if given.as_json:
        return print_json({**given.names, "path": str(output), **curve.describe(), **curve.recipe})
    for side, row in curve.recipe["held_out"].items():
        where = "λ ≤ 1" if side == "inner" else "λ > 1"
        gain = f"{row['line'] / row['path']:.2f} times nearer" if row["path"] < row["line"] else "nothing was learned"
        figures = f"{row['line']:.2g} on the line, {row['path']:.2g} on the path ({gain})"
        say(f"{where}: kl on {row['texts']} held-out texts {figures}")
    say(f"{output}  ({curve.kind}, λ from {curve.span[0]:g} to {curve.span[1]:g})")


def _check_path_file(file: Path, known: bool) -> None:
    """Raise DeraError where a path file may not be written there; `known`: that there is one was foreseen."""
    if file.is_dir():
        raise DeraError(f"{file} is a directory; give a file for the path")
    if not file.exists():
        return
    if not known:
        raise DeraError(f"{file} exists; --overwrite replaces it, or give another --output")
    from ..merging.path import Curve

    Curve.load(file)  # only what dera-merge wrote is replaced
