"""`dera-merge doctor`: what is wrong with a directory that any tool has made."""

from __future__ import annotations

from typing import Annotated

import typer

from .help import what
from .options import AllowPickle, AsJson, TrustRemoteCode
from .show import one_line, print_json, progress, say

EXAMPLES = (
    "dera-merge doctor demo/aligned-lora",
    "dera-merge doctor merged/lambda-0.5 --base demo/reference --adapter demo/aligned-lora",
)


def run(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A model or an adapter: a directory or a Hub id.")],
    base: Annotated[str | None, what(help="What it was made of: does it fit, is anything lost?")] = None,
    adapter: Annotated[str | None, what(help="With --base: what was merged into DIR.")] = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a model or an adapter of any tool. And say what would load it."""
    if adapter and not base:
        raise typer.BadParameter("needs --base, which it was merged into", param_hint="--adapter")
    from transformers.utils import logging

    from ..doctor.examine import examine

    logging.disable_progress_bar()
    with progress("reading") as tell:
        result = examine(
            folder, base, adapter, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
            progress=lambda done, total: tell(None, done, total),
        )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        for row in result["findings"]:
            level = "BROKEN" if row["level"] == "broken" else "warning"
            say(one_line(f"{level}: {row['where']}: {row['what']}; {row['do']}"))
        if not result["findings"]:
            say(f"No findings on {folder}.")
        loads = [program for program, reason in result["loads"].items() if reason is None]
        if loads:
            say(f"Nothing in the files stands against loading it in {', '.join(loads)}.")
        for program, option in result["needs"].items():
            say(f"{program} needs {option}.")
        for program, reason in result["loads"].items():
            if reason:
                say(one_line(f"Not in {program}: {reason}"))
    if result["broken"]:
        raise typer.Exit(3)
