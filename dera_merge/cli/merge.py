"""`dera-merge merge`: θ_ref + λΔ as checkpoints or adapters."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .help import how, what, where
from .options import Dtype, Given, LambdaFor, Lambdas, PathFile, Rounding, Seed, with_models
from .show import note, print_json, progress, say

if TYPE_CHECKING:
    from ..models.source import Source

Format = Literal["full", "adapter"]
QUIET = 0.01  # noise, in parts of ‖λΔ‖, that is not worth a word

EXAMPLES = (
    "dera-merge merge demo/reference demo/aligned-lora -l 0.25,0.5 -o merged",
    "dera-merge merge demo/reference demo/aligned-lora -l 0.5,1 -o adapters --format adapter",
)


@with_models(several=True, base_quantization=True)
def run(
    given: Given,
    lam: Lambdas,
    output: Annotated[Path, where("-o", "--output", help="Directory; with several λ, the parent of lambda-<λ>.")],
    lambda_for: LambdaFor = None,
    dtype: Annotated[Dtype, how(help="Of the output; auto: each tensor's dtype in REF.")] = "auto",
    rounding: Annotated[Rounding | None, how(help="Default: stochastic for 16-bit output.")] = None,
    seed: Seed = 0,
    max_shard_size: Annotated[str, where(help="Largest weight file.")] = "5GB",
    format: Annotated[Format, how(help="Checkpoints, or λΔ as PEFT adapters over the base.")] = "full",
    rank: Annotated[int | None, how(min=1, help="Cut adapters to this rank by SVD.")] = None,
    extract_rank: Annotated[int | None, how(min=1, help="Δ of a dense pair as adapters of this rank.")] = None,
    resume: Annotated[bool, where("--resume", help="Go on with an interrupted merge.")] = False,
    overwrite: Annotated[bool, where("--overwrite", help="Replace an output that dera-merge wrote.")] = False,
    allow_nonfinite: Annotated[bool, how("--allow-nonfinite", help="Store NaN and infinity, counted.")] = False,
    shard: Annotated[str | None, where(help="i/n: write the i-th of n shares. Default: the launcher's rank.")] = None,
    path: PathFile = None,
    report: Annotated[Path | None, what(help="Of compare; warns of λ that it does not call safe.")] = None,
) -> None:
    """Write θ_ref + λΔ as an ordinary checkpoint."""
    lams = given.lams(lam)
    common: dict[str, Any] = {
        "dtype": dtype,
        "rounding": rounding,
        "seed": seed,
        "resume": resume,
        "overwrite": overwrite,
    }
    common |= {"path": path, "lambda_for": given.lambda_for(lambda_for), "report": report}
    share = _share(shard)
    if format == "adapter" or extract_rank:
        if shard or allow_nonfinite:
            raise typer.BadParameter(
                "does not go with adapters", param_hint="--shard" if shard else "--allow-nonfinite"
            )
        common |= {"format": "adapter", "rank": rank, "extract_rank": extract_rank}
    elif rank:
        raise typer.BadParameter("goes with --format adapter", param_hint="--rank")
    else:
        common |= {"max_shard_size": max_shard_size, "allow_nonfinite": allow_nonfinite, "shard": share}
    pair = given.open()
    with progress("merging") as tell:
        unit = 0 if "format" in common else 20  # tensors, or MiB
        folders = pair.merge(
            output, lams, **common, progress=lambda done, total: tell(None, done >> unit, total >> unit)
        )
    written = [_merged(value, folder) for value, folder in zip(lams, folders, strict=True)]
    if given.as_json:
        return print_json({**given.names, "outputs": written})
    for entry in written:
        remark = ""
        if not entry["complete"]:
            remark = (
                f"  (share {share[0]}/{share[1]} is written; the process that ends last completes it)" if share else ""
            )
        elif entry["energy"] is not None:
            remark = f"  (adapter of rank {entry['rank']}, {entry['energy']:.1%} of ‖λΔ‖²)"
        elif entry["kept"] is not None:
            noise = f", noise {entry['error']:.2g} × ‖λΔ‖" if entry["error"] >= QUIET else ""
            remark = f"  ({entry['kept']:.1%} of λΔ kept by {entry['rounding']} rounding{noise})"
        parts = f" ({', '.join(entry['lambda_for'])})" if entry["lambda_for"] else ""
        say(f"λ={entry['lambda']:g}{parts}  {entry['path']}{remark}")
        for count, state in ((entry["saturated"], "saturated"), (entry["nonfinite"], "are NaN or infinite")):
            if count:
                note(f"warning: λ={entry['lambda']:g}: {count:,} weights {state}")
    if all(entry["complete"] for entry in written):
        base = pair.ref.base if "format" in common else None
        say(_serve_lines(base, lams, folders))


def _share(text: str | None) -> tuple[int, int] | None:
    """`i/n`, or what `torchrun`, `accelerate launch` or `srun` say of this process."""
    if text is None:
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            given = [os.environ.get(key, "") for key in (rank, size)]
            if all(map(str.isdecimal, given)) and int(given[1]) > 1:
                return int(given[0]) + 1, int(given[1])
        return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise typer.BadParameter(f"{text!r} is not i/n with 1 ≤ i ≤ n", param_hint="--shard")
    return int(i), int(n)


def _merged(lam: Any, folder: Path) -> dict[str, Any]:
    """What `merge` says of one output."""
    from ..merging.parts import rules_of
    from ..merging.recipe import RECIPE, read_recipe

    entry: dict[str, Any] = {"lambda": lam, "path": str(folder), "complete": (folder / RECIPE).is_file()}
    recipe = read_recipe(folder) if entry["complete"] else {}
    statistics = recipe.get("statistics", {})
    entry["lambda_for"] = rules_of(recipe.get("path"))
    return entry | {key: recipe.get(key) for key in ("rounding", "rank")} | {
        key: statistics.get(key) for key in ("kept", "error", "saturated", "nonfinite", "energy")
    }  # fmt: skip


def _serve_lines(base: Source | None, lams: list[Any], folders: list[Path]) -> str:
    """How to serve what was merged with vLLM: each checkpoint by itself, or all adapters over `base`."""
    from ..merging.adapters import serving_rank
    from ..merging.parts import output_name
    from ..merging.recipe import read_recipe

    if base is None:
        return "\n".join(shlex.join(["vllm", "serve", str(folder)]) for folder in folders)
    rank = serving_rank(folders[0])
    if rank is None:
        return "The rank is above what vLLM serves (512); --rank cuts it"
    model, commit = base.address
    revision = ["--revision", commit] if commit else []
    words = ["vllm", "serve", model, *revision, "--enable-lora", "--max-lora-rank", rank, "--max-loras", len(lams)]
    names = [output_name(lam, read_recipe(folder).get("path")) for lam, folder in zip(lams, folders, strict=True)]
    modules = [f"{name}={folder}" for name, folder in zip(names, folders, strict=True)]
    return shlex.join(map(str, [*words, "--lora-modules", *modules]))
