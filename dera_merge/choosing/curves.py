"""What a sweep's texts say: a curve over all λ, what was sampled as it is, the best λ, and where to sample next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DeraError, warn
from ..lambdas import Lam
from ..statistics.reweighting import KNOWN, Pool, column_of, interval
from .anchors import next_point
from .answers import Answer
from .report import Sweep, commands
from .sampler import SweepLab
from .targets import Estimates, Goal, MostReward, Pick, where_best

Figures = tuple[np.ndarray, np.ndarray]  # a figure at each λ, and in each bootstrap sample


@dataclass(frozen=True)
class Settled:
    """What is known once exact DeRa's last text is read: figures over a grid, and the λ that they choose."""

    grid: Sequence[Lam]
    found: Estimates
    pick: Pick


class Curves:
    """Figures of what a laboratory has sampled so far.

    Args:
        lab: the laboratory, with its texts.
        weights: of the rewards.
        goal: what λ is chosen by.
    """

    def __init__(self, lab: SweepLab, weights: Sequence[float], goal: Goal) -> None:
        self.lab, self.weights, self.goal = lab, list(weights), goal

    def estimates(self, grid: Sequence[Lam]) -> Estimates:
        """The figures of the curve at each λ, by name, in the order in which reports have them.

        Raises:
            DeraError: no text has a reward.
        """
        answers, logp, kl = self.lab.densities(grid)
        total = self._totals(answers)
        kept = ~np.isnan(total)
        if not kept.any():
            raise DeraError("a reward failed on every text")
        answers, total, kl = [a for a, k in zip(answers, kept, strict=True) if k], total[kept], kl[kept]
        index_of = {lam: number for number, lam in enumerate(grid)}
        drawn, prompts = np.array([index_of[a.lam] for a in answers]), np.array([a.prompt for a in answers])
        pool = Pool(np.array(grid), logp[kept], drawn, prompts, self.lab.seed)
        if not self.lab.asked.reweight:
            pool = _direct(pool)
        lengths = np.array([len(a.ids) for a in answers], dtype=float)
        columns = {"reward": pool.mean(total)} if self.lab.rewards else {}
        columns |= {"kl": pool.mean(kl), "length": pool.mean(lengths)}
        columns["kl_token"] = _ratio(columns["kl"], columns["length"])
        columns["cut"] = pool.mean((lengths >= self.lab.asked.max_new_tokens).astype(float))
        if len(self.lab.rewards) > 1:
            earned = {r.name: np.array([a.rewards[r.name] for a in answers], dtype=float) for r in self.lab.rewards}
            columns |= {column_of(reward): pool.mean(values) for reward, values in earned.items()}
        if self.lab.rewards:
            columns |= self._beside_the_ends(grid, pool, total, columns["reward"])
        return Estimates(grid, pool.ess, columns)

    def _beside_the_ends(
        self, grid: Sequence[Lam], pool: Pool, total: np.ndarray, reward: Figures
    ) -> dict[str, Figures]:
        """How each λ does beside the aligned model that earns most alone, and beside the reference."""
        (ref, *aligned), columns = self.lab.pair.ends(), {}
        best = self._best_alone(grid, pool.ess, reward[0])
        if best is not None:
            columns["wins_aligned"] = pool.wins(total, best)
        if ref in grid:
            columns["wins_ref"] = pool.wins(total, grid.index(ref))
        if best is not None:
            alone = reward[0][[best]], reward[1][:, [best]]
            columns["gain"] = reward[0] - alone[0], reward[1] - alone[1]
            if len(aligned) == 1:
                columns["kept"] = _ratio(reward, alone)
        return columns

    def _best_alone(self, grid: Sequence[Lam], ess: np.ndarray, reward: np.ndarray) -> int | None:
        """The place of the aligned model that earns most alone, if one is on the grid."""
        alone = [grid.index(lam) for lam in self.lab.pair.ends()[1:] if lam in grid]
        return max(alone, key=lambda number: reward[number] if ess[number] >= KNOWN else -np.inf, default=None)

    def _totals(self, answers: Sequence[Answer]) -> np.ndarray:
        """The weighted sum of each text's rewards; NaN where one failed."""
        earned = [[answer.rewards[reward.name] for reward in self.lab.rewards] for answer in answers]
        return np.array(earned, dtype=float) @ np.array(self.weights)

    def means(self) -> dict[Lam, float]:
        """The mean reward of the texts sampled at each λ, without weights."""
        answers_at: dict[Lam, list[Answer]] = {}
        for answer in self.lab.store.answers:
            if answer.mode == self.lab.kind:
                answers_at.setdefault(answer.lam, []).append(answer)
        return {lam: float(np.nanmean(self._totals(answers))) for lam, answers in answers_at.items()}

    def next_anchor(self, grid: Sequence[Lam]) -> Lam | None:
        """Where another anchor tells most about the λ to choose; None where that is known well enough."""
        wanted = self.goal.next(self.estimates(grid))
        sampled = {a.lam for a in self.lab.store.answers if a.mode == "exact"}
        return None if wanted in sampled else wanted

    def next_point(self, anchors: Sequence[Lam], first: Sequence[Lam]) -> Lam | None:
        """Where to sample next if texts stand for their own λ alone; see `anchors.next_point`."""
        if isinstance(self.goal, MostReward):  # no model has to read texts for that
            return next_point(self.means(), first, self.lab.seed)
        worth = self.goal.worth(self.estimates(anchors))
        return next_point(dict(zip(anchors, worth.tolist(), strict=True)), first, self.lab.seed)

    def settled(self, grid: Sequence[Lam], reweight: bool) -> Settled:
        """The λ that exact DeRa's texts choose. Raises DeraError where no λ has enough texts."""
        ends, several = self.lab.pair.ends(), self.lab.pair.models > 1
        within = not several and min(grid) <= 0 and max(grid) >= 1 and reweight
        grid = sorted({*grid, *ends}) if within else list(grid)
        found = self.estimates(grid)
        if not found.known.any():
            raise DeraError("no λ has enough texts to say anything; give more --samples, or shorter texts")
        pick = self.goal.pick(found)
        if pick.lam not in grid and reweight:  # it lies between two of them
            grid = sorted({*grid, pick.lam})
            found = self.estimates(grid)
        return Settled(grid, found, pick)

    def result(self, settled: Settled, settings: dict[str, Any]) -> Sweep:
        """All curves, points and the answer."""
        grid, found, pick = settled.grid, settled.found, settled.pick
        several = self.lab.pair.models > 1
        best, known = found.at(pick.lam), found.known
        curve = []
        bounds = {name: interval(resampled) for name, (_, resampled) in found.columns.items()}
        for number, lam in enumerate(grid):
            row: dict[str, Any] = {"lambda": lam, "ess": float(found.ess[number]), "known": bool(known[number])}
            for name, (values, _) in found.columns.items():
                row[name] = float(values[number])
                row[f"{name}_ci"] = bounds[name][:, number].tolist()
            curve.append(row)
        if several:
            reach = list(zip(*(grid[i] for i in np.flatnonzero(known)), strict=True))
            edge = any(x in (min(values), max(values)) for x, values in zip(grid[best], reach, strict=True))
        else:
            edge = best in (0, len(grid) - 1) or not known[max(best - 1, 0)] or not known[min(best + 1, len(grid) - 1)]
        answer: dict[str, Any] = {"lambda": grid[best], "interval": pick.interval, "at_the_edge": bool(edge)}
        if several:
            alone = self._best_alone(grid, found.ess, found.columns["reward"][0])
            answer["log_ratio"] = self.lab.log_ratio(grid[best])
            answer["gain_over"] = None if alone is None else grid[alone]
        answer["tells_apart"] = bool(np.ptp(found.columns[self.goal.column][0][known]) > 0)
        shown = ("reward", "reward_ci", "kl", "kl_ci", "kl_token", "kl_token_ci", "length", "length_ci", "cut", "ess")
        answer |= {key: curve[best][key] for key in shown if key in curve[best]}
        if "gain" in found.columns:
            answer |= {"gain": curve[best]["gain"], "gain_ci": curve[best]["gain_ci"]}
            answer["more_than_noise"] = bool(curve[best]["gain_ci"][0] > 0)
        if pick.target is not None:
            column = pick.target["column"]
            reached = {"reached": curve[best][column], "reached_ci": curve[best][f"{column}_ci"]}
            answer["target"] = pick.target | reached
        if (choices := self._choices()) is not None:
            answer["sampled"] = choices
        answers = [a for a in self.lab.store.answers if a.mode == self.lab.kind]
        failed = int(np.isnan(self._totals(answers)).sum())
        settings = settings | {"failed": failed}
        if failed:
            warn(f"a reward failed on {failed} of {len(answers)} texts, twice; they are left out")
        names = (self.lab.pair.ref.source.name, self.lab.pair.aligned_name)
        texts = self.lab.asked.plain, self.lab.store.answers
        path = self.lab.path
        result = Sweep(*names, curve, self._points(), answer, settings, None, [], *texts)
        result.commands = commands(result.best["lambda"], self._names(), path and path.name) if result.chosen else []
        return result

    def _names(self) -> list[str]:
        """The words of a command line that name the models."""
        pair = self.lab.pair
        names = [pair.ref.source.name, pair.aligned.source.name]
        names += [word for side in pair.sides[2:] for word in ("--aligned", side.source.name)]
        names += ["--stack"] if pair.stacked else []
        return names + (["--new-tokens", "aligned"] if pair.brings_tokens else [])

    def _choices(self) -> dict[str, Any] | None:
        """Which λ exact DeRa and the merged model each choose, of those sampled from both: mode → `lambda`, `interval`.

        Both have the same noise, and at the ends they are one model. None where there are fewer than three such λ.
        """
        ends = self.lab.pair.ends()
        places = {mode: {a.lam for a in self.lab.store.answers if a.mode == mode} for mode in ("exact", "merged")}
        common = sorted(places["exact"] & (places["merged"] | set(ends)))
        if len(common) < 3 or not places["merged"] or not self.lab.rewards:
            return None
        choices: dict[str, Any] = {}
        for mode in ("exact", "merged"):
            answers = [
                a for a in self.lab.store.answers if a.lam in common and a.mode == ("exact" if a.lam in ends else mode)
            ]
            reward, draws = self._as_sampled(answers, common, self._totals(answers))
            choices[mode] = {"lambda": common[int(np.argmax(reward))], "interval": where_best(common, draws)}
        return choices

    def _as_sampled(
        self, answers: Sequence[Answer], lams: Sequence[Lam], total: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Pool.mean` of these rewards, each for the λ of its text; texts without one (NaN) are left out."""
        kept = ~np.isnan(total)
        answers = [a for a, k in zip(answers, kept, strict=True) if k]
        drawn, prompts = np.array([lams.index(a.lam) for a in answers]), np.array([a.prompt for a in answers])
        pool = Pool(np.array(lams), np.zeros((len(answers), len(lams))), drawn, prompts, self.lab.seed)
        return _direct(pool).mean(total[kept])

    def _points(self) -> list[dict[str, Any]]:
        """Figures of the texts of each mode and λ, without weights."""
        points = []
        for mode in ("exact", "merged"):
            for lam in sorted({a.lam for a in self.lab.store.answers if a.mode == mode}):
                answers = [a for a in self.lab.store.answers if a.mode == mode and a.lam == lam]
                total = self._totals(answers)
                kept = ~np.isnan(total)
                point: dict[str, Any] = {
                    "mode": mode, "lambda": lam, "texts": len(answers), "failed": int((~kept).sum()),
                    "length": float(np.mean([len(a.ids) for a in answers])),
                    "distinct": _distinct([a.text for a in answers]),
                    "cut": float(np.mean([len(a.ids) >= self.lab.asked.max_new_tokens for a in answers])),
                }  # fmt: skip
                if self.lab.rewards and kept.any():
                    value, draws = self._as_sampled(answers, [lam], total)
                    point |= {"reward": float(value[0]), "reward_ci": interval(draws)[:, 0].tolist()}
                if mode == "merged":
                    point["kl"] = float(self.lab.merged_kl(lam).mean())
                points.append(point)
        return points


def _direct(pool: Pool) -> Pool:
    """The same texts without reweighting: each stands for the λ that it was drawn at alone."""
    is_drawn = np.arange(len(pool.lams)) == pool.drawn[:, None]
    return Pool(pool.lams, np.where(is_drawn, 0.0, -np.inf), pool.drawn, pool.prompt_of, pool.seed)


def _ratio(over: Figures, under: Figures) -> Figures:
    """One figure in terms of another; NaN where that is not above 0."""
    return over[0] / np.where(under[0] > 0, under[0], np.nan), over[1] / np.where(under[1] > 0, under[1], np.nan)


def _distinct(texts: Sequence[str]) -> float:
    """How many different pairs there are among all pairs of neighbouring words, as a share."""
    pairs = [pair for text in texts for words in [text.split()] for pair in itertools.pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
