"""What `--help` looks like: options in panels, then examples that run. At most two screens, at 100 columns."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand

WHAT, HOW, WHERE, TRUST = "What", "How", "Where", "Trust"
PANELS = ("Arguments", WHAT, HOW, WHERE, TRUST)
FIRST = "dera-merge demo --pair demo"  # makes the pair that the examples of all commands name
WIDE = {"max_content_width": 100}
TYPES = {"int range": "N", "int": "N", "float": "X", "float range": "X", "path": "PATH", "list[path]": "PATH"}

# Every option stands in a panel: `how(help=…)` is typer.Option(help=…) in that of how things are computed.
what: Any = partial(typer.Option, rich_help_panel=WHAT)
how: Any = partial(typer.Option, rich_help_panel=HOW)
where: Any = partial(typer.Option, rich_help_panel=WHERE)
trust: Any = partial(typer.Option, rich_help_panel=TRUST)


class Command(TyperCommand):
    """A command whose help groups its options, and shows its examples (the epilog, one a line) as they are typed.

    Attributes:
        begun: whether the options of one were read, so that it is at work.
    """

    begun = False

    def invoke(self, ctx: Any) -> Any:
        Command.begun = True
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The panels, in the order of `PANELS`."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.params:
            record = parameter.get_help_record(ctx)
            default = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record:
                panel = getattr(parameter, "rich_help_panel", None) or default
                panels.setdefault(panel, []).append(_short(*record))
        for panel in sorted(panels, key=lambda name: PANELS.index(name) if name in PANELS else len(PANELS)):
            with formatter.section(panel):
                formatter.write_dl(panels[panel], col_max=28)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, never wrapped, so that they can be copied."""
        if self.epilog:
            formatter.write("\nExamples:\n")
            formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))


def _short(left: str, right: str) -> tuple[str, str]:
    """A row of help with a narrow first column: types by a letter, long lists of choices behind the text."""
    found = re.search(r" <(.*)>$", left)
    if not found:
        return left, right
    option, kind = left[: found.start()], found[1]
    if "|" not in kind:
        return f"{option} {TYPES.get(kind, 'TEXT')}", right
    if len(left) <= 28:
        return f"{option} {kind}", right
    return option, f"{right}  ({kind})"
