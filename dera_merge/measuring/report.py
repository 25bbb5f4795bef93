"""What `compare` measured, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import lambdas
from ..errors import DeraError, warn
from ..files.atomic import json_bytes, load_json, write_atomically
from ..lambdas import Lam, Vector
from ..merging.path import Course
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..pages.fidelity import html, markdown, plot_fidelity
from ..pages.frame import read
from ..statistics.intervals import finite
from ..statistics.verdict import VERDICTS
from .ledger import Ledger


@dataclass
class Report:
    """What `compare` measured.

    Attributes:
        ref, aligned: names of the models.
        results: one dict per λ, with the figures of `compare --json`.
        settings: how it was measured.
        prediction: kl predicted over the whole range, where that was asked for.
        texts: a few texts, each with the kl of its tokens.
        command: the command line that measured it, if there was one.
        gated: what `gate` returned, if it was asked.
        per_token: λ → measure → float64 array (tokens,), in nats where it is a divergence.
        prompt_of: λ → the prompt that each of these tokens belongs to.
        ledger: the finished steps that it was made of, kept until it is saved.
    """

    ref: str
    aligned: str
    results: list[dict[str, Any]]
    settings: dict[str, Any]
    prediction: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    gated: dict[str, Any] | None = None
    per_token: dict[Lam, dict[str, np.ndarray]] = field(default_factory=dict)
    prompt_of: dict[Lam, np.ndarray] = field(default_factory=dict)
    ledger: Ledger | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds; never NaN or infinity."""
        return finite({
            "ref": self.ref, "aligned": self.aligned, "verdict": self.verdict(), "results": self.results,
            "prediction": self.prediction, "settings": self.settings, "texts": self.texts, "command": self.command,
            **({"gate": self.gated} if self.gated else {}),
        })  # fmt: skip

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Report:
        """A report as `save` wrote it, from its directory or its report.json; per-token arrays are not kept.

        Raises:
            DeraError: there is none, or `compare` did not write it, or an older version did.
        """
        file = Path(folder)
        file = file / "report.json" if file.is_dir() else file
        if not file.is_file():
            raise DeraError(f"there is no report {file}; dera-merge compare writes one")
        data = load_json(file)
        shape = {"ref": str, "aligned": str, "results": list, "settings": dict}
        if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in shape.items()):
            raise DeraError(f"{file} is no report that dera-merge compare wrote")
        if not all(isinstance(row, dict) and "verdict" in row for row in data["results"]):
            raise DeraError(f"{file} was written by an older version, without verdicts; compare again")
        kept = ("ref", "aligned", "results", "settings", "prediction", "texts", "command")
        data = read(data)
        return cls(**{key: data[key] for key in kept if key in data}, gated=data.get("gate"))

    def at(self, lam: Lam) -> dict[str, Any]:
        """The result at one λ. Raises DeraError where it was not measured."""
        for result in self.results:
            if result["lambda"] == lam:
                return result
        raise DeraError(f"the report has no λ={lam:g}; compare there too")

    def safe_stretches(self) -> list[tuple[Lam, Lam]]:
        """From which λ to which all measured ones are safe; of several aligned models, each safe λ by itself."""
        stretches: list[tuple[Lam, Lam]] = []
        before: Lam | None = None  # the λ before, if it is safe
        for result in sorted(self.results, key=lambda result: result["lambda"]):
            lam = result["lambda"]
            if result.get("verdict") != "safe":
                before = None
                continue
            # Both ends are exact whatever lies between, so they alone say nothing of it.
            joined = before is not None and not (before == 0.0 and lam == 1.0) and not isinstance(lam, Vector)
            stretches.append((stretches.pop()[0] if joined else lam, lam))
            before = lam
        return stretches

    def verdict(self) -> dict[str, list[Lam]]:
        """Verdict → the λ that have it."""
        return {word: [result["lambda"] for result in self.results if result["verdict"] == word] for word in VERDICTS}

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write report.json, report.md, report.html and, with matplotlib, PNGs into a directory; returns it."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        write_atomically(folder / "report.json", json_bytes(content))
        content = read(content)
        write_atomically(folder / "report.md", markdown(content).encode())
        write_atomically(folder / "report.html", html(content).encode())
        plot_fidelity(self.results, folder / "fidelity.png", prediction=self.prediction)
        if self.ledger:
            self.ledger.close()
        return folder

    def gate(self, max_kl: float | None, min_top1: float | None) -> dict[str, Any]:
        """Whether every λ keeps the limits: kl at most `max_kl` nats, top1 at least `min_top1`. `save` writes it.

        A kl below the resolution of the measurement counts as that, but at the ends, where every merge is exact.
        """

        def kl_of(result: dict[str, Any]) -> float:
            least = 0.0 if lambdas.is_end(result["lambda"]) else result.get("resolution", 0.0)
            return math.inf if result["kl"] is None else max(result["kl"], least)

        failed = [
            result["lambda"]
            for result in self.results
            if (max_kl is not None and not kl_of(result) <= max_kl)
            or (min_top1 is not None and not (result["top1"] is not None and result["top1"] >= min_top1))
        ]
        self.gated = {"passed": not failed, "max_kl": max_kl, "min_top1": min_top1, "failed": failed}
        return self.gated


def warn_of_unsafe(pair: Pair, lams: Sequence[Lam], report: str | os.PathLike[str], course: Course | None) -> None:
    """Warn of λ that lie outside of every stretch that a report calls safe.

    Args:
        course: what is followed; None: the straight line with one λ.

    Raises:
        DeraError: the report is of another pair, or of another path.
    """
    loaded = Report.load(report)
    if loaded.settings.get("fingerprint") != fingerprint(pair):
        raise DeraError(f"{report} is a report of another pair, or of other weights; compare this one")
    measured = (loaded.settings.get("path") or {}).get("sha256")
    if measured != (course.sha256 if course else None):
        raise DeraError(
            f"{report} measured {'another' if measured else 'no'} path; compare with the --path or --lambda-for that "
            "you merge"
        )
    stretches = loaded.safe_stretches()
    for lam in lams:
        if not lambdas.is_end(lam) and not any(low <= lam <= high for low, high in stretches):
            safe = (
                ", ".join(f"{low:g} to {high:g}" if low < high else f"{low:g}" for low, high in stretches) or "nowhere"
            )
            warn(f"λ={lam:g} lies outside of what {report} calls safe ({safe})")
