"""How much of λΔ the stored weights kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..models.names import layer_kind
from .theta import Sums


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

    def is_reference(self) -> bool:
        """Whether λΔ is not zero, and every stored weight is the reference's all the same."""
        return any(sums.square for sums in self.kinds.values()) and not any(sums.moved for sums in self.kinds.values())

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
