"""What λ is chosen by: the most reward; a KL or a length to hit; or the fewest tokens at nearly the reward of λ=1.

Each goal picks a λ from estimates over a grid, and says where another anchor would tell most about that choice. What is
`known` of the grid counts alone. Of several λ that hit a figure, the nearest to 1 counts, the aligned model as it was
trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from ..errors import DeraError
from ..lambdas import Lam, Vector
from ..statistics.reweighting import KNOWN, interval

Cost = Literal["tokens", "kl"]
COLUMN_OF: dict[str, str] = {"tokens": "length", "kl": "kl"}  # of a cost
SURE = 0.75  # effective texts a prompt at the λ that is chosen, below which an anchor is put there
DIGITS = 4  # of a λ that lies between those of the grid


@dataclass(frozen=True)
class Estimates:
    """Figures at every λ of a grid.

    Attributes:
        lams: the grid, ascending.
        ess: effective texts a prompt, (L,).
        columns: name → the figure, (L,), and what it is in each bootstrap sample of the prompts, (DRAWS, L).
    """

    lams: Sequence[Lam]
    ess: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]]

    @cached_property
    def known(self) -> np.ndarray:
        """Where enough texts stand for a λ, (L,)."""
        return self.ess >= KNOWN

    def at(self, lam: Lam) -> int:
        """The place of the λ on the grid that is nearest to this one."""
        return int(np.argmin(np.abs(np.array(self.lams) - lam)))


@dataclass(frozen=True)
class Pick:
    """The λ that a goal chooses.

    Attributes:
        lam: maybe between those of the grid.
        interval: 95 % of what bootstrap samples choose; of several aligned models, one for each.
        target: what was aimed at and what is reached, for reports; None where nothing but the most was asked for.
    """

    lam: Lam
    interval: list[Any]
    target: dict[str, Any] | None = None

    @property
    def met(self) -> bool:
        """Whether the target is met; without one it is."""
        return self.target is None or self.target["met"]


class Goal(Protocol):
    """What λ is chosen by."""

    @property
    def column(self) -> str:
        """The figure in which λ must differ for a choice."""
        ...

    def pick(self, found: Estimates) -> Pick:
        """The λ to choose."""
        ...

    def next(self, found: Estimates) -> Lam | None:
        """The λ where texts tell most about the choice, if enough are not there already."""
        ...

    def worth(self, found: Estimates) -> np.ndarray:
        """How good each λ of the grid is by itself, (L,): the choice is where that is largest."""
        ...


class MostReward:
    """The λ that earns most."""

    column = "reward"

    def pick(self, found: Estimates) -> Pick:
        best, (_, draws) = int(np.argmax(self.worth(found))), found.columns["reward"]
        return Pick(found.lams[best], where_best(found.lams, np.where(found.known, draws, -np.inf)))

    def next(self, found: Estimates) -> Lam | None:
        """The λ with the highest upper bound of its reward, as long as few effective texts stand for it."""
        upper = np.where(found.known, interval(found.columns["reward"][1])[1], np.inf)
        best = int(np.argmax(upper - 1e-9 * found.ess))
        return None if found.ess[best] >= SURE else found.lams[best]

    def worth(self, found: Estimates) -> np.ndarray:
        return np.where(found.known, found.columns["reward"][0], -np.inf)


@dataclass(frozen=True)
class Hit:
    """The λ at which a figure of the curve is a given one.

    Attributes:
        what: `"kl"` (nats a token, exact DeRa from the reference on its own texts) or `"length"` (tokens a text).
        value: which figure.
    """

    what: Literal["kl", "length"]
    value: float

    @property
    def column(self) -> str:
        """The figure in the curve."""
        return "kl_token" if self.what == "kl" else "length"

    def pick(self, found: Estimates) -> Pick:
        lams = np.array(found.lams, dtype=float)[found.known]
        values, draws = (figures[..., found.known] for figures in found.columns[self.column])
        lam, met = crossing(lams, values, self.value)
        drawn = [crossing(lams, row, self.value)[0] for row in draws]
        target = {"by": self.what, "column": self.column, "value": self.value, "met": met,
                  "known_from": float(values.min()), "known_to": float(values.max())}  # fmt: skip
        return Pick(round(lam, DIGITS) + 0.0, np.quantile(drawn, [0.025, 0.975]).tolist(), target)

    def next(self, found: Estimates) -> Lam | None:
        if not found.known.any():
            return None
        nearest = found.at(self.pick(found).lam)  # of the grid, for which all texts are read already
        return None if found.ess[nearest] >= SURE else found.lams[nearest]

    def worth(self, found: Estimates) -> np.ndarray:
        return np.where(found.known, -np.abs(found.columns[self.column][0] - self.value), -np.inf)


@dataclass(frozen=True)
class Keep:
    """The λ of the least cost among those that surely keep a share of λ=1's reward.

    Surely: the lower bound of reward(λ) / reward(1), paired by prompts, is no less than the share.

    Attributes:
        share: of λ=1's reward, 0.98, say.
        minimise: the cost.
    """

    share: float
    minimise: Cost = "tokens"

    @property
    def column(self) -> str:
        """The cost in the curve."""
        return COLUMN_OF[self.minimise]

    def pick(self, found: Estimates) -> Pick:
        """Raises DeraError where λ=1 is not known."""
        if 1.0 not in found.lams or not found.known[found.at(1.0)]:
            raise DeraError("--keep asks for a share of λ=1's reward, and too few texts say what that is; give -l and "
                            "--anchors that hold 1, or more --samples")  # fmt: skip
        one, worth, keeping = found.at(1.0), self.worth(found), self._keeping(found)
        cost, draws = found.columns[self.column]
        best = int(np.argmax(worth))
        with np.errstate(invalid="ignore"):  # no KL at λ=0
            saved, saved_draws = 1 - cost[best] / cost[one], 1 - draws[:, best] / draws[:, one]
        target = {
            "by": "keep", "column": "kept", "value": self.share, "minimise": self.minimise, "met": bool(best != one),
            "of_ci": interval(found.columns["reward"][1])[:, one].tolist(), "saved": float(saved),
            "saved_ci": interval(saved_draws).tolist(),
            "keeping": [lam for lam, keeps in zip(found.lams, keeping, strict=True) if keeps],
        }  # fmt: skip
        return Pick(found.lams[best], where_best(found.lams, np.where(keeping, -draws, -np.inf)), target)

    def _keeping(self, found: Estimates) -> np.ndarray:
        """Which λ surely keep the share, (L,): 1 does; no other where 1 does not surely earn more than 0."""
        one = found.at(1.0)
        earns = interval(found.columns["reward"][1])[0, one] > 0
        keeping = found.known & earns & (interval(found.columns["kept"][1])[0] >= self.share)
        keeping[one] = True
        return keeping

    def next(self, found: Estimates) -> Lam | None:
        """The cheapest λ that may keep its share, as long as few effective texts stand for it."""
        may = ~found.known | (interval(found.columns["kept"][1])[1] >= self.share)
        cost = np.where(found.known, found.columns[self.column][0], -np.inf)
        best = int(np.argmin(np.where(may, cost, np.inf) - 1e-9 * found.ess))
        return None if found.ess[best] >= SURE else found.lams[best]

    def worth(self, found: Estimates) -> np.ndarray:
        return np.where(self._keeping(found), -found.columns[self.column][0], -np.inf)


def crossing(lams: np.ndarray, values: np.ndarray, wanted: float) -> tuple[float, bool]:
    """Where a curve through these points is `wanted`, and whether it is anywhere; if not, where it is nearest to that.

    Args:
        lams: ascending, (L,).
        values: the curve there, (L,); straight between.
    """
    off = values - wanted
    places = lams[off == 0].tolist()
    for left in np.flatnonzero(off[:-1] * off[1:] < 0):
        places.append(float(lams[left] + (lams[left + 1] - lams[left]) * off[left] / (off[left] - off[left + 1])))
    if places:
        return min(places, key=lambda lam: (abs(lam - 1), -lam)), True
    return float(lams[np.argmin(np.abs(off))]), False


def where_best(lams: Sequence[Lam], draws: np.ndarray) -> list[Any]:
    """95 % of the λ that are best in bootstrap draws (DRAWS, λ): two numbers, or two for each aligned model."""
    return np.quantile(np.array(lams)[np.argmax(draws, axis=1)], [0.025, 0.975], axis=0).T.tolist()


def goal(
    target_kl: float | None, target_length: float | None, keep: float | None, minimise: Cost, rewards: int,
    lams: Sequence[Lam],
) -> Goal:  # fmt: skip
    """What λ is chosen by, as it was asked for.

    Raises:
        DeraError: several things are asked for at once, one is out of its range, or there is nothing to choose by.
    """
    asked = [value is not None for value in (target_kl, target_length, keep)]
    if sum(asked) > 1:
        raise DeraError("give one of --target-kl, --target-length and --keep")
    if not rewards and (keep is not None or not any(asked)):
        raise DeraError("there is nothing to choose by; give --reward, or --target-kl, or --target-length")
    if not any(asked):
        return MostReward()
    if isinstance(lams[0], Vector):
        raise DeraError("--target-kl, --target-length and --keep are for one aligned model")
    if keep is not None:
        if not 0 < keep <= 1:
            raise DeraError(f"--keep is a share of λ=1's reward, above 0 and at most 1, not {keep:g}")
        if not min(lams) <= 1 <= max(lams):
            raise DeraError("--keep asks for a share of λ=1's reward; let -l span 1")
        return Keep(keep, minimise)
    hit = Hit("kl", target_kl) if target_kl is not None else Hit("length", target_length or 0.0)
    if not 0 < hit.value < np.inf:
        raise DeraError(f"--target-{hit.what} is a number above 0, not {hit.value:g}")
    return hit
