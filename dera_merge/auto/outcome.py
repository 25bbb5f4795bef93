"""What came of a run: the answer, the files that tell of it, and the commands that follow."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import json_bytes, write_atomically
from ..measuring.report import Report
from ..merging.recipe import read_recipe
from ..pages.auto import html
from ..publishing import card
from ..statistics.intervals import finite

ROW = ("lambda", "tokens", "kl", "kl_ci", "tv", "top1", "kl_ref", "kl_aligned", "captured", "verdict", "why")


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        folder: where everything lies.
        lam: the λ that was merged.
        chosen_by: `"reward"`, `"target_kl"`, `"given"`, or `"half-way"` where there was nothing to choose by.
        inspection: as from `inspect_pair`.
        along: the report along λ.
        found: what sweep found, where λ was chosen.
        line: figures of the straight line at λ, where they were measured.
        learning: whether a path was learned, and why, or why not.
        report: of what was written.
        steps: name → `seconds`, and whether the step was `reused`.
    """

    folder: Path
    lam: float
    chosen_by: str
    inspection: dict[str, Any]
    along: Report
    found: dict[str, Any] | None
    line: dict[str, Any] | None
    learning: dict[str, Any]
    report: Report
    steps: dict[str, dict[str, Any]]

    @property
    def model(self) -> Path:
        """The directory of the model."""
        return self.folder / "model"

    @property
    def page(self) -> Path:
        """The page that tells it all."""
        return self.folder / "index.html"

    @property
    def commands(self) -> dict[str, str]:
        """What to type next."""
        model, report = shlex.quote(os.fspath(self.model)), shlex.quote(os.fspath(self.folder / "report"))
        return {
            "serve it": f"vllm serve {model}",
            "publish it": f"dera-merge push {model} USER/NAME --report {report}",
        }

    def to_dict(self) -> dict[str, Any]:
        """What `auto.json` holds; never NaN or infinity."""
        row, total = self.report.at(self.lam), self.inspection["total"]
        return finite({
            "ref": self.along.ref, "aligned": self.along.aligned, "lambda": self.lam, "chosen_by": self.chosen_by,
            "best": None if self.found is None else self.found["best"],
            "delta": {key: total[key] for key in ("relative", "weights", "kept", "error")},
            "safe": [list(stretch) for stretch in self.along.safe_stretches()],
            "line": self.line and {key: self.line[key] for key in ("kl", "tv", "verdict", "why")},
            "learning": self.learning, "result": {key: row[key] for key in ROW},
            "steps": {name: {key: step[key] for key in ("seconds", "reused")} for name, step in self.steps.items()},
            "model": os.fspath(self.model), "page": os.fspath(self.page), "commands": self.commands,
        })  # fmt: skip

    def save(self) -> None:
        """Write auto.json, card.md and index.html."""
        content, recipe = self.to_dict(), read_recipe(self.model)
        write_atomically(self.folder / "auto.json", json_bytes(content))
        aligned = Path(str(recipe["aligned"]["name"]).partition("@")[0]).name or "model"
        name = re.sub(r"[^\w.-]+", "-", f"{aligned}-merged", flags=re.ASCII)
        values = card.metadata(recipe, self.report, f"USER/{name}", {})
        text = card.edited(None, values, card.section(recipe, self.report, f"USER/{name}", "main"), name)
        write_atomically(self.folder / "card.md", text.encode())
        write_atomically(self.page, html(content, self.along.to_dict(), self.found, self.report.to_dict()).encode())
