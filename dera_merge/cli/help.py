"""What `--help` looks like: options in panels, then examples that run. At most two screens, at 100 columns."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .endings import Begun

WHAT, HOW, WHERE, TRUST = "What", "How", "Where", "Trust"
PANELS = ("Arguments", WHAT, HOW, WHERE, TRUST)
FIRST = "dera-merge demo --pair demo"  # makes the pair that the examples of all commands name
WIDE = {"max_content_width": 100}
TYPES = {"int range": "N", "int": "N", "float": "X", "float range": "X", "path": "PATH", "list[path]": "PATH"}
FIRST_COLUMN = 28  # characters at most
_EXTRAS = re.compile(r"(?:^|  )\\?\[(?P<of_click>[^\[\]]*)\]$")  # [default: 1; x>=1; required]

# Every option stands in a panel: `how(help=…)` is typer.Option(help=…) in that of how things are computed.
what: Any = partial(typer.Option, rich_help_panel=WHAT)
how: Any = partial(typer.Option, rich_help_panel=HOW)
where: Any = partial(typer.Option, rich_help_panel=WHERE)
trust: Any = partial(typer.Option, rich_help_panel=TRUST)


class Program(TyperGroup):
    """The program, whose help says the first sentence of each command whole, however narrow the terminal is."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """What there is to do."""
        said = [(name, (command.help or "").partition(". ")[0].rstrip(".")) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(said)


class Command(TyperCommand):
    """A command whose help groups its options, and shows its examples (the epilog, one a line) as they are typed.

    What has to be given stands in the line of usage; `--config` may give it, so nothing is called required.

    Attributes:
        begun: what the one at work began with, once its options were read.
    """

    begun: Begun | None = None

    def invoke(self, ctx: Any) -> Any:
        Command.begun = Begun(ctx.params.get("output"), bool(ctx.params.get("resume")))
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`REF [ALIGNED] -o PATH [OPTIONS]`."""
        pieces, options = [], []
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                pieces.append(parameter.metavar if parameter.required else f"[{parameter.metavar}]")
            elif parameter.required:
                left, _ = _short(*parameter.get_help_record(ctx))
                options.append(f"{parameter.opts[0]} {left.split()[-1]}")
        return [*pieces, *options, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The panels, in the order of `PANELS`."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.params:
            if record := parameter.get_help_record(ctx):
                is_argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                left, right = _short(*record)
                panels.setdefault(panel, []).append((parameter.metavar if is_argument else left, right))
        for panel in sorted(panels, key=lambda name: PANELS.index(name) if name in PANELS else len(PANELS)):
            with formatter.section(panel):
                formatter.write_dl(panels[panel], col_max=FIRST_COLUMN)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The examples, never wrapped, so that they can be copied."""
        if self.epilog:
            formatter.write("\nExamples:\n")
            formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))


def _short(left: str, right: str) -> tuple[str, str]:
    """A row of help with a narrow first column: types by a letter; long lists of choices, and the default, behind."""
    extras = _EXTRAS.search(right)
    behind = [part for part in extras["of_click"].split("; ") if part.startswith("default: ")] if extras else []
    right = right[: extras.start()] if extras else right
    if found := re.search(r" <(.*)>$", left):
        option, kind = left[: found.start()], found[1]
        if "|" in kind and len(left) > FIRST_COLUMN:
            left, behind = option, [kind.replace("|", ", "), *behind]
        else:
            left = f"{option} {kind if '|' in kind else TYPES.get(kind.lower(), 'TEXT')}"
    return left, f"{right}  [{'; '.join(behind)}]" if behind else right
