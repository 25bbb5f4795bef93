"""The page of a run from a pair to a model: from the question to the answer, each step with its figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..lambdas import is_end
from . import sweep as choosing
from .bench import draw_task, shown
from .bench import sentences as told_of_tasks
from .fidelity import COLUMNS, LEGEND, cells, draw_captured, draw_kl, headline
from .fidelity import sentences as told
from .frame import number, page, read

STEPS = {
    "inspect": "The two models", "compare": "Along λ", "sweep": "Which λ", "bench": "Which λ",
    "line": "The line at λ", "calibrate": "A learned path", "merge": "The model",
    "report": "What was written, measured",
}  # fmt: skip
TASKS = 3  # charts of tasks, at most


def sentences(run: dict[str, Any]) -> list[str]:
    """The answer in words, the most important first."""
    row, lam = run["result"], run["lambda"]
    how = {
        "reward": "the reward wants it", "tasks": "the tasks want it",
        "target_kl": "it has the KL that was asked for", "given": "it was asked for",
        "half-way": "half-way, as there was nothing to choose by",
    }  # fmt: skip
    way = "along a learned path" if run["learning"]["learned"] else "on the straight line"
    said = [f"λ = {lam:g} ({how[run['chosen_by']]}), merged {way}: {row['verdict']}; {row['why']}."]
    if is_end(lam):
        said.append(f"That is {'the aligned model' if lam else 'the reference'} itself, which needs no merge.")
    else:
        said.append(
            f"The model as it was written is {number(row['kl'])} nats per token from exact DeRa at this λ. Exact DeRa "
            f"is {number(row['kl_ref'])} from the reference, and {number(row['kl_aligned'])} from the aligned model."
        )
    if run["chosen_by"] == "half-way":
        said.append("To choose λ, give --reward, --target-kl, --tasks or --lambda, and --prompts of your own.")
    return said


def story(
    run: dict[str, Any], along: dict[str, Any], found: dict[str, Any] | None, written: dict[str, Any]
) -> dict[str, list[str]]:
    """What each step says, by its name, in the order in which they were done; `written`: figures of the model."""
    delta = run["delta"]
    spans = [f"λ = {low:g} to {high:g}" if low < high else f"λ = {low:g}" for low, high in run["safe"]]
    stories = {
        "inspect": [
            f"‖Δ‖ is {number(delta['relative'])} of ‖θ‖, over {delta['weights']:,} weights. Nothing stops a merge."
        ],
        "compare": [headline(along), f"The straight line is safe at {', '.join(spans) or 'no λ that was measured'}."],
        "sweep": choosing.sentences(found) if found and run["chosen_by"] != "tasks" else [],
        "bench": _benchmarks(run, found) if run["chosen_by"] == "tasks" else [],
        "calibrate": [f"{run['learning']['why'][:1].upper()}{run['learning']['why'][1:]}."],
        "merge": [f"{run['model']} is an ordinary checkpoint: dera_merge.json in it says how it was made."],
        "report": [*told(written), *_against_the_line(run)],
    }  # fmt: skip
    return {name: said for name, said in stories.items() if said}


def _against_the_line(run: dict[str, Any]) -> list[str]:
    """What a learned path gained on the prompts of the tables, which are not those that it was held out against."""
    if not (run["learning"]["learned"] and run["line"] and run["line"]["kl"] and run["result"]["kl"]):
        return []
    line, path = run["line"]["kl"], run["result"]["kl"]
    return [
        f"On the prompts of these tables the line is {number(line)} nats per token from exact DeRa, what was written, "
        f"along the path, {number(path)}: {line / path:.2g} times nearer. The gain that “{STEPS['calibrate']}” "
        f"names is on other texts, which were held out while it was learned."
    ]


def _benchmarks(run: dict[str, Any], bench: dict[str, Any]) -> list[str]:
    """What the tasks say, and how one λ came of several."""
    gain = f"{run['best']['gain']:+.1%} of the reference's score, mean over the tasks"
    return [*told_of_tasks(bench), f"λ = {run['lambda']:g} gains most: {gain}."]


def html(run: dict[str, Any], along: dict[str, Any], found: dict[str, Any] | None, report: dict[str, Any]) -> str:
    """One self-contained page, with links to those of the steps beside it."""
    along, report = read(along), read(report)

    def kl(axis: Any) -> None:
        draw_kl(axis, along["results"], along["prediction"])
        axis.axvline(run["lambda"], color="C0", linewidth=0.8, alpha=0.6)
        axis.plot([run["lambda"]], [max(run["result"]["kl"], 1e-7)], marker="*", markersize=11, color="C0")

    charts: dict[str, Callable[[Any], None]] = {"kl": kl}
    if run["chosen_by"] == "tasks":
        charts |= {
            f"task-{number}": lambda axis, task=task: draw_task(axis, task)
            for number, task in enumerate(shown(found)[:TASKS])
        }
    elif found:
        charts |= dict(list(choosing.charts(found).items())[:1])
    else:
        charts["captured"] = lambda axis: draw_captured(axis, along["results"])
    (row,) = report["results"]
    return page(
        "auto.html", "From two models to one", run, charts, said=sentences(run), titles=STEPS,
        story=story(run, along, found, row), columns=COLUMNS, legend=LEGEND,
        rows=[cells(result) for result in along["results"]], last=cells(row),
        links={
            "compare": ("compare/report.html", "The report along λ"),
            "sweep": ("sweep/sweep.html", "The report of the sweep"),
            "bench": ("bench/bench.html", "The report of the benchmarks"),
            "report": ("report/report.html", "The report of what was written"),
        },
    )  # fmt: skip
