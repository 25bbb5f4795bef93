"""A fidelity report to read and to look at: tables and a plot."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DeraWarning

if TYPE_CHECKING:
    from .fidelity import Report

COLUMNS = ("lambda", "tokens", "kl", "kl_ci", "tv", "top1", "kl_ref", "kl_aligned", "captured", "kl_rounding")
LEGEND = (
    "kl: KL(exact‖merged) in nats per token, with its 95 % interval (bootstrap over prompts). tv: total variation. top1: "
    "share of tokens with the same argmax. kl_ref, kl_aligned: how far exact DeRa is from the two models. captured: "
    "1 - kl / min(kl_ref, kl_aligned). kl_rounding: what storing the weights adds to kl."
)


def cells(result: dict[str, Any]) -> list[str]:
    """One result as the texts of `COLUMNS`; what could not be measured is a dash."""
    return [_cell(column, result[column]) for column in COLUMNS]


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    if column == "lambda":
        return f"{value:g}"
    if column == "tokens":
        return str(value)
    if column == "kl_ci":
        return f"{_number(value[0])}–{_number(value[1])}"
    if column in ("top1", "captured"):
        return f"{value:.1%}" if abs(value) < 10 else f"{value:.2g}"
    return _number(value)


def _number(value: float) -> str:
    return f"{value:.2g}" if abs(value) >= 0.001 else f"{value:.1e}" if value else "0"


def markdown(report: Report) -> str:
    """The report as Markdown: a table, its legend, and how it was measured."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(result) for result in report.results)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items() if value is not None)
    names = " ".join((report.ref + " and " + report.aligned).split()).replace("`", "'")
    return f"# Merged against exact DeRa\n\n`{names}`\n\n{table}\n\n{LEGEND}\n\nMeasured with: {settings}.\n"


def plot_fidelity(
    results: Sequence[dict[str, Any]], file: Path, rewards: dict[str, Sequence[float]] | None = None
) -> Path | None:
    """Plot kl and captured shift against λ (and reward, where given), as a PNG.

    Args:
        results: the results of a `Report`.
        file: where to write.
        rewards: name of a curve → mean reward at each λ of `results`.

    Returns:
        The file, or None (with a warning) where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn("no plot without matplotlib; pip install 'dera-merge[report]'", DeraWarning, stacklevel=2)
        return None
    results = sorted(results, key=lambda result: result["lambda"])
    lams = [result["lambda"] for result in results]
    panels = 3 if rewards else 2
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels))

    def curve(axis: Any, key: str, label: str, **style: Any) -> None:
        axis.plot(lams, [math.nan if r[key] is None else r[key] for r in results], label=label, **style)

    floor = 1e-7  # nats: below this a logarithmic axis shows rounding noise only
    for key in ("kl", "kl_ref", "kl_aligned"):
        results = [{**r, key: None if r[key] is None else max(r[key], floor)} for r in results]
    curve(axes[0], "kl", "merged", color="C0", marker="o", markersize=4)
    curve(axes[0], "kl_ref", "reference", color="C7", linestyle="--")
    curve(axes[0], "kl_aligned", "aligned", color="C3", linestyle=":")
    bands = [(r["lambda"], *r["kl_ci"]) for r in results if r.get("kl_ci")]
    if bands:
        at, low, high = zip(*bands, strict=True)
        axes[0].fill_between(at, [max(v, floor) for v in low], [max(v, floor) for v in high], color="C0", alpha=0.2, lw=0)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("KL from exact DeRa, nats per token")
    axes[0].set_title("How far one model is from exact DeRa")
    curve(axes[1], "captured", "merged", color="C0", marker="o", markersize=4)
    axes[1].axhline(0, color="0.7", linewidth=0.8)
    low = min([r["captured"] for r in results if r["captured"] is not None], default=0)
    axes[1].set_xlim(axes[0].get_xlim())
    axes[1].set_ylim(max(-1, min(0, low)) - 0.05, 1.05)
    axes[1].set_ylabel("share of the shift")
    axes[1].set_title("Captured shift")
    if rewards:
        for (name, values), style in zip(rewards.items(), ("-o", "--s"), strict=False):
            axes[2].plot(lams, values, style, label=name, markersize=4)
        axes[2].set_ylabel("mean reward")
        axes[2].set_title("Reward")
        axes[2].legend(frameon=False)
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("λ")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=140)
    return file
