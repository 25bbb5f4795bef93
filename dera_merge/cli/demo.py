"""`dera-merge demo`: what λ does, on the pair that comes with the package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

from rich.table import Table

from ..errors import DeraError
from .checks import choose_device
from .help import where
from .options import AsJson
from .show import fidelity_table, out, print_json, progress, say

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
    table = Table(
        "λ", "exact DeRa (two models)", "merged (one model)", title=f"Prompt: {result['prompt']}", show_lines=True
    )
    for sample in result["samples"]:
        table.add_row(f"{sample['lambda']:g}", sample["exact"], sample["merged"])
    out.print(table)
    rewards = {f"reward {name}": [f"{value:.2f}" for value in result[f"reward_{name}"]] for name in ("exact", "merged")}
    out.print(fidelity_table(result["results"], ("lambda", "kl", "tv", "top1", "kl_ref", "captured"), rewards))
    say(f"Plot: {result['plot']}\nMerged checkpoint, loaded back with plain transformers: {result['checkpoint']}")


def _copy_pair(folder: Path) -> list[str]:
    """Copy the demo pair and its prompts; their names. Raises DeraError where `folder` has something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeraError(f"{folder} exists and is not empty; give another --pair, or use the pair that is there")
    from .. import demo

    names = sorted(path.name for path in demo.FOLDER.iterdir() if path.is_dir() or path.suffix == ".jsonl")
    names = [name for name in names if not name.startswith("_")]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = demo.FOLDER / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    return names
