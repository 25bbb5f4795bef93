"""What a sweep's texts say: a curve over all λ, what was sampled as it is, the best λ, and where to sample next."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DeraError, warn
from ..lambdas import Lam
from ..statistics.reweighting import KNOWN, Pool, column_of, interval
from .answers import Answer
from .report import Sweep, commands
from .sampler import SweepLab

SURE = 0.75  # of those at the best λ, below which an anchor is put there


class Curves:
    """Figures of what a laboratory has sampled so far.

    Args:
        lab: with its texts.
        weights: of the rewards.
    """

    def __init__(self, lab: SweepLab, weights: Sequence[float]) -> None:
        self.lab, self.weights = lab, list(weights)

    def _pool(self, grid: Sequence[Lam]) -> tuple[Pool, list[Answer], np.ndarray, np.ndarray]:
        """Exact DeRa's texts that have a reward, as a pool; and of each its answer, reward and KL at each λ."""
        answers, logp, kl = self.lab.densities(grid)
        total = self._totals(answers)
        kept = ~np.isnan(total)
        if not kept.any():
            raise DeraError("a reward failed on every text")
        answers = [a for a, k in zip(answers, kept, strict=True) if k]
        where = {lam: number for number, lam in enumerate(grid)}
        drawn, prompts = np.array([where[a.lam] for a in answers]), np.array([a.prompt for a in answers])
        return Pool(np.array(grid), logp[kept], drawn, prompts, self.lab.seed), answers, total[kept], kl[kept]

    def _totals(self, answers: Sequence[Answer]) -> np.ndarray:
        """The weighted sum of each text's rewards; NaN where one failed."""
        earned = [[answer.rewards[reward.name] for reward in self.lab.rewards] for answer in answers]
        return np.array(earned, dtype=float) @ np.array(self.weights)

    def means(self) -> dict[Lam, float]:
        """The mean reward of what was sampled at each λ, as it is."""
        mine: dict[Lam, list[Answer]] = {}
        for answer in self.lab.store.answers:
            if answer.mode == self.lab.kind:
                mine.setdefault(answer.lam, []).append(answer)
        return {lam: float(np.nanmean(self._totals(answers))) for lam, answers in mine.items()}

    def next_anchor(self, grid: Sequence[Lam]) -> Lam | None:
        """Where another anchor tells most about the best λ; None where the best is known well enough.

        That is the λ with the highest upper bound of its reward, as long as few effective texts stand for it.
        """
        pool, _, total, _ = self._pool(grid)
        _, draws = pool.mean(total)
        upper = np.where(pool.ess < KNOWN, np.inf, interval(draws)[1])
        there = {a.lam for a in self.lab.store.answers if a.mode == "exact"}
        best = int(np.argmax(upper - 1e-9 * pool.ess))
        return None if pool.ess[best] >= SURE or grid[best] in there else grid[best]

    def result(self, grid: Sequence[Lam], settings: dict[str, Any]) -> Sweep:
        """All curves, points and the answer."""
        ends, several = self.lab.pair.ends(), self.lab.pair.models > 1
        within = not several and min(grid) <= 0 and max(grid) >= 1 and settings["reweight"]
        grid = sorted({*grid, *ends}) if within else list(grid)
        pool, answers, total, kl = self._pool(grid)
        failed = sum(a.mode == self.lab.kind for a in self.lab.store.answers) - len(answers)
        if settings["reweight"] is False:
            pool = _direct(pool)
        reward, draws = pool.mean(total)
        columns: dict[str, tuple[np.ndarray, np.ndarray]] = {"reward": (reward, draws), "kl": pool.mean(kl)}
        columns["length"] = pool.mean(np.array([len(a.ids) for a in answers], dtype=float))
        if len(self.lab.rewards) > 1:
            earned = {r.name: np.array([a.rewards[r.name] for a in answers], dtype=float) for r in self.lab.rewards}
            columns |= {column_of(reward): pool.mean(values) for reward, values in earned.items()}
        known = pool.ess >= KNOWN
        alone = [grid.index(lam) for lam in ends[1:] if lam in grid]
        one = max(alone, key=lambda number: reward[number] if known[number] else -np.inf, default=None)
        for name, number in (("wins_aligned", one), ("wins_ref", grid.index(ends[0]) if ends[0] in grid else None)):
            if number is not None:
                columns[name] = pool.wins(total, number)
        if one is not None:
            columns["gain"] = reward - reward[one], draws - draws[:, [one]]
        curve = []
        bounds = {name: interval(each) for name, (_, each) in columns.items()}
        for number, lam in enumerate(grid):
            row: dict[str, Any] = {"lambda": lam, "ess": float(pool.ess[number]), "known": bool(known[number])}
            for name, (values, _) in columns.items():
                row[name] = float(values[number])
                row[f"{name}_ci"] = bounds[name][:, number].tolist()
            curve.append(row)
        if not known.any():
            raise DeraError("no λ has enough texts to say anything; give more --samples, or shorter texts")
        chosen = np.where(known, reward, -np.inf)
        best = int(np.argmax(chosen))
        where = _where_best(grid, np.where(known, draws, -np.inf))
        if several:
            reach = list(zip(*(grid[i] for i in np.flatnonzero(known)), strict=True))
            edge = any(x in (min(each), max(each)) for x, each in zip(grid[best], reach, strict=True))
        else:
            edge = best in (0, len(grid) - 1) or not known[max(best - 1, 0)] or not known[min(best + 1, len(grid) - 1)]
        answer: dict[str, Any] = {"lambda": grid[best], "interval": where, "at_the_edge": bool(edge)}
        if several:
            answer["log_ratio"] = self.lab.log_ratio(grid[best])
            answer["gain_over"] = None if one is None else grid[one]
        answer["tells_apart"] = bool(np.ptp(reward[known]) > 0)
        answer |= {key: curve[best][key] for key in ("reward", "reward_ci", "kl", "ess")}
        if "gain" in columns:
            answer |= {"gain": curve[best]["gain"], "gain_ci": curve[best]["gain_ci"]}
            answer["more_than_noise"] = bool(curve[best]["gain_ci"][0] > 0)
        if (both := self._choices()) is not None:
            answer["sampled"] = both
        settings = settings | {"failed": failed}
        if failed:
            warn(f"a reward failed on {failed} of {failed + len(answers)} texts, twice; they are left out")
        names = (self.lab.pair.ref.source.name, self.lab.pair.aligned_name)
        texts = self.lab.asked.plain, self.lab.store.answers
        result = Sweep(*names, curve, self._points(), answer, settings, None, [], *texts)
        result.commands = commands(result, self.lab.pair, self.lab.path) if answer["tells_apart"] else []
        return result

    def _choices(self) -> dict[str, Any] | None:
        """Which of the λ that both were sampled at each of exact and merged would choose: mode → `lambda`, `interval`.

        The noise is theirs in common, and at the ends they are one model. None where there are fewer than three such λ.
        """
        ends = self.lab.pair.ends()
        places = {mode: {a.lam for a in self.lab.store.answers if a.mode == mode} for mode in ("exact", "merged")}
        common = sorted(places["exact"] & (places["merged"] | set(ends)))
        if len(common) < 3 or not places["merged"]:
            return None
        found: dict[str, Any] = {}
        for mode in ("exact", "merged"):
            mine = [
                a for a in self.lab.store.answers if a.lam in common and a.mode == ("exact" if a.lam in ends else mode)
            ]
            reward, draws = self._as_sampled(mine, common, self._totals(mine))
            found[mode] = {"lambda": common[int(np.argmax(reward))], "interval": _where_best(common, draws)}
        return found

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
        """What was sampled, as it is: no weights."""
        points = []
        for mode in ("exact", "merged"):
            for lam in sorted({a.lam for a in self.lab.store.answers if a.mode == mode}):
                mine = [a for a in self.lab.store.answers if a.mode == mode and a.lam == lam]
                total = self._totals(mine)
                kept = ~np.isnan(total)
                point: dict[str, Any] = {
                    "mode": mode, "lambda": lam, "texts": len(mine), "failed": int((~kept).sum()),
                    "length": float(np.mean([len(a.ids) for a in mine])), "distinct": _distinct([a.text for a in mine]),
                }  # fmt: skip
                if kept.any():
                    value, draws = self._as_sampled(mine, [lam], total)
                    point |= {"reward": float(value[0]), "reward_ci": interval(draws)[:, 0].tolist()}
                if mode == "merged":
                    point["kl"] = float(self.lab.merged_kl(lam).mean())
                points.append(point)
        return points


def _direct(pool: Pool) -> Pool:
    """The same texts without reweighting: each stands for the λ that it was drawn at alone."""
    own = np.arange(len(pool.lams)) == pool.drawn[:, None]
    return Pool(pool.lams, np.where(own, 0.0, -np.inf), pool.drawn, pool.prompt_of, pool.seed)


def _distinct(texts: Sequence[str]) -> float:
    """Share of different ones among all pairs of neighbouring words."""
    pairs = [pair for text in texts for words in [text.split()] for pair in itertools.pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _where_best(lams: Sequence[Lam], draws: np.ndarray) -> list[Any]:
    """95 % of the λ that are best in bootstrap draws (DRAWS, λ): two numbers, or two for each aligned model."""
    return np.quantile(np.array(lams)[np.argmax(draws, axis=1)], [0.025, 0.975], axis=0).T.tolist()
