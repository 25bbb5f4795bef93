"""What a sweep found, its files, and how to ship it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import lambdas
from ..files.atomic import json_bytes, write_atomically
from ..pages.frame import read
from ..pages.sweep import html, markdown, plot_sweep
from ..statistics.intervals import finite
from .answers import Answer


@dataclass
class Sweep:
    """What `sweep` found.

    Attributes:
        curve: for each λ of the grid `lambda`, `reward` (the weighted sum), `reward_ci`, each reward by name
            (`length_reward` where the name is one of these), `kl` (nats a text, exact DeRa from the reference),
            `kl_ci`, `kl_token` (nats a token), `length` (tokens), `cut` (share of texts that reach the limit of
            tokens), `wins_aligned`, `wins_ref`, `gain` (over λ=1; of several aligned models, over the one that earns
            most alone), `gain_ci`, `kept` (reward as a share of λ=1's), `ess` (effective texts a prompt), `known`.
            What takes a reward is not there without one.
        points: for each λ that was sampled and each mode, `reward`, `kl`, `length`, `distinct` (share of different word
            pairs), `cut`, `failed`, `texts`.
        best: the recommended λ, `lambda`, `interval` (of several aligned models, one for each), what it gains, and
            where that lies; `target`, where one was given: `by`, `value`, `met`, `reached`, `reached_ci`, ….
        settings: how it was found.
        faithful: how far the merged model at the best λ is from exact DeRa, where that was checked.
        commands: what to run to ship the best λ.
        judges: what each judge was asked, and the tokens that it took.
        answers: all texts.
        command: the command line that chose it, if there was one.
    """

    ref: str
    aligned: str
    curve: list[dict[str, Any]]
    points: list[dict[str, Any]]
    best: dict[str, Any]
    settings: dict[str, Any]
    faithful: dict[str, Any] | None = None
    commands: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    judges: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None

    @property
    def chosen(self) -> bool:
        """Whether there is a λ to ship: the texts tell λ apart, and a target that was given is met."""
        return self.best["tells_apart"] and self.best.get("target", {"met": True})["met"]

    def to_dict(self) -> dict[str, Any]:
        """What `sweep.json` holds; never NaN or infinity."""
        return finite({
            "ref": self.ref, "aligned": self.aligned, "best": self.best, "curve": self.curve, "points": self.points,
            "faithful": self.faithful, "commands": self.commands, "settings": self.settings, "command": self.command,
            **({"judges": self.judges} if self.judges else {}),
        })  # fmt: skip

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write sweep.json, sweep.md, sweep.html and, with matplotlib, sweep.png into a directory; returns it."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        write_atomically(folder / "sweep.json", json_bytes(content))
        content = read(content)
        write_atomically(folder / "sweep.md", markdown(content).encode())
        answers = [answer.to_dict() for answer in self.answers]
        write_atomically(folder / "sweep.html", html(content, self.prompts, answers).encode())
        plot_sweep(content, folder / "sweep.png")
        return folder


def commands(
    lam: lambdas.Lam, names: Sequence[str], path: str | os.PathLike[str] | None = None, beside: Path | None = None,
    asked: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """What to run to ship the recommended λ.

    Args:
        names: words that name the models.
        path: a learned path that was followed.
        beside: where the sweep's report lies; the model and its report go beside it.
        asked: words that give compare the prompts.
    """
    words = [*names, "-l", lambdas.name(lam)]
    merged, report = [place if beside is None else f"{beside}-{place}" for place in ("merged", "report")]
    lines = (
        ["merge", *words, *(["--path", os.fspath(path)] if path else []), "-o", merged],
        ["compare", *words, "--approx", merged, *asked, "-o", report],
        ["push", merged, "USER/NAME", "--report", report],
    )
    return [shlex.join(["dera-merge", *line]) for line in lines]
