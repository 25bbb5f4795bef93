"""`dera-merge demo`: what λ does, on the pair that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .checks import choose_device
from .options import AsJson
from .show import fidelity_table, out, print_json, progress, say


def run(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the demo writes.")] = Path("demo-output"),
    as_json: AsJson = False,
) -> None:
    """Show what λ does, on a tiny pair that comes with the package: texts, figures, a plot, a merged checkpoint.

    Example: dera-merge demo
    """
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
