"""At which λ to sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import lambdas
from ..errors import DeraError
from ..lambdas import Lam, Vector
from ..models.pair import Pair

ANCHORS = (0.0, 0.5, 1.0, 2.0)
POINTS = 33  # of the grid between the smallest and the largest λ
STEPS = {2: 0.125, 3: 0.25}  # of the grid from 0 to 1 of each of several aligned models; 0.5 for more of them
FINEST = 1 / 64  # of the range: λ that are nearer to each other are not told apart


def default_lambdas(pair: Pair, reweight: bool) -> list[Lam]:
    """The λ of interest where none are given: those that the curve spans with `reweight`, else all that are sampled."""
    models = pair.models
    if models == 1:
        return [0.0, 2.0] if reweight else lambdas.parse_lambdas(["0:2:0.25"])
    return lambdas.parse_lambdas(["+".join([f"0:1:{STEPS.get(models, 0.5)}"] * models)], models)


def grid_between(lams: Sequence[Lam]) -> list[float]:
    """A grid from the smallest to the largest λ of one aligned model; those of several are a grid already."""
    if isinstance(lams[0], Vector):
        return []
    return (np.linspace(min(lams), max(lams), POINTS).round(4) + 0.0).tolist()


def first_anchors(pair: Pair, lams: Sequence[Lam]) -> list[Lam]:
    """Where to sample first: known places within the box that `lams` span, and its ends."""
    if pair.models == 1:
        inside = {lam for lam in ANCHORS if min(lams) <= lam <= max(lams)}
        return sorted({*inside, min(lams), max(lams)})
    box = [(min(values), max(values)) for values in zip(*lams, strict=True)]
    mean = Vector([1 / len(box)] * len(box))
    places = [lam for lam in (*pair.ends(), mean) if all(a <= x <= b for x, (a, b) in zip(lam, box, strict=True))]
    corners = [Vector(corner) for corner in zip(*box, strict=True)]
    return sorted({*places, *corners})


def next_point(means: dict[Lam, float], first: Sequence[Lam], seed: int) -> Lam | None:
    """Where to sample next without weights, knowing the mean reward of some λ; None where no more can be told apart.

    Half-way between the best λ of one aligned model and its farther neighbour; with several, where optuna's sampler
    (TPE) proposes within the box that the `first` λ span.

    Raises:
        DeraError: optuna is needed and not installed.
    """
    if isinstance(first[0], Vector):
        return _proposed(means, [(min(values), max(values)) for values in zip(*first, strict=True)], seed)
    lams = sorted(means)
    best = lams.index(max(means, key=means.__getitem__))
    gaps = [(lams[i + 1] - lams[i], i) for i in (best - 1, best) if 0 <= i < len(lams) - 1]
    width, left = max(gaps, default=(0.0, 0))
    return round(lams[left] + width / 2, 6) + 0.0 if width > FINEST * (max(first) - min(first)) > 0 else None


def _proposed(means: dict[Lam, float], box: list[tuple[float, float]], seed: int) -> Vector | None:
    """The λ in the box that optuna proposes, knowing these means; None where it was sampled already."""
    try:
        import optuna
    except ImportError as error:
        raise DeraError("a search over several λ at once needs optuna: pip install 'optuna>=4.0.0'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spread = {str(k): optuna.distributions.FloatDistribution(*span) for k, span in enumerate(box)}
    # Made anew each time, so that a resumed sweep makes the same proposals.
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(means)))
    for lam, value in means.items():
        params = {str(k): x for k, x in enumerate(lam)}
        if all(a <= x <= b for x, (a, b) in zip(lam, box, strict=True)):
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, value=value))
    trial = study.ask(spread)
    proposal = Vector(round(trial.params[str(k)], 4) + 0.0 for k in range(len(box)))
    return None if proposal in means else proposal
