"""A fidelity report to read and to look at: tables, plots, and one page that needs nothing else.

The page's charts are matplotlib's, as SVG inside of it, in the colour of the text around them, which suits dark
screens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..lambdas import Vector, ends, is_end
from ..statistics.verdict import VERDICTS, in_bits
from .frame import FLOOR, draw_curve, figure_of, have_matplotlib, no_plots, number, one_line, over_lambda, page

COLUMNS = (
    "lambda",
    "tokens",
    "kl",
    "kl_ci",
    "tv",
    "top1",
    "kl_ref",
    "kl_aligned",
    "captured",
    "kl_rounding",
    "verdict",
)
MEASURED = ("kl", "kl_ci", "kl_ref", "kl_aligned")  # what has a resolution, in nats
LEGEND = (
    "kl: KL(exact‖merged) in nats per token, with its 95 % interval (bootstrap over prompts). tv: total variation. "
    "top1: share of tokens with the same argmax. kl_ref, kl_aligned: how far exact DeRa is from the two models. "
    "captured: 1 - kl / min(kl_ref, kl_aligned). kl_rounding: what storing the weights adds to kl."
)
NO_BAND = (math.nan, math.nan)


def cells(result: dict[str, Any]) -> list[str]:
    """One result as the texts of `COLUMNS`; what could not be measured is a dash."""
    least = result.get("resolution") or 0.0
    texts = [_cell(column, _resolved(result[column], least) if column in MEASURED else result[column])
             for column in COLUMNS]  # fmt: skip
    if is_unresolved(result):
        texts[COLUMNS.index("kl")] = f"≤ {number(result['resolution'])}"
    return texts


def _resolved(value: Any, least: float) -> Any:
    """A figure, or bounds of one, in nats, with 0 for what is less than can be told from it."""
    if isinstance(value, list | tuple):
        return [_resolved(each, least) for each in value]
    return 0.0 if value is not None and abs(value) < least else value


def is_unresolved(result: dict[str, Any]) -> bool:
    """Whether kl is no more than noise of the measurement; at both ends it is nothing by construction."""
    kl, resolution = result["kl"], result.get("resolution")
    return None not in (kl, resolution) and kl < resolution and not is_end(result["lambda"])


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column == "lambda":
        return f"{value:g}"
    if column in ("tokens", "verdict"):
        return str(value)
    if column == "kl_ci":
        return f"{number(value[0])}–{number(value[1])}"
    if column in ("top1", "captured"):
        return f"{value:.1%}" if abs(value) < 10 else f"{value:.2g}"
    return number(value)


def headline(report: dict[str, Any]) -> str:
    """The verdict on all λ in one sentence."""
    lams = {word: [row["lambda"] for row in report["results"] if row["verdict"] == word] for word in VERDICTS}
    parts = [f"{word} at λ = {', '.join(f'{lam:g}' for lam in lams[word])}" for word in VERDICTS if lams[word]]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def sentences(result: dict[str, Any]) -> list[str]:
    """What one λ's figures say, in words."""
    said = [f"λ = {result['lambda']:g}: {result['verdict']}; {result['why']}."]
    if is_unresolved(result):
        said.append(f"kl is below what this measurement resolves, {number(result['resolution'])} nats.")
    if result.get("ladder") and not is_end(result["lambda"]):
        rungs = {int(bits): kl for bits, kl in result["ladder"].items()}
        said.append(f"The merge is {in_bits(result['ladder_kl'], rungs)} of the same two models is from themselves.")
    if (line := result.get("line")) and not is_end(result["lambda"]) and result["kl"]:
        low, high = line["difference_ci"] or (math.nan, math.nan)
        said.append(
            f"The straight line is at {number(line['kl'])}, {line['kl'] / result['kl']:.2g} times as far (path less "
            f"line: {low:.1e} to {high:.1e})."
        )
    said += log_ratio_sentence(result.get("log_ratio"))
    if coupled := result.get("coupled"):
        text = f"Under the same noise {coupled['identical']:.0%} of texts come out the same"
        if coupled["first_difference"] is not None:
            text += f"; the others part after {coupled['first_difference']:.0f} tokens (median)"
        if coupled.get("reward_difference") is not None:
            low, high = coupled["reward_difference_ci"] or (math.nan, math.nan)
            difference = f"{coupled['reward_difference']:+.2g} ({low:.2g} to {high:.2g})"
            text += f"; the merge's reward less exact DeRa's is {difference}"
        said.append(text + ".")
    return said


def log_ratio_sentence(ratio: dict[str, Any] | None) -> list[str]:
    """What mixing several log-ratios does to their size, where more than one is mixed."""
    if ratio is None or ratio["scale"] is None or sum(value != 0 for value in ratio["restored"]) < 2:
        return []
    sizes, restored = ", ".join(map(number, ratio["sizes"])), "+".join(f"{value:g}" for value in ratio["restored"])
    return [
        f"The mixed log-ratio is {number(ratio['mixed'])} nats in size, the aligned models' own are {sizes}; "
        f"λ = {restored} would restore their mean size."
    ]


def sequence_sentence(report: dict[str, Any]) -> str | None:
    """How far per-token DeRa itself is from the sequence-level mixture, where the two are furthest apart."""
    rows = [row for row in report["results"] if not is_end(row["lambda"]) and row["sequence"]["ess_share"] is not None]
    if not rows:
        return None
    row = min(rows, key=lambda row: row["sequence"]["ess_share"])
    sequence, bound = row["sequence"], "" if row["sequence"]["ess_within_prompts"] else "at least "
    per_token, per_text = (f"{sequence[key]:.2g}" for key in ("log_normaliser_per_token", "log_normaliser"))
    return (
        f"Per-token DeRa is not the sequence-level mixture π_ref^(1-λ)·π_aligned^λ: at λ = {row['lambda']:g} its "
        f"log-normaliser is {per_token} nats per token, {per_text} per text, and of {sequence['texts']} texts "
        f"{bound}{sequence['ess_share']:.0%} are left as effective sample size between the two."
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: verdict, table, its legend, and how it was measured."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(result) for result in report["results"])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    settings = ", ".join(f"{key} {value}" for key, value in _settings(report).items())
    names = one_line(f"{report['ref']} and {report['aligned']}")
    said = "\n".join(f"- {' '.join(sentences(result))}" for result in report["results"])
    if sequence := sequence_sentence(report):
        said += f"\n\n{sequence}"
    command = f"\n`{one_line(report['command'])}`\n" if report["command"] else ""
    return (
        f"# Merged against exact DeRa\n\n`{names}`\n\n**{headline(report)}**\n\n{table}\n\n{LEGEND}\n\n{said}\n\n"
        f"Measured with: {settings}.\n{command}"
    )


def _settings(report: dict[str, Any]) -> dict[str, Any]:
    """The settings that are shown."""
    hidden = ("fingerprint", "extras")
    return {key: value for key, value in report["settings"].items() if value is not None and key not in hidden}


def plot_fidelity(
    results: Sequence[dict[str, Any]], file: Path, rewards: dict[str, Sequence[float]] | None = None,
    prediction: Sequence[dict[str, Any]] = (),
) -> Path | None:  # fmt: skip
    """Plot kl and captured shift against λ (and reward, where given), as a PNG.

    Args:
        results: the results of a `Report`.
        file: where to write.
        rewards: name of a curve → mean reward at each λ of `results`.
        prediction: of a `Report`.

    Returns:
        The file, or None (with a warning) where matplotlib is not installed.
    """
    if not have_matplotlib():
        no_plots()
        return None
    draw: list[Callable[[Any], None]] = [
        lambda axis: draw_kl(axis, results, prediction), lambda axis: draw_captured(axis, results),
    ]  # fmt: skip
    if rewards:
        draw.append(lambda axis: draw_rewards(axis, results, rewards))
    figure = figure_of(draw, (5 * len(draw), 4))
    figure.savefig(file, dpi=140)
    return file


def draw_kl(axis: Any, results: Sequence[dict[str, Any]], prediction: Sequence[dict[str, Any]] = ()) -> None:
    """kl over λ with its band, the two models, and, where they are there, prediction, noise floor and quantisation."""

    def above(value: float | None) -> float | None:
        return None if value is None else max(value, FLOOR)

    draw_curve(axis, results, lambda r: above(r["kl_ref"]), label="reference", color="C7", linestyle="--")
    draw_curve(axis, results, lambda r: above(r["kl_aligned"]), label="aligned", color="C3", linestyle=":")
    rungs = sorted({bits for result in results for bits in result.get("ladder", {})}, key=int)
    for bits in rungs:
        draw_curve(axis, results, lambda r, bits=bits: above(r["ladder"][bits]), color="C2", linewidth=0.8, alpha=0.7)
        rows, at = over_lambda(axis, results)
        axis.annotate(f" {bits} bits", (at[-1], above(rows[-1]["ladder"][bits])), color="C2", fontsize=7, va="center")
    draw_curve(axis, results, lambda r: above(r.get("noise_floor")), label="bfloat16 alone", color="C4", linewidth=0.8)
    if prediction:
        for holds, style in ((True, "-"), (False, ":")):
            rows = [{**row, "kl": row["kl"] if row["holds"] == holds else None} for row in prediction]
            label = "line, predicted" if holds else "line, guessed"
            draw_curve(axis, rows, lambda r: above(r["kl"]), label=label, color="C1", linewidth=1.2, linestyle=style)
    rows = _apart_at_the_ends(results)
    style = {"color": "C1", "marker": ".", "linewidth": 1}
    draw_curve(axis, rows, lambda r: above(r.get("line", {}).get("kl")), label="line", **style)
    draw_curve(axis, rows, lambda r: above(r["kl"]), label="merged", color="C0", marker="o", markersize=4)
    rows, at = over_lambda(axis, rows)
    bands = zip(*(row.get("kl_ci") or NO_BAND for row in rows), strict=True)
    low, high = ([above(bound) for bound in bounds] for bounds in bands)
    axis.vlines(at, low, high, color="C0", linewidth=1)
    if not isinstance(rows[0]["lambda"], Vector):
        axis.fill_between(at, low, high, color="C0", alpha=0.2, lw=0)
    axis.set_yscale("log")
    axis.set_xlabel("λ")
    axis.set_ylabel("KL from exact DeRa, nats per token")
    axis.set_title("How far one model is from exact DeRa")
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _apart_at_the_ends(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results, with a gap at λ = 0 and 1 where they lie between two that were measured: kl is 0 there."""
    lams = [result["lambda"] for result in results]
    if isinstance(lams[0], Vector):
        return list(results)
    inside = (end for end in ends() if min(lams) < end < max(lams) and end not in lams)
    return [*results, *({"lambda": end, "kl": None} for end in inside)]


def draw_captured(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """The captured shift over λ."""
    rows = _apart_at_the_ends(results)
    draw_curve(axis, rows, lambda r: r.get("captured"), color="C0", marker="o", markersize=4)
    axis.axhline(0, color="0.6", linewidth=0.8)
    _, lams = over_lambda(axis, results)
    low = min([r["captured"] for r in results if r["captured"] is not None], default=0)
    margin = 0.05 * (max(lams) - min(lams) or 1)
    axis.set_xlim(min(lams) - margin, max(lams) + margin)
    axis.set_ylim(max(-1, min(0, low)) - 0.05, 1.05)
    axis.set_xlabel("λ")
    axis.set_ylabel("share of the shift")
    axis.set_title("Captured shift")


def draw_rewards(axis: Any, results: Sequence[dict[str, Any]], rewards: dict[str, Sequence[float]]) -> None:
    """Mean rewards over λ."""
    for (label, values), style in zip(rewards.items(), ("-o", "--s"), strict=False):
        axis.plot([result["lambda"] for result in results], values, style, label=label, markersize=4)
    axis.set_xlabel("λ")
    axis.set_ylabel("mean reward")
    axis.set_title("Reward")
    axis.legend(frameon=False)


def draw_positions(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """kl over the position in the text, a line for each λ."""

    def points(result: dict[str, Any]) -> list[tuple[float, float]]:
        return [(row["from"], max(row["kl"], FLOOR)) for row in result["per_position"]]

    _lines(axis, results, points, xlabel="tokens into the text", ylabel="kl, nats", title="Along the text")
    axis.set_yscale("log")


def draw_layers(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """Which layers' Δ the error comes from, as shares."""

    def points(result: dict[str, Any]) -> list[tuple[float, float]]:
        layers = result.get("layers", {})
        return [(row["layer"], row["kl"] / (layers["kl_leading_order"] or 1.0)) for row in layers.get("layers", ())]

    title = "Whose Δ the error comes from"
    _lines(axis, results, points, xlabel="layer", ylabel="share of the error", title=title, marker="o")
    axis.axhline(0, color="0.6", linewidth=0.8)


def draw_features(axis: Any, results: Sequence[dict[str, Any]]) -> None:
    """Where the merged features leave the interpolated ones."""

    def points(result: dict[str, Any]) -> list[tuple[float, float]]:
        return list(enumerate(result.get("layers", {}).get("feature_gaps", ())))

    xlabel, ylabel = "after layer (0: embeddings)", "distance / shift of the features"
    _lines(
        axis,
        results,
        points,
        xlabel=xlabel,
        ylabel=ylabel,
        title="Where features leave the interpolated ones",
        marker="o",
    )


def _lines(
    axis: Any, results: Sequence[dict[str, Any]], points: Callable[[dict[str, Any]], list[tuple[float, float]]],
    *, xlabel: str, ylabel: str, title: str, marker: str | None = None,
) -> None:  # fmt: skip
    """A line for each λ away from the ends that has points."""
    for result in _inner(results):
        if line := points(result):
            axis.plot(*zip(*line, strict=True), marker=marker, markersize=3, lw=1, label=f"λ = {result['lambda']:g}")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend(frameon=False, fontsize=7, ncols=2)


def _inner(results: Sequence[dict[str, Any]], most: int = 8) -> list[dict[str, Any]]:
    """The results away from both ends, thinned to at most eight."""
    rows = [result for result in results if not is_end(result["lambda"])]
    return rows[:: max(1, math.ceil(len(rows) / most))]


def html(report: dict[str, Any]) -> str:
    """One self-contained page: it opens from disk, fetches nothing, and suits a phone, a dark screen and paper."""
    results = report["results"]
    draw: dict[str, Callable[[Any], None]] = {
        "kl": lambda axis: draw_kl(axis, results, report["prediction"]),
        "captured": lambda axis: draw_captured(axis, results),
    }  # fmt: skip
    if _inner(results):
        draw["positions"] = lambda axis: draw_positions(axis, results)
    if any(result.get("layers") for result in results):
        draw |= {
            "layers": lambda axis: draw_layers(axis, results),
            "features": lambda axis: draw_features(axis, results),
        }
    rows = [dict(zip(COLUMNS, cells(result), strict=True)) for result in results]
    return page(
        "report.html", "Merged against exact DeRa", report, draw, headline=headline(report), columns=COLUMNS, rows=rows,
        legend=LEGEND, results=results, sentences={result["lambda"]: sentences(result) for result in results},
        settings=_settings(report), sequence=sequence_sentence(report),
    )  # fmt: skip
