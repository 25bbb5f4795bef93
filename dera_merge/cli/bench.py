"""`dera-merge bench`: tasks of lm-evaluation-harness at every λ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from .checks import check_report_folder, choose_device
from .help import how, what, where
from .options import ComputeDtype, Devices, Given, Overwrite, PathFile, Resume, Seed, with_models
from .show import PLAIN, print_json, progress, say, say_figures

EXAMPLES = (
    "dera-merge bench demo/reference demo/aligned-lora --tasks praise,sense --include-path demo/tasks -o bench",
    "dera-merge bench demo/reference demo/aligned-lora --tasks sense --include-path demo/tasks -l 0:3:0.25 -o sense",
)


@with_models()
def run(
    given: Given,
    tasks: Annotated[list[str], what(help="Tasks, groups and tags of lm-eval: arc_easy,hellaswag; repeatable.")],
    output: Annotated[Path, where("-o", "--output", help="Directory of the report, and of what is read.")],
    lam: Annotated[
        list[str] | None, what("-l", "--lambda", metavar="λ", help="Of exact DeRa, with 0 and 1. Default: 0:2:0.0625.")
    ] = None,
    merged: Annotated[
        str | None, what(help="λ of merges to read, a pass each, or none. Default: 0.5, 1.5 and the ends of -l.")
    ] = None,
    generate_at: Annotated[
        str | None, what(help="λ at which tasks that generate are answered. Default: 0, 1, and --merged.")
    ] = None,
    limit: Annotated[int | None, what(min=1, help="Items of each task, the first ones.")] = None,
    num_fewshot: Annotated[int | None, how(min=0, help="Examples before each question. Default: the task's.")] = None,
    include_path: Annotated[Path | None, what(help="A directory with task files of your own.")] = None,
    chat: Annotated[bool, how("--chat", help="Put questions through the chat template.")] = False,
    path: PathFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Devices = "auto",
    compute_dtype: ComputeDtype = "auto",
) -> None:
    """Benchmarks of lm-evaluation-harness at every λ, from one reading of both models."""
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    at: dict[str, Any] = {"merged": [] if merged == "none" else given.lams([merged]) if merged else None}
    at["generate_at"] = given.lams([generate_at]) if generate_at else None
    lams = given.lams(lam) if lam else None
    pair = given.open()
    place = choose_device(device, spreads=True)
    check_report_folder(output, pair)
    from ..choosing.bench import bench

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what we mean to do

    with progress("benchmarks") as tell:
        result = bench(
            pair, names, lams, **at, limit=limit, num_fewshot=num_fewshot, include_path=include_path, chat=chat,
            path=path, seed=seed, device=place, out=output, resume=resume, overwrite=overwrite, progress=tell,
            compute_dtype="float32" if compute_dtype == "auto" else compute_dtype,
        )  # fmt: skip
    result.save(output)
    content = result.to_dict()
    if given.as_json:
        return print_json(content)
    from ..pages.bench import COLUMNS, LEGEND, sentences, summary

    table = Table(title="Scores over λ", **PLAIN)
    left_out = ("between", "over λ = 0")  # so that it fits 80 columns; the report has all
    wanted = [index for index, column in enumerate(COLUMNS) if column not in left_out]
    for index in wanted:
        table.add_column(COLUMNS[index], justify="left" if index < 2 else "right", overflow="fold")
    for row in summary(content):
        table.add_row(*(row[index] for index in wanted))
    say_figures(table)
    say(LEGEND)
    for sentence in sentences(content):
        say(f"- {sentence}")
    say(f"Report: {output / 'bench.html'}")
