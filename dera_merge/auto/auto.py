"""From a pair to the λ to ship: inspect, compare, choose, calibrate, merge, measure what was written, and tell of it.

Each step is one call of the room that does it; its result lies in the output directory, and is used again by the next
run (`journal.py`). What is decided between the steps is decided here: at which λ one looks, which λ is merged, and
whether a learned path is worth its time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..calibrating.calibrate import calibrate
from ..choosing import harness
from ..choosing.bench import bench
from ..choosing.report import Sweep
from ..choosing.sweep import sweep
from ..errors import DeraError
from ..files.atomic import json_bytes, load_json, write_atomically
from ..files.room import alone
from ..lambdas import is_end
from ..measuring.compare import compare
from ..measuring.inspection import inspect_pair
from ..measuring.report import Report
from ..merging.merge import merge
from ..merging.output import check_clear_of_inputs
from ..merging.path import Curve
from ..merging.recipe import verify
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..pages.frame import number, read
from ..processes import launched
from ..progress import Progress, unheard
from ..texts import prompts as prompt_files
from ..texts.rewards import as_reward, checked
from .journal import Journal
from .outcome import Outcome

LOOKED_AT = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
HALF_WAY = 0.5
COMPARED, FLOORED = 16, 4  # prompts, on which merges are measured, and on which bfloat16 is
LESSONS, LESSON_TOKENS = 256, 48  # of calibrate
# Seconds that calibrate takes of a text, in those that compare takes of one: both sample and read it, and calibrate
# goes over it three times forth and back. It was 1.3 on the demo pair; 2 errs on the long side.
LESSON_COST = 2.0
PATIENCE = 10 * 60  # seconds that a learned path may take without being asked for
GAIN = "1.9 to 3.5 times nearer to exact DeRa on a real pair (docs/fidelity.md)"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What a run is to find, and how.

    Attributes:
        prompts: rows or texts; None: 32 general ones.
        rewards: what λ is chosen by: functions, `Reward`s or specs as for `load_reward`, each after its name.
        target_kl: or the KL from the reference that λ is to have, nats a token.
        tasks: or tasks of lm-evaluation-harness.
        include_path: a directory with task files of one's own.
        limit: items of each task, at most.
        lam: or λ itself.
        calibrate: whether to learn a path; None: where the line is not safe and it takes no longer than ten minutes.
        max_new_tokens: length of sampled texts.
        seed: of everything random.
        device: where the models run.
        compute_dtype: in what they run, as for `compare`.
    """

    prompts: Sequence[str | dict[str, Any]] | None = None
    rewards: Sequence[Any] = ()
    target_kl: float | None = None
    tasks: Sequence[str] = ()
    include_path: str | os.PathLike[str] | None = None
    limit: int | None = None
    lam: float | None = None
    calibrate: bool | None = None
    max_new_tokens: int = 48
    seed: int = 0
    device: str | torch.device = "cpu"
    compute_dtype: torch.dtype | str = torch.float32


def auto(
    pair: Pair, out: str | os.PathLike[str], wanted: Wanted | None = None, progress: Progress | None = None
) -> Outcome:  # fmt: skip
    """Find the λ to ship and make the model, everything measured on the way in one directory.

    Args:
        pair: the two models.
        out: a directory, new or of an earlier run: finished steps whose settings are the same are used again.
        wanted: what to find; default: λ = 0.5, half-way.
        progress: called as work goes on.

    Returns:
        What came of it. `out` holds `inspect.json`, `compare/`, `sweep/` where λ was chosen, `path.safetensors` where
        one was learned, `model/`, `report/` of what was written, `card.md`, `auto.json` and `index.html`.

    Raises:
        DeraError: something stops a merge, nothing tells λ apart, no λ meets the target, or a step fails; finished
            steps stay.
    """
    wanted, tell, folder = wanted or Wanted(), progress or unheard, Path(out)
    pair.only_pair("auto is")
    if launched()[1] > 1:
        raise DeraError("auto runs in one process; start it without accelerate launch or torchrun")
    ways = (bool(wanted.rewards) or wanted.target_kl is not None, bool(wanted.tasks), wanted.lam is not None)
    if sum(ways) > 1:
        raise DeraError("give one thing to choose λ by: --reward or --target-kl, --tasks, or --lambda itself")
    if folder.exists() and not folder.is_dir():
        raise DeraError(f"{folder} is a file; give a directory as --output")
    check_clear_of_inputs(folder, pair)
    if wanted.rewards and not (folder / "sweep" / "sweep.json").is_file():  # hours before sweep asks them
        rows = prompt_files.default(pair.tokenizer) if wanted.prompts is None else wanted.prompts
        checked([as_reward(reward) for reward in wanted.rewards], prompt_files.encode(rows, pair.tokenizer))
    if wanted.tasks and not (folder / "bench" / "bench.json").is_file():
        harness.check()
        harness.manager_of(wanted.tasks, None if wanted.include_path is None else Path(wanted.include_path))
    with alone(folder):
        return _Run(pair, folder, wanted, tell).outcome()


class _Run:
    """One run: the steps, and what they have in common."""

    def __init__(self, pair: Pair, folder: Path, wanted: Wanted, tell: Progress) -> None:
        self.pair, self.folder, self.wanted, self.tell = pair, folder, wanted, tell
        self.journal = Journal(folder)
        rows = wanted.prompts
        self.prompts = list(prompt_files.default(pair.tokenizer) if rows is None else rows)
        self.few = self.prompts[:COMPARED]
        self.how: dict[str, Any] = {
            "max_new_tokens": wanted.max_new_tokens, "seed": wanted.seed, "device": wanted.device,
            "compute_dtype": wanted.compute_dtype, "progress": tell,
        }  # fmt: skip
        self.mark = {"pair": fingerprint(pair), "tokens": wanted.max_new_tokens, "seed": wanted.seed,
                     "compute": str(wanted.compute_dtype)}  # fmt: skip

    def outcome(self) -> Outcome:
        inspection = self.inspect()
        asked = self.wanted.lam if self.wanted.lam is not None else None if self.chooses else HALF_WAY
        lams = sorted({*LOOKED_AT, *([] if asked is None or is_end(asked) else [asked])})
        along = self.compare("compare", lams, self.few)
        found = None if asked is not None else self.bench() if self.wanted.tasks else self.sweep()
        lam = asked if found is None else found["best"]["lambda"]
        line = next((row for row in along.results if row["lambda"] == lam), None) or (found or {}).get("faithful")
        if line is None and not is_end(lam):
            line = self.compare("line", [lam], self.few).at(lam)
        curve, learning = self.learn(lam, line)
        weights = self.merge(lam, curve)
        report = self.compare("report", [lam], self.few, approx=weights)
        outcome = Outcome(self.folder, lam, self.why(found), inspection, along, found, line, learning, report,
                          self.journal.steps)  # fmt: skip
        outcome.save()
        return outcome

    @property
    def chooses(self) -> bool:
        """Whether there is something to choose λ by."""
        return bool(self.wanted.rewards or self.wanted.tasks) or self.wanted.target_kl is not None

    def why(self, found: dict[str, Any] | None) -> str:
        """What λ was chosen by, in a word."""
        if found is not None:
            return "tasks" if self.wanted.tasks else "reward" if self.wanted.target_kl is None else "target_kl"
        return "half-way" if self.wanted.lam is None else "given"

    def inspect(self) -> dict[str, Any]:
        """How far the two are apart, from their files. Raises DeraError where something stops a merge."""
        file = self.folder / "inspect.json"

        def work(_: bool) -> dict[str, Any]:
            result = inspect_pair(self.pair, None, lambda done, total: self.tell("reading", done, total))
            if result["problem"]:
                raise DeraError(result["problem"])
            write_atomically(file, json_bytes(result))
            return result

        return self.journal.step("inspect", self.mark["pair"], work, lambda: _json(file))

    def compare(self, name: str, lams: list[float], prompts: Sequence[Any], approx: Path | None = None) -> Report:
        """How far merges are from exact DeRa: along λ, or of what was written."""
        out = self.folder / name
        weights = None if approx is None else verify(approx)["files"]
        settings = {**self.mark, "lams": lams, "prompts": _digest(prompts), "weights": weights, "floored": FLOORED}

        def work(resume: bool) -> Report:
            made = compare(
                self.pair, lams, prompts, approx=approx, extra_prompts=FLOORED, unfinished=out, resume=resume,
                overwrite=not resume, **self.how,
            )  # fmt: skip
            made.save(out)
            return Report.load(out)

        return self.journal.step(name, settings, work, lambda: Report.load(out))

    def bench(self) -> dict[str, Any]:
        """What bench found, and under `best` the λ of the largest mean gain. Raises DeraError where none is apart."""
        out, wanted = self.folder / "bench", self.wanted
        names = list(wanted.tasks)
        settings = {**self.mark, "tasks": names, "limit": wanted.limit, "include_path": str(wanted.include_path)}

        def work(resume: bool) -> dict[str, Any]:
            how = {key: value for key, value in self.how.items() if key != "max_new_tokens"}
            bench(
                self.pair, names, limit=wanted.limit, include_path=wanted.include_path, out=out, resume=resume,
                overwrite=not resume, **how,
            ).save(out)  # fmt: skip
            return _json(out / "bench.json")

        found = self.journal.step("bench", settings, work, lambda: _json(out / "bench.json"))
        gains = mean_gains(found["tasks"])
        if not gains or max(gains.values()) == min(gains.values()):
            raise DeraError(f"these tasks tell no λ apart ({out / 'bench.html'} has the scores): give others, more "
                            "items, or --lambda itself")  # fmt: skip
        lam = max(gains, key=lambda lam: (gains[lam], -abs(lam)))
        return found | {"best": {"lambda": lam, "gain": gains[lam]}}

    def sweep(self) -> dict[str, Any]:
        """What sweep found. Raises DeraError where nothing tells λ apart, or no λ meets the target."""
        out, wanted = self.folder / "sweep", self.wanted
        names = [getattr(reward, "name", str(reward)) for reward in wanted.rewards]
        settings = {**self.mark, "prompts": _digest(self.prompts), "rewards": names, "target_kl": wanted.target_kl}

        def work(resume: bool) -> dict[str, Any]:
            found: Sweep = sweep(
                self.pair, self.prompts, wanted.rewards, target_kl=wanted.target_kl, out=out, resume=resume,
                overwrite=not resume, **self.how,
            )  # fmt: skip
            found.save(out)
            return _json(out / "sweep.json")

        found = read(self.journal.step("sweep", settings, work, lambda: _json(out / "sweep.json")))
        best, figures = found["best"], f"{out / 'sweep.html'} has the figures"
        if not best["tells_apart"]:
            raise DeraError(f"nothing tells λ apart: {figures}; give other prompts, another reward, or --lambda itself")
        if not best.get("target", {"met": True})["met"]:
            nearest = f"λ = {best['lambda']:g} comes nearest with {number(best['target']['reached'])}"
            raise DeraError(f"no λ from 0 to 2 has a KL of {wanted.target_kl:g} nats a token, {nearest}: {figures}; "
                            "give another --target-kl, or --lambda itself")  # fmt: skip
        return found

    def learn(self, lam: float, line: dict[str, Any] | None) -> tuple[Curve | None, dict[str, Any]]:
        """A path, where it is wanted and nearer than the line; and what was decided, and why."""
        file = self.folder / "path.safetensors"
        takes = self.learning_takes()
        about = f"about {_spell(takes)} on this machine"
        decided: dict[str, Any] = {"learned": False, "takes": takes}
        none = "no path was learned: "
        if is_end(lam):
            return None, decided | {"why": f"{none}λ = {lam:g} is one of the two models itself"}
        if lam < 0:
            return None, decided | {"why": f"{none}they are for λ from 0 on"}
        if self.wanted.calibrate is False:
            return None, decided | {"why": f"{none}--no-calibrate"}
        if self.wanted.calibrate is None and line["verdict"] == "safe":
            return None, decided | {"why": f"{none}the straight line is safe at λ = {lam:g}; it would take {about}"}
        if self.wanted.calibrate is None and takes > PATIENCE:
            return None, decided | {"why": f"{none}it would take {about}; --calibrate learns one all the same ({GAIN})"}
        settings = {**self.mark, "lam": lam, "texts": LESSONS}
        settings["prompts"] = None if self.wanted.prompts is None else _digest(self.prompts)

        def work(resume: bool) -> Curve:
            log.info("calibrate: the straight line is %s at λ = %g. Learning a path takes %s; paths came %s.",
                     line["verdict"], lam, about, GAIN)  # fmt: skip
            how = self.how | {"max_new_tokens": LESSON_TOKENS}
            return calibrate(self.pair, [0.0, max(1.0, lam)], self.wanted.prompts, texts=LESSONS, out=file,
                             resume=resume, overwrite=not resume, **how)  # fmt: skip

        try:
            curve = self.journal.step("calibrate", settings, work, lambda: Curve.load(file))
        except DeraError as error:
            if self.wanted.calibrate:
                raise
            return None, decided | {"why": f"{none}{error}"}
        side = curve.recipe["held_out"]["inner" if lam <= 1 else "outer"]
        decided |= {"held_out": side, "seconds": self.journal.steps["calibrate"]["seconds"]}
        if side["path"] >= side["line"]:
            return None, decided | {"why": "on held-out texts what was learned is no nearer than the line"}
        gain = f"{side['line'] / side['path']:.2g} times nearer to exact DeRa than the line"
        return curve, decided | {"learned": True, "why": f"on {side['texts']} held-out texts the path is {gain}"}

    def learning_takes(self) -> float:
        """Seconds that learning a path will take, going by what the texts took that were compared."""
        texts = len(self.few) * len(LOOKED_AT)
        each = self.journal.steps["compare"]["seconds"] / texts
        return each * LESSONS * LESSON_COST * LESSON_TOKENS / self.wanted.max_new_tokens

    def merge(self, lam: float, curve: Curve | None) -> Path:
        """The model."""
        out = self.folder / "model"
        settings = {"pair": self.mark["pair"], "lam": lam, "path": curve and curve.sha256, "seed": self.wanted.seed}

        def work(resume: bool) -> Path:
            (made,) = merge(
                self.pair, out, [lam], path=curve, seed=self.wanted.seed, resume=resume, overwrite=not resume,
                progress=lambda done, total: self.tell("merging (MiB)", done >> 20, total >> 20),
            )  # fmt: skip
            return made

        def load() -> Path:
            verify(out)
            return out

        return self.journal.step("merge", settings, work, load)


def mean_gains(tasks: Sequence[dict[str, Any]]) -> dict[float, float]:
    """λ → what exact DeRa gains there over the reference, in parts of the reference's score, mean over the tasks.

    Args:
        tasks: as bench has them; a group counts as one, and its tasks not by themselves.
    """
    gains: dict[float, list[float]] = {}
    for task in tasks:
        metric = next(m for m in task["metrics"] if m["metric"] == task["metric"])
        value = {row["lambda"]: row["value"] for row in metric["exact"] if row["value"] is not None}
        if 0.0 not in value:
            continue
        sign, scale = 1.0 if metric["higher_is_better"] else -1.0, abs(value[0.0]) or 1.0
        for lam, score in value.items() if not task["part_of"] else ():
            gains.setdefault(lam, []).append(sign * (score - value[0.0]) / scale)
    most = max(map(len, gains.values()), default=0)  # tasks that generate are answered at a few λ only
    return {lam: sum(each) / most for lam, each in gains.items() if len(each) == most}


def _json(file: Path) -> Any:
    """Raises DeraError where there is none."""
    if not file.is_file():
        raise DeraError(f"there is no {file} any more")
    return load_json(file)


def _digest(prompts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(list(prompts)).encode()).hexdigest()


def _spell(seconds: float) -> str:
    """A time in words."""
    return f"{number(seconds / 60)} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
