"""Scores of tasks over λ, what they say, and their files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..files.atomic import json_bytes, write_atomically
from ..measuring.ledger import Ledger
from ..pages.bench import html, markdown
from ..statistics.intervals import finite
from ..statistics.paired import surely_above, unbeaten
from ..statistics.reweighting import interval

Setting = tuple[Literal["exact", "merged"], float]  # a model at one λ
HEADLINES = ("acc_norm", "acc")  # what a task is judged by, where it has it; else its first metric


@dataclass
class Bench:
    """What `bench` found.

    Attributes:
        tasks: for each task and group `task`, `group`, `part_of` (of a group's tasks, else None), `items`, `fewshot`,
            `metric` (what it is judged by), and `metrics`; each of these has `metric`, `higher_is_better`, `exact` and
            `merged` (for each λ `lambda`, `value`, `ci`, and the differences to λ = 0, to λ = 1, and of merges to exact
            DeRa at that λ: `over_ref`, `over_aligned`, `over_exact`, each with its `_ci`), `best` (of exact DeRa:
            `lambda`, `value`, `interval` of λ) and `beats_both` (λ that are better than both ends by more than noise).
        pareto: λ of exact DeRa that no other beats in all tasks.
        settings: how it was found.
    """

    ref: str
    aligned: str
    tasks: list[dict[str, Any]]
    pareto: list[float]
    settings: dict[str, Any]
    ledger: Ledger | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What `bench.json` holds; never NaN or infinity."""
        return finite({
            "ref": self.ref, "aligned": self.aligned, "tasks": self.tasks, "pareto": self.pareto,
            "settings": self.settings,
        })  # fmt: skip

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write bench.json, bench.md and bench.html into a directory; returns it."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        write_atomically(folder / "bench.json", json_bytes(content))
        write_atomically(folder / "bench.md", markdown(content).encode())
        write_atomically(folder / "bench.html", html(content).encode())
        if self.ledger is not None:
            self.ledger.close()
        return folder


def headline(metrics: Sequence[str]) -> str:
    """What a task with these metrics is judged by."""
    return next((name for name in HEADLINES if name in metrics), metrics[0])


def curve(
    metric: str, settings: Sequence[Setting], value: np.ndarray, draws: np.ndarray, higher_is_better: bool
) -> dict[str, Any]:
    """One metric over λ, as `Bench.tasks` has it.

    Args:
        value: under each setting, (settings,).
        draws: the same of resampled items, (draws, settings).
    """
    at = {setting: number for number, setting in enumerate(settings)}
    ends = [at["exact", lam] for lam in (0.0, 1.0)]
    sign = 1.0 if higher_is_better else -1.0

    def bounds(of: np.ndarray) -> list[float] | None:
        return interval(of).tolist() if len(of) else None

    def row(mode: str, lam: float) -> dict[str, Any]:
        here = at[mode, lam]
        rivals = {"over_ref": ends[0], "over_aligned": ends[1]}
        if mode == "merged" and ("exact", lam) in at:
            rivals["over_exact"] = at["exact", lam]
        figures: dict[str, Any] = {"lambda": lam, "value": float(value[here]), "ci": bounds(draws[:, here])}
        for name, rival in rivals.items():
            figures |= {name: float(value[here] - value[rival])}
            figures |= {f"{name}_ci": bounds(draws[:, here] - draws[:, rival])}
        return figures

    lams = [lam for mode, lam in settings if mode == "exact"]
    exact = [at["exact", lam] for lam in lams]
    best = max(range(len(lams)), key=lambda k: (sign * value[exact[k]], -abs(lams[k])))  # of equals the nearest to 0
    span, beats = None, []
    if len(draws):
        span = interval(np.array(lams)[(sign * draws[:, exact]).argmax(1)]).tolist()
        gains = sign * (value[exact][:, None] - value[ends])
        beats = surely_above(gains, sign * (draws[:, exact][:, :, None] - draws[:, ends][:, None]))
    return {
        "metric": metric, "higher_is_better": higher_is_better,
        "exact": [row("exact", lam) for lam in lams],
        "merged": [row("merged", lam) for mode, lam in settings if mode == "merged"],
        "best": {"lambda": lams[best], "value": float(value[exact[best]]), "interval": span},
        "beats_both": [lam for lam, above in zip(lams, beats, strict=False) if above],
    }  # fmt: skip


def pareto(tasks: Sequence[dict[str, Any]]) -> list[float]:
    """The λ of exact DeRa that no other beats in all tasks (those that are part of no group), as they are judged."""
    judged = [
        (next(m for m in task["metrics"] if m["metric"] == task["metric"])) for task in tasks if not task["part_of"]
    ]
    values = [{row["lambda"]: row["value"] for row in metric["exact"]} for metric in judged]
    lams = sorted(set.intersection(*map(set, values))) if values else []
    if not lams:
        return []
    signs = [1.0 if metric["higher_is_better"] else -1.0 for metric in judged]
    scores = np.array([[sign * value[lam] for sign, value in zip(signs, values, strict=True)] for lam in lams])
    return [lam for lam, stands in zip(lams, unbeaten(scores), strict=True) if stands]
