"""A learned path: a curve through both models that follows exact DeRa more closely than the straight line.

    θ(λ) = θ_ref + g(λ)·Δ + λ(1-λ)·L·diag(s(λ))·R,      g(λ) = λ + λ(1-λ)·(c + d·λ)

for each linear layer's weight, with (c, d), the low-rank L·R, and how each of its directions r goes with λ,
s_r(λ) = 1 + a_r·(λ-1) + b_r·(λ-1)², learned by `calibrate`. Whatever was learned, θ(0) = θ_ref and θ(1) = θ_aligned (a
Bézier curve's ends, as in Garipov et al., 2018). A path is a small safetensors file that is bound to its pair by a
fingerprint of their weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load, save

from .. import lambdas
from ..errors import DeraError
from ..files.atomic import write_atomically
from ..files.buffers import as_bytes
from ..files.checkpoint import read_header
from ..lambdas import Lam
from ..models.fingerprint import fingerprint

if TYPE_CHECKING:
    from ..models.pair import Pair

VERSION = 2


@dataclass(frozen=True)
class Bend:
    """What a course does to one tensor at one λ: θ_ref + gain·Δ + left·right.

    Attributes:
        gain: what stands in the place of λ; of several aligned models, a vector.
        left: (rows, rank) float32, λ(1-λ)·s(λ) included, or None.
        right: (rank, columns) float32, or None.
    """

    gain: Lam
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def add_to(self, value: torch.Tensor, first: int) -> None:
        """Add rows [first, first + len(value)) of left·right in place."""
        if self.left is not None and self.right is not None:
            value.addmm_(self.left[first : first + len(value)].to(value.dtype), self.right.to(value.dtype))


class Course(Protocol):
    """What a merge follows in the place of θ_ref + λΔ with one λ: a learned path (`Curve`), or `parts.ByPart`."""

    @property
    def sha256(self) -> str:
        """SHA-256 of all that a merge depends on."""

    def check_lambda(self, lam: Lam) -> None:
        """Raises DeraError where it does not go there."""

    def used(self, lam: Lam) -> set[Lam]:
        """The λ at which tensors that differ between the sides are."""

    def at(self, name: str, lam: Lam) -> Bend | None:
        """What to do to a tensor at λ; None where it goes along the straight line."""

    def rank_at(self, name: str) -> int:
        """What it adds to the rank of a tensor's adapter."""

    def describe(self) -> dict[str, Any]:
        """What `dera_merge.json` and reports say of it: `kind`, `sha256`, …."""


@dataclass(frozen=True)
class Part:
    """One tensor's path: (c, d), and of its low-rank curve the two factors and (a, b) of each direction, in float32."""

    gain: torch.Tensor  # (2,)
    left: torch.Tensor | None = None  # (rows, rank)
    right: torch.Tensor | None = None  # (rank, columns)
    profile: torch.Tensor | None = None  # (rank, 2)

    def broken(self) -> bool:
        """Whether this is no part of a path: shapes that do not fit, or numbers that are not finite."""
        given = [value for value in vars(self).values() if value is not None]
        if tuple(self.gain.shape) != (2,) or not all(value.isfinite().all() for value in given):
            return True
        if len(given) == 1:
            return False
        if len(given) != 4 or [value.ndim for value in given] != [1, 2, 2, 2]:
            return True
        return not self.left.shape[1] == len(self.right) == len(self.profile) or self.profile.shape[1] != 2


def along(profile: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """λ(1-λ)·s(λ): how far the directions of a low-rank curve go.

    Args:
        profile: (a, b) of each direction, (rank, 2).
        lam: λ, (count,).

    Returns:
        (count, rank).
    """
    beyond = (lam - 1)[:, None]
    return (lam * (1 - lam))[:, None] * (1 + beyond * profile[:, 0] + beyond**2 * profile[:, 1])


@dataclass
class Curve:
    """A path for the tensors of one pair.

    Attributes:
        span: the smallest and the largest λ that it was learned for; 0 and 1 are exact always.
        fingerprint: of the pair, see `fingerprint`.
        parts: tensor name → `Part`.
        recipe: how it was learned.
        name: what to call it: the file.
    """

    span: tuple[float, float]
    fingerprint: str
    parts: dict[str, Part]
    recipe: dict[str, Any] = field(default_factory=dict)
    name: str = "a path"

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Curve:
        """Read a path file. Raises DeraError where it is none, or of a newer version."""
        path = Path(file)
        if not path.is_file():
            raise DeraError(f"there is no path file {path}; dera-merge calibrate writes one")
        read_header(path)  # checks every offset
        metadata = _metadata(path)
        if metadata.get("format") != "dera-merge path":
            raise DeraError(f"{path} is a safetensors file, but no path that dera-merge calibrate wrote")
        if metadata.get("version") != str(VERSION):
            version = f"of version {metadata.get('version')}, this program knows {VERSION}"
            raise DeraError(f"{path} is a path {version}; calibrate again")
        content = path.read_bytes()
        parts: dict[str, dict[str, torch.Tensor]] = {}
        try:
            span = json.loads(metadata["lambda"])
            recipe = dict(json.loads(metadata["recipe"]))
            for key, tensor in load(content).items():
                kind, name = key.split("/", 1)
                if kind not in {part.name for part in fields(Part)} or tensor.dtype != torch.float32:
                    raise ValueError(key)
                parts.setdefault(name, {})[kind] = tensor
            curve = cls(
                (float(span[0]), float(span[1])), metadata["fingerprint"],
                {name: Part(**kinds) for name, kinds in parts.items()}, recipe, str(path),
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, IndexError, RecursionError) as error:
            raise DeraError(f"{path} is broken: {error}; calibrate again") from error
        for name, part in curve.parts.items():
            if part.broken():
                raise DeraError(f"{path} is broken: what it says of {name} is no path; calibrate again")
        return curve

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the path; absent or whole."""
        path = Path(file)
        tensors = {
            f"{kind}/{name}": value.contiguous()
            for name, part in self.parts.items()
            for kind, value in vars(part).items()
            if value is not None
        }
        metadata = {
            "format": "dera-merge path", "version": str(VERSION), "kind": self.kind, "lambda": json.dumps(self.span),
            "fingerprint": self.fingerprint, "recipe": json.dumps(self.recipe, ensure_ascii=False),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, metadata))
        self.name = str(path)
        return path

    @property
    def sha256(self) -> str:
        """SHA-256 of all that a merge depends on: the pair, the range, and every number."""
        digest = hashlib.sha256(json.dumps([self.span, self.fingerprint]).encode())
        for name, part in sorted(self.parts.items()):
            for kind, value in vars(part).items():
                if value is not None:
                    digest.update(f"{name} {kind} {tuple(value.shape)}".encode())
                    digest.update(as_bytes(value.contiguous()).tobytes())
        return digest.hexdigest()

    @property
    def kind(self) -> str:
        """`curve` with low-rank parts, `gains` without."""
        return "curve" if any(part.left is not None for part in self.parts.values()) else "gains"

    def check(self, pair: Pair) -> None:
        """Raises DeraError where this path was learned for another pair, or its shapes do not fit."""
        if self.fingerprint != fingerprint(pair):
            names = " and ".join(str(self.recipe.get(key)) for key in ("ref", "aligned"))
            raise DeraError(f"{self.name} was learned for another pair ({names}); calibrate this one")
        for name, part in self.parts.items():
            info = pair.tensors.get(name)
            if info is None or (part.left is not None and (len(part.left), part.right.shape[1]) != info.shape):
                raise DeraError(f"{self.name} bends {name}, which has another shape in this pair; calibrate again")

    def check_lambda(self, lam: float) -> None:
        """Raises DeraError where λ is neither an end nor within the range that was learned."""
        if not lambdas.is_end(lam) and not self.span[0] <= lam <= self.span[1]:
            low, high = self.span
            raise DeraError(
                f"{self.name} was learned for λ from {low:g} to {high:g}, not for {lam:g}; calibrate with it"
            )

    def used(self, lam: float) -> set[float]:
        """λ itself: it is one for all tensors."""
        return {lam}

    def rank_at(self, name: str) -> int:
        """The rank of a tensor's curve."""
        part = self.parts.get(name)
        return 0 if part is None or part.right is None else len(part.right)

    def at(self, name: str, lam: float) -> Bend | None:
        """What to do to a tensor at λ; None where it goes along the straight line."""
        part = self.parts.get(name)
        if part is None or lambdas.is_end(lam):
            return None
        c, d = part.gain.tolist()
        gain = lam + lam * (1 - lam) * (c + d * lam)
        return Bend(
            gain, None if part.left is None else part.left * along(part.profile, torch.tensor([lam])), part.right
        )

    def describe(self) -> dict[str, Any]:
        """What `dera_merge.json` and reports say of it."""
        return {"kind": self.kind, "sha256": self.sha256, "span": list(self.span)}


def opened(path: str | os.PathLike[str] | Course | None, pair: Pair, lams: Sequence[Lam]) -> Course | None:
    """A path as a user gave it, read and checked. Raises DeraError where it is not for this pair and these λ."""
    if path is None:
        return None
    course = path
    if isinstance(path, str | os.PathLike | Curve):
        pair.only_pair("a learned path is")
        course = path if isinstance(path, Curve) else Curve.load(path)
        course.check(pair)
    for lam in lams:
        course.check_lambda(lam)
    return course


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stream:
        return stream.metadata() or {}
