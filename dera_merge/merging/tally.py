"""How much of λΔ the stored weights kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..lambdas import Lam, name, numbers
from ..models.names import layer_kind
from .rounding import Rounding
from .theta import Sums

ENOUGH = 0.9  # share of λΔ that must be kept; with less a tensor counts as lost
# ‖error‖/‖λΔ‖ above which the noise is said. Errors are independent of each other and changes are not, so that as much
# noise as λΔ does little; several times as much is a matter for compare.
LOUD = 3.0
NO_CHANGE = "Δ = 0: the two have the same weights, and every λ is the reference; give the model that was trained"


@dataclass
class Tally:
    """How much of λΔ the stored weights kept, per kind of layer."""

    kinds: dict[str, Sums] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # tensors with Δ ≠ 0 of which nothing survived
    _tensor: tuple[str, Sums] = field(default_factory=lambda: ("", Sums()))

    def add(self, name: str, sums: Sums) -> None:
        """The sums of the next slice; slices of one tensor come one after another."""
        if name != self._tensor[0]:
            self._tensor = (name, Sums())
        self._tensor[1].add(sums)
        self.kinds.setdefault(layer_kind(name), Sums()).add(sums)

    def tensor_done(self) -> bool:
        """Whether anything of the last tensor's λΔ survived, if there was any."""
        name, sums = self._tensor
        if sums.square and not sums.moved:
            self.lost.append(name)
        return name not in self.lost

    def why_reference(self, lam: Lam) -> str | None:
        """Why every stored weight is the reference's, though λ asks for another model; None where it is as asked."""
        if not any(numbers(lam)) or not self.kinds or any(sums.moved for sums in self.kinds.values()):
            return None
        if any(sums.square for sums in self.kinds.values()):
            return f"at λ={name(lam)} nothing of Δ survives rounding; --dtype float32 keeps it"
        return NO_CHANGE

    def merge(self, record: dict[str, Any]) -> None:
        """Add another tally, as its `record`."""
        self.lost += record["lost"]
        for kind, row in record["sums"].items():
            self.kinds.setdefault(kind, Sums()).add(Sums(**row))

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {"sums": {kind: vars(sums) for kind, sums in self.kinds.items()}, "lost": self.lost}

    def summary(self) -> dict[str, Any]:
        """`kept` = ⟨stored-θ_ref, λΔ⟩/‖λΔ‖² and `error` = ‖stored-θ(λ)‖/‖λΔ‖, null where λΔ = 0, and what was odd."""

        def figures(sums: Sums) -> dict[str, Any]:
            square = sums.square or math.nan
            ratios = {"kept": sums.cross / square, "error": (sums.error / square) ** 0.5}
            ratios = {key: None if math.isnan(ratio) else ratio for key, ratio in ratios.items()}
            return ratios | {"weights": sums.weights, "saturated": sums.saturated, "nonfinite": sums.nonfinite}

        total = Sums()
        for kind in sorted(self.kinds):
            total.add(self.kinds[kind])
        per_kind = {kind: figures(sums) for kind, sums in sorted(self.kinds.items())}
        return figures(total) | {"lost": self.lost, "per_kind": per_kind}


def doubt(kept: float | None, error: float | None, rounding: Rounding, lam: Lam) -> str | None:
    """What to know of an output that is little of what λ asks for, or much else; None where it is as asked.

    Args:
        kept, error: as in `Tally.summary`.
        rounding: how the output was rounded.
        lam: its λ.
    """
    if kept is None or error is None:
        return None
    if kept < ENOUGH:
        remedy = "" if rounding == "stochastic" else ", --rounding stochastic keeps it on average, with noise"
        return f"at λ={name(lam)} {rounding} rounding keeps {kept:.1%} of λΔ; --dtype float32 keeps it{remedy}"
    if error > LOUD:
        return (f"at λ={name(lam)} the noise of {rounding} rounding is {error:.3g} times as large as λΔ; "
                "--dtype float32 has none, compare measures what it does")  # fmt: skip
    return None
