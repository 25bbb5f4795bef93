"""A sweep to read and to look at: sentences, Markdown, a plot, one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..lambdas import Lam, Vector, is_end, name
from ..statistics.paired import unbeaten
from ..statistics.reweighting import KNOWN, column_of
from .fidelity import log_ratio_sentence
from .frame import draw_curve, figure_of, have_matplotlib, no_plots, number, over_lambda, page, span
from .targets import cut_sentence, draw_effort, target_charts, target_sentences

MOST_BARS = 24  # λ of three or more aligned models that are drawn
SHOWN = 3  # prompts whose texts are shown at each λ
COLUMNS = (
    "lambda", "reward", "reward_ci", "kl", "kl_token", "length", "wins_aligned", "wins_ref", "gain_ci", "kept_ci",
    "ess",
)  # fmt: skip
HEADS = {"lambda": "λ", "kl": "kl/text", "kl_token": "kl/token"}  # how tables call a column; else by its name
LEGEND = {
    "reward": "mean over prompts, with its 95 % interval",
    "kl": "how far exact DeRa's texts are from the reference, nats a text (compare's kl is the merge from exact DeRa, "
    "nats a token)",
    "kl_token": "the same, nats a token",
    "length": "tokens",
    "wins_aligned": "how often a text earns more than one of λ=1 (of several aligned models, the best), ties half",
    "wins_ref": "the same beside the reference",
    "gain_ci": "interval of the reward less that of λ=1 (likewise)",
    "kept_ci": "interval of the reward as a share of λ=1's",
    "ess": "effective texts a prompt; 1 is what one text sampled there would be",
}


def sentences(sweep: dict[str, Any]) -> list[str]:
    """The answer in words."""
    best = sweep["best"]
    lam = name(best["lambda"])
    if not best["tells_apart"]:
        same = "all are at the same figure" if "target" in best else f"each earns {number(best['reward'])}"
        return [f"These texts tell no λ apart: {same}. Another reward, more or longer texts may."]
    said = target_sentences(sweep) or [
        f"λ = {lam} earns most: {number(best['reward'])} ({span(best['reward_ci'])}), at {number(best['kl'])} nats "
        f"a text from the reference; the best λ lies {_spans(best['interval'])} (95 %)."
    ]
    alone = best.get("gain_over", 1.0)
    if "target" not in best and best.get("gain") is not None and best["lambda"] != alone:
        verdict = "more than noise" if best["more_than_noise"] else "not more than noise"
        over = "the aligned model itself" if alone == 1.0 else f"the best aligned model alone ({name(alone)})"
        said.append(f"That is {best['gain']:+.2g} over {over} ({span(best['gain_ci'])}): {verdict}.")
    if best["at_the_edge"] and "target" not in best:
        said.append("It lies at the edge of what is known here: the true best may lie beyond.")
    if best.get("equivalent_beta"):
        said.append(
            f"Retraining would take KL coefficient β/λ = {best['beta']:g}/{lam} = {best['equivalent_beta']:.3g}."
        )
    said += [*cut_sentence(sweep), *log_ratio_sentence(best.get("log_ratio"))]
    if sweep["faithful"]:
        row = sweep["faithful"]
        said.append(
            f"The merged model there is {row['verdict']}: kl from exact DeRa is {number(row['kl'])} nats a token; "
            f"{row['why']}."
        )
    said += _both_choices(sweep)
    unknown = [row["lambda"] for row in sweep["curve"] if not row["known"]]
    if unknown:
        treatment = "is left out" if isinstance(best["lambda"], Vector) else "is dotted there"
        said.append(f"At {len(unknown)} of {len(sweep['curve'])} λ too few texts say anything; the curve {treatment}.")
    said += [_spent(judge) for judge in sweep.get("judges") or ()]
    if front := pareto(sweep):
        rest = f" and {len(front) - 8} more" if len(front) > 8 else ""
        said.append(f"No λ beats these in every reward at once: {', '.join(map(name, front[:8]))}{rest}.")
    return said


def _both_choices(sweep: dict[str, Any]) -> list[str]:
    """Whether the merged model's texts would have chosen as exact DeRa's do; nothing where too few say so."""
    if not (choices := sweep["best"].get("sampled")):
        return []
    exact, merged = choices["exact"], choices["merged"]
    wrote = {mode: {p["lambda"] for p in sweep["points"] if p["mode"] == mode} for mode in ("exact", "merged")}
    both = sorted(lam for lam in wrote["exact"] if lam in wrote["merged"] or is_end(lam))
    where = ", ".join(map(name, both)) if len(both) <= 8 else f"{len(both)} λ from {name(both[0])} to {name(both[-1])}"
    says = f"Without the curve, of the λ at which both wrote texts ({where}), exact DeRa earns most at"
    if exact["lambda"] == merged["lambda"]:
        return [f"{says} {name(exact['lambda'])}, and so does the merged model."]
    at = [f"{name(choice['lambda'])} ({_spans(choice['interval'])})" for choice in (exact, merged)]
    return [f"{says} {at[0]}, the merged model at {at[1]}."]


def _spent(judge: dict[str, Any]) -> str:
    """What a judge took."""
    text = (
        f"The judge {judge['name']} gave {judge['requests']:,} verdicts, {judge['asked_now']:,} of them now: "
        f"{judge['prompt_tokens']:,} tokens read, {judge['completion_tokens']:,} written."
    )
    if judge.get("pairs"):
        split = f"{judge['split'] / judge['pairs']:.0%} of {judge['pairs']:,} pairs"
        text += f" In {split} its verdict changed with the places, which counts as a tie."
    return text


def pareto(sweep: dict[str, Any]) -> list[Lam]:
    """The λ that no other beats in every reward, where there are several; less is better at a negative weight."""
    signs = {column_of(r): math.copysign(1.0, weight) for r, weight in sweep["settings"]["rewards"].items() if weight}
    rows = [row for row in sweep["curve"] if row["known"]]
    if len(signs) < 2 or not rows:
        return []
    scores = np.array([[sign * row[name] for name, sign in signs.items()] for row in rows])
    return [row["lambda"] for row, stands in zip(rows, unbeaten(scores), strict=True) if stands]


def cells(row: dict[str, Any], columns: tuple[str, ...] = COLUMNS) -> list[str]:
    """One row of the curve as texts."""
    texts = []
    for column in columns:
        value = row.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)) or value == [None, None]:
            texts.append("–")
        elif column == "lambda":
            texts.append(name(value))
        elif column.endswith("_ci"):
            texts.append(span(value))
        elif column.startswith("wins"):
            texts.append(f"{value:.0%}")
        elif column == "length" and row["known"]:
            texts.append(f"{value:.1f}")
        else:
            texts.append(number(value) if row["known"] or column == "ess" else "–")
    return texts


def _spans(interval: list[Any]) -> str:
    """An interval of λ in words; with several aligned models, one for each."""
    if isinstance(interval[0], list):
        return "in " + " × ".join(f"[{low:g}, {high:g}]" for low, high in interval)
    return f"between {interval[0]:g} and {interval[1]:g}"


def columns(sweep: dict[str, Any]) -> tuple[str, ...]:
    """The columns that this sweep has, its rewards by name where there are several."""
    names = [column_of(reward) for reward in sweep["settings"]["rewards"]]
    wanted = (*COLUMNS[:3], *(names if len(names) > 1 else ()), *COLUMNS[3:])
    lacking = set() if sweep["best"].get("target", {}).get("by") == "keep" else {"kept_ci"}
    return tuple(column for column in wanted if column in sweep["curve"][0].keys() - lacking)


def legend(columns: Sequence[str]) -> str:
    """What these columns are."""
    return " ".join(f"{head}: {LEGEND[column]}." for column, head in zip(columns, heads(columns), strict=True)
                    if column in LEGEND)  # fmt: skip


def heads(columns: Sequence[str]) -> list[str]:
    """What tables call these columns."""
    return [HEADS.get(column, column) for column in columns]


def shown(sweep: dict[str, Any], most: int = 12) -> list[dict[str, Any]]:
    """Rows of the curve for a table: those that were sampled, the best, and some between."""
    keep = {point["lambda"] for point in sweep["points"]} | {sweep["best"]["lambda"]}
    rest = [row["lambda"] for row in sweep["curve"] if row["lambda"] not in keep]
    keep |= set(rest[:: max(1, math.ceil(len(rest) / max(1, most - len(keep))))])
    return [row for row in sweep["curve"] if row["lambda"] in keep]


def markdown(sweep: dict[str, Any]) -> str:
    """The sweep as Markdown."""
    wanted = columns(sweep)
    rows = [heads(wanted), ["---"] * len(wanted), *(cells(row, wanted) for row in shown(sweep))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    commands = "\n".join(sweep["commands"])
    ship = f"To ship it:\n\n```bash\n{commands}\n```\n\n" if commands else ""
    settings = ", ".join(f"{key} {value}" for key, value in sweep["settings"].items() if value is not None)
    said = [" ".join(sentences(sweep)), table, legend(wanted)]
    return "\n\n".join(["# Which λ?", *said, f"{ship}Measured with: {settings}.\n"])


def plot_sweep(sweep: dict[str, Any], file: Path) -> Path | None:
    """Reward against λ and against KL, or the target, as a PNG; None, with a warning, without matplotlib."""
    if not have_matplotlib():
        no_plots()
        return None
    every = charts(sweep)
    draw = [every[chart] for chart in every if chart not in ("wins", "ess")]
    figure = figure_of(draw, (5 * len(draw), 4))
    figure.savefig(file, dpi=140)
    return file


def whose(sweep: dict[str, Any]) -> str:
    """Whose curve it is."""
    return "merged" if sweep["settings"].get("mode") == "merged" else "exact DeRa"


def draw_reward(axis: Any, sweep: dict[str, Any]) -> None:
    """Reward over λ with its band; dotted where it is not known; what was sampled as points."""
    if isinstance(sweep["best"]["lambda"], Vector):
        return draw_rewards_of_several(axis, sweep)
    rows = [row for row in sweep["curve"] if row["known"]]
    draw_curve(axis, sweep["curve"], lambda r: r["reward"], color="C0", linestyle=":", linewidth=1)
    draw_curve(axis, sweep["curve"], lambda r: r["reward"] if r["known"] else None, color="C0", label=whose(sweep))
    at, low, high = zip(*((row["lambda"], *row["reward_ci"]) for row in rows), strict=True)
    axis.fill_between(at, low, high, color="C0", alpha=0.2, lw=0)
    for mode, color, marker in (("exact", "C0", "o"), ("merged", "C1", "s")):
        points = [p for p in sweep["points"] if p["mode"] == mode and "reward" in p]
        if points:
            label = "merged, sampled" if mode == "merged" else "sampled"
            _with_bars(axis, [p["lambda"] for p in points], points, fmt=marker, color=color, label=label)
    axis.axvspan(*sweep["best"]["interval"], color="C2", alpha=0.12, lw=0)
    label = f"{'chosen' if 'target' in sweep['best'] else 'best'}: {name(sweep['best']['lambda'])}"
    axis.axvline(sweep["best"]["lambda"], color="C2", linewidth=1, label=label)
    axis.set(xlabel="λ", ylabel="reward", title="What λ earns")
    seen = [bound for row in rows for bound in row["reward_ci"]] + [
        p["reward"] for p in sweep["points"] if "reward" in p
    ]
    margin = 0.08 * (max(seen) - min(seen) or 1)
    axis.set_ylim(min(seen) - margin, max(seen) + margin)
    axis.legend(frameon=False, fontsize=8)


def _with_bars(axis: Any, at: Sequence[float], rows: Sequence[dict[str, Any]], **style: Any) -> None:
    """Rewards as points with their intervals."""
    values = [row["reward"] for row in rows]
    bars = np.abs(np.array([row["reward_ci"] for row in rows]).T - np.array(values))
    axis.errorbar(at, values, bars, markersize=4, elinewidth=0.8, **style)


def draw_rewards_of_several(axis: Any, sweep: dict[str, Any]) -> None:
    """Reward of each λ of several aligned models: of two as a map, of more side by side."""
    rows = [row for row in sweep["curve"] if row["known"]]
    best, sampled = sweep["best"]["lambda"], {p["lambda"] for p in sweep["points"] if p["mode"] == "exact"}
    if len(best) == 2:
        x, y = zip(*(row["lambda"] for row in rows), strict=True)
        squares = axis.scatter(x, y, c=[row["reward"] for row in rows], s=90, marker="s", cmap="viridis")
        axis.figure.colorbar(squares, ax=axis, label="reward")
        axis.plot(*zip(*sampled, strict=True), "o", markersize=4, color="w", markeredgecolor="k", label="sampled")
        axis.plot(*best, "*", color="C3", markersize=12, label=f"best: {name(best)}")
        axis.set(xlabel="λ of the first aligned model", ylabel="λ of the second", title="What λ earns")
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        return
    rows = sorted(rows, key=lambda row: -row["reward"])[:MOST_BARS]
    rows, at = over_lambda(axis, rows)
    _with_bars(axis, at, rows, fmt="o", color="C0")
    axis.set(xlabel="λ", ylabel="reward", title=f"What λ earns (the best {len(rows)})")


def draw_pareto(axis: Any, sweep: dict[str, Any]) -> None:
    """The first two rewards against each other; λ that none beats in every reward are named."""
    first, second = (column_of(reward) for reward in list(sweep["settings"]["rewards"])[:2])
    rows, front = [row for row in sweep["curve"] if row["known"]], set(pareto(sweep))
    axis.plot([row[first] for row in rows], [row[second] for row in rows], ".", color="C7", label="λ")
    best = sorted((row for row in rows if row["lambda"] in front), key=lambda row: row[first])
    at = [row[first] for row in best], [row[second] for row in best]
    axis.plot(*at, "o-", color="C0", markersize=4, label="none beats it")
    for row in best[:: max(1, math.ceil(len(best) / 8))]:
        axis.annotate(f" {name(row['lambda'])}", (row[first], row[second]), fontsize=7, va="bottom")
    axis.set(xlabel=first, ylabel=second, title="Rewards against each other")
    axis.legend(frameon=False, fontsize=8)


def draw_frontier(axis: Any, sweep: dict[str, Any]) -> None:
    """Reward against KL from the reference, λ along the curve; exact and merged."""
    rows = [row for row in sweep["curve"] if row["known"]]
    several = isinstance(sweep["best"]["lambda"], Vector)
    style = {"linestyle": "", "marker": "."} if several else {}
    axis.plot([row["kl"] for row in rows], [row["reward"] for row in rows], color="C0", label=whose(sweep), **style)
    merged = [p for p in sweep["points"] if p["mode"] == "merged" and "reward" in p]
    kl_at = {row["lambda"]: row["kl"] for row in sweep["curve"]}
    ends = [  # at λ = 0 and 1 both are one model, so that the merged model's line leads there
        {"lambda": p["lambda"], "kl": kl_at[p["lambda"]], "reward": p["reward"]}
        for p in sweep["points"]
        if p["mode"] == "exact" and not several and is_end(p["lambda"]) and p["lambda"] in kl_at and "reward" in p
    ]
    if merged:
        line = sorted([*merged, *ends], key=lambda p: p["lambda"])
        marks = "s" if several else "s--"
        axis.plot([p["kl"] for p in line], [p["reward"] for p in line], marks, color="C1", markersize=4, label="merged")
    sampled = {p["lambda"] for p in sweep["points"]}
    for row in rows:
        if row["lambda"] in sampled or row["lambda"] == sweep["best"]["lambda"]:
            axis.plot(row["kl"], row["reward"], "o", color="C0", markersize=4)
            axis.annotate(f" λ={name(row['lambda'])}", (row["kl"], row["reward"]), fontsize=8, va="bottom")
    axis.set(xlabel="KL from the reference, nats a text", ylabel="reward", title="What it costs")
    axis.legend(frameon=False, fontsize=8)


def draw_wins(axis: Any, sweep: dict[str, Any]) -> None:
    """How often a text beats one of the aligned model and one of the reference."""
    for key, label, color in (("wins_aligned", "against λ = 1", "C3"), ("wins_ref", "against λ = 0", "C7")):
        draw_curve(
            axis, sweep["curve"], lambda r, key=key: r.get(key) if r["known"] else None, label=label, color=color
        )
    axis.axhline(0.5, color="0.6", linewidth=0.8)
    axis.set(xlabel="λ", ylabel="share of wins", title="How often it wins", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)


def draw_ess(axis: Any, sweep: dict[str, Any]) -> None:
    """How many texts stand for each λ."""
    draw_curve(axis, sweep["curve"], lambda r: r["ess"], color="C0")
    axis.axhline(KNOWN, color="C3", linewidth=0.8, label="below: not known")
    axis.set(xlabel="λ", ylabel="effective texts a prompt", title="How many texts stand for it")
    axis.legend(frameon=False, fontsize=8)


def charts(sweep: dict[str, Any]) -> dict[str, Callable[[Any], None]]:
    """The charts of a page, by name."""
    draw = target_charts(sweep)
    if sweep["settings"]["rewards"]:
        draw |= {
            "reward": lambda axis: draw_reward(axis, sweep), "frontier": lambda axis: draw_frontier(axis, sweep),
            "effort": lambda axis: draw_effort(axis, sweep),
        }  # fmt: skip
    if len(sweep["settings"]["rewards"]) > 1:
        draw["pareto"] = lambda axis: draw_pareto(axis, sweep)
    if not isinstance(sweep["best"]["lambda"], Vector):
        if any("wins_ref" in row for row in sweep["curve"]):
            draw["wins"] = lambda axis: draw_wins(axis, sweep)
        draw["ess"] = lambda axis: draw_ess(axis, sweep)
    return draw


def html(sweep: dict[str, Any], prompts: Sequence[str], answers: Sequence[dict[str, Any]]) -> str:
    """One self-contained page.

    Args:
        sweep: what sweep.json holds, `read`.
        prompts: as texts.
        answers: the lines of texts.jsonl, `read`.
    """
    wanted = columns(sweep)
    return page(
        "sweep.html", "Which λ?", sweep, charts(sweep), said=sentences(sweep), columns=heads(wanted),
        legend=legend(wanted), rows=[cells(row, wanted) for row in shown(sweep)], best=shown(sweep).index(_best(sweep)),
        texts=_texts(prompts, answers),
    )  # fmt: skip


def _best(sweep: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in sweep["curve"] if row["lambda"] == sweep["best"]["lambda"])


def _texts(prompts: Sequence[str], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first prompts, and what each λ and mode made of them."""
    entries = []
    for index, prompt in enumerate(prompts[:SHOWN]):
        of_prompt = [a for a in answers if a["prompt"] == index and a["sample"] == 0]
        of_prompt.sort(key=lambda a: (a["lambda"], a["mode"]))
        rows = [
            (name(a["lambda"]), a["mode"], a["text"], ", ".join(map(_earned, a["rewards"].items()))) for a in of_prompt
        ]
        entries.append({"prompt": prompt, "rows": rows})
    return entries


def _earned(reward: tuple[str, float | None]) -> str:
    return f"{reward[0]} {'failed' if reward[1] is None else f'{reward[1]:.3g}'}"
