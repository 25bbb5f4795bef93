"""`dera-merge demo`: what λ does, on the pair that comes with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from rich.table import Table

from ..errors import DeraError
from ..files.room import check_space
from .checks import choose_device
from .help import where
from .options import AsJson
from .show import fidelity_table, out, print_json, progress, say, say_figures

BEFORE = (
    "λ = 0 is a reference that writes mixed reviews, λ = 1 was trained by DPO to praise; both have 0.9 M weights. "
    "Exact and merged texts are drawn with the same noise: they part only where the two distributions do."
)
BETWEEN = (
    "Beyond λ = 1 what was trained is exaggerated: models as small as these begin to lose their grammar, and exact "
    "DeRa's reward falls."
)
BEHIND = (
    "kl: how far the merged model is from exact DeRa, nats a token. kl_ref: how far the reference is. captured: how "
    "much of the way from the nearer of the two models to exact DeRa the merged one goes; below 0 it is further away "
    "than that model. reward: words of praise less words of blame and repeats, mean of 32 reviews."
)
EXAMPLES = (
    "dera-merge demo",
    "dera-merge demo --pair demo",
)


def run(
    output: Annotated[Path, where("-o", "--output", help="Where the demo writes.")] = Path("demo-output"),
    pair: Annotated[Path | None, where(help="Only copy the pair and its prompts, to try commands on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what λ does, on a tiny pair that comes along. It writes texts, figures, a plot and a merged checkpoint."""
    if pair:
        names = _copy_pair(pair)
        return print_json({"pair": str(pair), "files": names}) if as_json else say(f"{pair}: {', '.join(names)}")
    from .. import tour

    choose_device("cpu")
    with progress("demo") as tell:
        result = tour.run(output, progress=tell)
    if as_json:
        return print_json(result)
    say(BEFORE)
    table = Table(
        "λ", "exact DeRa (two models)", "merged (one model)", title=f"Prompt: {result['prompt']}", show_lines=True
    )
    for sample in result["samples"]:
        table.add_row(f"{sample['lambda']:g}", sample["exact"], sample["merged"])
    out.print(table)
    say(BETWEEN)
    rewards = {f"reward {name}": [f"{value:.2f}" for value in result[f"reward_{name}"]] for name in ("exact", "merged")}
    say_figures(fidelity_table(result["results"], ("lambda", "kl", "tv", "top1", "kl_ref", "captured"), rewards))
    say(BEHIND)
    say(f"Plot: {result['plot']}\nMerged checkpoint, loaded back with plain transformers: {result['checkpoint']}")
    say("Next: dera-merge demo --pair demo copies the pair, for the examples of each command's --help.")


def _copy_pair(folder: Path) -> list[str]:
    """Copy the demo pair and its prompts, whole or not at all; their names.

    Raises:
        DeraError: `folder` has something, or the pair cannot be written there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeraError(f"{folder} exists and is not empty; give another --pair, or use the pair that is there")
    from .. import demo

    names = sorted(path.name for path in demo.FOLDER.iterdir() if path.is_dir() or path.suffix == ".jsonl")
    names = [name for name in names if not name.startswith("_")]
    places = [demo.FOLDER / name for name in names]
    files = [file for place in places for file in (place, *place.rglob("*")) if file.is_file()]
    check_space(folder, sum(file.stat().st_size for file in files))
    try:
        for file in files:
            copy = folder / file.relative_to(demo.FOLDER)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DeraError(f"{folder} cannot be written to: {error.strerror or error}; give another --pair") from error
    return names
