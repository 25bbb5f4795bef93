"""A benchmark to read and to look at: sentences, tables, a curve a task, one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..lambdas import name
from .frame import draw_curve, page

MOST_NAMED = 8  # λ in a sentence
LEGEND = (
    "best: the λ of exact DeRa with the best score, and between which λ it lies (95 %). over λ=0, over λ=1: its "
    "difference to the reference and the aligned model; intervals are 95 %, over resampled items, the same items for "
    "all λ. The best of many λ is lucky in part; what beats both ends by more than noise does so at all those λ "
    "together."
)


def judged(task: dict[str, Any]) -> dict[str, Any]:
    """The metric that a task is judged by."""
    return next(metric for metric in task["metrics"] if metric["metric"] == task["metric"])


def shown(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """Tasks and groups that stand by themselves."""
    return [task for task in bench["tasks"] if not task["part_of"]]


def sentences(bench: dict[str, Any]) -> list[str]:
    """What the scores say."""
    tasks = shown(bench)
    if len(tasks) > 1:
        front = _named(bench["pareto"])
        said = [f"λ = {front}: no λ is better in one of the {len(tasks)} tasks and as good in all others."]
    else:
        best = judged(tasks[0])["best"]
        said = [f"λ = {name(best['lambda'])} is best: {tasks[0]['metric']} {score(best['value'])}{_spans(best)}."]
    better = {task["task"]: judged(task)["beats_both"] for task in tasks}
    said += [
        f"{task}: better than both ends by more than noise at λ = {_named(lams)}."
        for task, lams in better.items()
        if lams
    ]
    if none := [task for task, lams in better.items() if not lams]:
        said.append(f"On {', '.join(none)} no λ is better than both λ = 0 and λ = 1 by more than noise.")
    apart = [(task["task"], row) for task in tasks for row in judged(task)["merged"] if _apart(row)]
    said += [
        f"{task}: the merge at λ = {name(row['lambda'])} scores {score(row['value'])}, exact DeRa "
        f"{score(row['value'] - row['over_exact'])}: more than noise."
        for task, row in apart
    ]
    if not apart and any(judged(task)["merged"] for task in tasks):
        said.append("No merge scores differently from exact DeRa at its λ by more than noise.")
    return said


def _apart(row: dict[str, Any]) -> bool:
    """Whether a merge scores otherwise than exact DeRa, by its interval."""
    low, high = row.get("over_exact_ci") or (0, 0)
    return low > 0 or high < 0


def _named(lams: Sequence[float]) -> str:
    rest = f" and {len(lams) - MOST_NAMED} more" if len(lams) > MOST_NAMED else ""
    return ", ".join(map(name, lams[:MOST_NAMED])) + rest


def _spans(best: dict[str, Any]) -> str:
    low, high = best["interval"] or (None, None)
    return "" if low is None else f"; the best λ lies between {low:g} and {high:g} (95 %)"


def score(value: float) -> str:
    """A score with three digits after the point; of large ones, such as perplexities, fewer."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _difference(row: dict[str, Any], key: str) -> str:
    bounds = row[f"{key}_ci"]
    return f"{row[key]:+.3f} ({bounds[0]:+.3f} to {bounds[1]:+.3f})" if bounds else f"{row[key]:+.3f}"


COLUMNS = ("task", "metric", "items", "λ = 0", "λ = 1", "best λ", "between", "score there", "over λ = 0", "over λ = 1")


def summary(bench: dict[str, Any]) -> list[list[str]]:
    """A row for each task and each of its metrics, as `COLUMNS` name it."""
    rows = []
    for task in bench["tasks"]:
        for metric in task["metrics"]:
            at = {row["lambda"]: row for row in metric["exact"]}
            best = at[metric["best"]["lambda"]]
            span = metric["best"]["interval"]
            rows.append([
                task["task"], f"{metric['metric']}{'' if metric['higher_is_better'] else ' ↓'}", str(task["items"]),
                score(at[0.0]["value"]), score(at[1.0]["value"]), name(best["lambda"]),
                f"{span[0]:g} to {span[1]:g}" if span else "–", score(best["value"]),
                _difference(best, "over_ref"), _difference(best, "over_aligned"),
            ])  # fmt: skip
    return rows


def by_lambda(bench: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table of λ against tasks, exact and merged, each task as it is judged."""
    metrics = [judged(task) for task in shown(bench)]
    values = [
        {(mode, row["lambda"]): row["value"] for mode in ("exact", "merged") for row in metric[mode]}
        for metric in metrics
    ]
    order = sorted({key for value in values for key in value}, key=lambda key: (key[1], key[0]))
    titles = ["λ", "model", *(f"{task['task']} {task['metric']}" for task in shown(bench))]
    return titles, [
        [name(lam), mode, *(score(value[mode, lam]) if (mode, lam) in value else "–" for value in values)]
        for mode, lam in order
    ]


def draw_task(axis: Any, task: dict[str, Any]) -> None:
    """One task's score over λ with its band, merges as points, and the two ends as lines."""
    metric = judged(task)
    exact, merged = metric["exact"], metric["merged"]
    marks = {"marker": "o", "markersize": 4} if len(exact) < 6 else {}
    draw_curve(axis, exact, lambda row: row["value"], color="C0", label="exact DeRa", **marks)
    with_ci = [row for row in exact if row["ci"]]
    if with_ci:
        at, low, high = zip(*((row["lambda"], *row["ci"]) for row in with_ci), strict=True)
        axis.fill_between(at, low, high, color="C0", alpha=0.15, lw=0)
    if merged:
        at, values = zip(*((row["lambda"], row["value"]) for row in merged), strict=True)
        axis.plot(at, values, "s", color="C1", markersize=5, label="merged")
    for lam, style in ((0.0, ":"), (1.0, "--")):
        value = next(row["value"] for row in exact if row["lambda"] == lam)
        axis.axhline(value, color="0.55", linewidth=0.8, linestyle=style, label=f"λ = {lam:g}")
    for index, lam in enumerate(metric["beats_both"]):
        axis.axvline(lam, color="C2", linewidth=4, alpha=0.25, label=None if index else "beats both ends")
    arrow = "" if metric["higher_is_better"] else " (less is better)"
    axis.set(xlabel="λ", ylabel=f"{metric['metric']}{arrow}", title=f"{task['task']}, {task['items']} items")
    axis.legend(frameon=False, fontsize=8)


def html(bench: dict[str, Any]) -> str:
    """One self-contained page of what bench.json holds."""
    draw = {
        f"task-{index}": lambda axis, task=task: draw_task(axis, task) for index, task in enumerate(shown(bench))
    }
    titles, rows = by_lambda(bench)
    return page(
        "bench.html", "Which λ, by benchmarks?", bench, draw, said=sentences(bench), columns=COLUMNS,
        rows=summary(bench), legend=LEGEND, titles=titles, values=rows, settings=_settings(bench),
    )  # fmt: skip


def markdown(bench: dict[str, Any]) -> str:
    """The benchmark as Markdown."""

    def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))

    return (
        f"# Which λ, by benchmarks?\n\n{' '.join(sentences(bench))}\n\n{table(COLUMNS, summary(bench))}\n\n{LEGEND}\n\n"
        f"{table(*by_lambda(bench))}\n\nMeasured with: {_settings(bench)}.\n"
    )


def _settings(bench: dict[str, Any]) -> str:
    """How it was measured, on one line."""
    given = {key: value for key, value in bench["settings"].items() if value is not None}
    return "; ".join(f"{key} {', '.join(value) if key == 'tasks' else value}" for key, value in given.items())
