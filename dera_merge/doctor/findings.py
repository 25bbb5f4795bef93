"""What a doctor writes down: findings, and what stands against loading a directory with some program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DeraError

AGAIN = "fetch it or save it again"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        broken: whether the model cannot be loaded, or is not what it says it is; else it may be meant so.
        where: a file, or a tensor.
        what: what is wrong with it.
        remedy: what to do.
    """

    broken: bool
    where: str
    what: str
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        level = "broken" if self.broken else "warning"
        return {"level": level, "where": self.where, "what": self.what, "do": self.remedy}


@dataclass
class Findings:
    """The findings on one directory.

    Attributes:
        found: in the order in which they were found.
        loads: program that might load it → what stands against that, or None.
        needs: program → what it must be told to load it.
    """

    found: list[Finding] = field(default_factory=list)
    loads: dict[str, str | None] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)

    def broken(self, where: str, what: str, remedy: str, stops: bool = True) -> None:
        """Something does not work. `stops`: no program loads it as it is meant."""
        self.found.append(Finding(True, where, what, remedy))
        if stops:
            for program in self.loads:
                self.stop(program, f"{where}: {what}")

    def warn(self, where: str, what: str, remedy: str) -> None:
        """Something may not be meant so."""
        self.found.append(Finding(False, where, what, remedy))

    def stop(self, program: str, reason: str) -> None:
        """A program does not load it; the first reason stays."""
        self.loads[program] = self.loads.get(program) or reason

    def reason(self, where: str, reason: str, broken: bool = True, stops: bool = True) -> None:
        """What a check of a merge says; what comes behind the last semicolon is what to do. `stops` as of `broken`."""
        what, _, remedy = reason.replace("\n", " ").rpartition("; ")
        said = (what, remedy) if what else (remedy, AGAIN)
        if broken:
            self.broken(where, *said, stops)
        else:
            self.warn(where, *said)

    @contextmanager
    def refusals(self, where: str, stops: bool = True) -> Iterator[None]:
        """Write down what a check of a merge raises. `stops` as of `broken`."""
        try:
            yield
        except DeraError as error:
            self.reason(where, str(error), stops=stops)

    @property
    def any_broken(self) -> bool:
        return any(finding.broken for finding in self.found)

    def add(self, other: Findings, part: str) -> None:
        """Add the findings on a part of the directory."""
        self.found += [replace(finding, where=f"{part}/{finding.where}") for finding in other.found]
        self.needs |= other.needs
        for program, reason in other.loads.items():
            self.loads[program] = self.loads.get(program) or (reason and f"{part}: {reason}")
