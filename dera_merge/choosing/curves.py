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

SURE = 0.75  # effective texts a prompt at the best λ, below which an anchor is put there


class Curves:
    """Figures of what a laboratory has sampled so far.

    Args:
        lab: the laboratory, with its texts.
        weights: of the rewards.
    """

    def __init__(self, lab: SweepLab, weights: Sequence[float]) -> None:
        self.lab, self.weights = lab, list(weights)

    def _pool(self, grid: Sequence[Lam]) -> tuple[Pool, list[Answer], np.ndarray, np.ndarray]:
        """The texts that answer and have a reward, as a pool; and of each its answer, reward, and KL at each λ."""
        answers, logp, kl = self.lab.densities(grid)
        total = self._totals(answers)
        kept = ~np.isnan(total)
        if not kept.any():
            raise DeraError("a reward failed on every text")
        answers = [a for a, k in zip(answers, kept, strict=True) if k]
        index_of = {lam: number for number, lam in enumerate(grid)}
        drawn, prompts = np.array([index_of[a.lam] for a in answers]), np.array([a.prompt for a in answers])
        return Pool(np.array(grid), logp[kept], drawn, prompts, self.lab.seed), answers, total[kept], kl[kept]

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
        """Where another anchor tells most about the best λ; None where the best is known well enough.

        That is the λ with the highest upper bound of its reward, as long as few effective texts stand for it.
        """
        pool, _, total, _ = self._pool(grid)
        _, draws = pool.mean(total)
        upper = np.where(pool.ess < KNOWN, np.inf, interval(draws)[1])
        sampled = {a.lam for a in self.lab.store.answers if a.mode == "exact"}
        best = int(np.argmax(upper - 1e-9 * pool.ess))
        return None if pool.ess[best] >= SURE or grid[best] in sampled else grid[best]

    def result(self, grid: Sequence[Lam], settings: dict[str, Any]) -> Sweep:
        """All curves, points and the answer. Raises DeraError where no λ has enough texts."""
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
        best_alone = max(alone, key=lambda number: reward[number] if known[number] else -np.inf, default=None)
        for name, number in (
            ("wins_aligned", best_alone),
            ("wins_ref", grid.index(ends[0]) if ends[0] in grid else None),
        ):
            if number is not None:
                columns[name] = pool.wins(total, number)
        if best_alone is not None:
            columns["gain"] = reward - reward[best_alone], draws - draws[:, [best_alone]]
        curve = []
        bounds = {name: interval(resampled) for name, (_, resampled) in columns.items()}
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
        best_range = _where_best(grid, np.where(known, draws, -np.inf))
        if several:
            reach = list(zip(*(grid[i] for i in np.flatnonzero(known)), strict=True))
            edge = any(x in (min(values), max(values)) for x, values in zip(grid[best], reach, strict=True))
        else:
            edge = best in (0, len(grid) - 1) or not known[max(best - 1, 0)] or not known[min(best + 1, len(grid) - 1)]
        answer: dict[str, Any] = {"lambda": grid[best], "interval": best_range, "at_the_edge": bool(edge)}
        if several:
            answer["log_ratio"] = self.lab.log_ratio(grid[best])
            answer["gain_over"] = None if best_alone is None else grid[best_alone]
        answer["tells_apart"] = bool(np.ptp(reward[known]) > 0)
        answer |= {key: curve[best][key] for key in ("reward", "reward_ci", "kl", "ess")}
        if "gain" in columns:
            answer |= {"gain": curve[best]["gain"], "gain_ci": curve[best]["gain_ci"]}
            answer["more_than_noise"] = bool(curve[best]["gain_ci"][0] > 0)
        if (choices := self._choices()) is not None:
            answer["sampled"] = choices
        settings = settings | {"failed": failed}
        if failed:
            warn(f"a reward failed on {failed} of {failed + len(answers)} texts, twice; they are left out")
        names = (self.lab.pair.ref.source.name, self.lab.pair.aligned_name)
        texts = self.lab.asked.plain, self.lab.store.answers
        result = Sweep(*names, curve, self._points(), answer, settings, None, [], *texts)
        result.commands = commands(result, self.lab.pair, self.lab.path) if answer["tells_apart"] else []
        return result

    def _choices(self) -> dict[str, Any] | None:
        """Which λ exact DeRa and the merged model each choose, of those sampled from both: mode → `lambda`, `interval`.

        Both have the same noise, and at the ends they are one model. None where there are fewer than three such λ.
        """
        ends = self.lab.pair.ends()
        places = {mode: {a.lam for a in self.lab.store.answers if a.mode == mode} for mode in ("exact", "merged")}
        common = sorted(places["exact"] & (places["merged"] | set(ends)))
        if len(common) < 3 or not places["merged"]:
            return None
        choices: dict[str, Any] = {}
        for mode in ("exact", "merged"):
            answers = [
                a for a in self.lab.store.answers if a.lam in common and a.mode == ("exact" if a.lam in ends else mode)
            ]
            reward, draws = self._as_sampled(answers, common, self._totals(answers))
            choices[mode] = {"lambda": common[int(np.argmax(reward))], "interval": _where_best(common, draws)}
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
                }  # fmt: skip
                if kept.any():
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


def _distinct(texts: Sequence[str]) -> float:
    """How many different pairs there are among all pairs of neighbouring words, as a share."""
    pairs = [pair for text in texts for words in [text.split()] for pair in itertools.pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _where_best(lams: Sequence[Lam], draws: np.ndarray) -> list[Any]:
    """95 % of the λ that are best in bootstrap draws (DRAWS, λ): two numbers, or two for each aligned model."""
    return np.quantile(np.array(lams)[np.argmax(draws, axis=1)], [0.025, 0.975], axis=0).T.tolist()
