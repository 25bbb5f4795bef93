"""The code blocks of the README and of the pages under docs/, as they stand."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<kind>bash|python)\n(?P<text>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code, and why it is not run, if it is marked so: `<!-- not run: needs a GPU -->` on the line before."""

    page: Path
    kind: str
    text: str
    why: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks() -> list[Block]:
    """All of them, in the order of the pages."""
    return [Block(page, m["kind"], m["text"], m["why"]) for page in PAGES for m in BLOCK.finditer(page.read_text())]
