"""The command line. It parses, calls the library, and prints; it decides nothing.

A module for each command; `options` declares what several of them take, `show` is what people see. Results go to
stdout, everything else to stderr. Exit status: 0 done, 1 failure (one line says what and what to do), 2 usage, 3 a gate
is not met, 130 interrupted (by Ctrl-C, SIGTERM or SIGHUP).
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import DeraError, DeraWarning
from ..files.room import is_full
from . import (
    auto,
    bench,
    calibrate,
    chat,
    compare,
    demo,
    doctor,
    endings,
    export,
    generate,
    help,
    inspection,
    merge,
    play,
    push,
    sweep,
)
from .recipes import with_config
from .show import Notes, in_plain_words, note, one_line, take_any_encoding

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer versions of typer carry


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"dera-merge {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="dera-merge", cls=help.Program, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, context_settings=help.WIDE,
    epilog=f"First: {help.FIRST} makes the tiny pair that the examples of each command's --help run on.",
)  # fmt: skip
COMMANDS = {
    "merge": merge, "export-exact": export, "generate": generate, "compare": compare, "calibrate": calibrate,
    "inspect": inspection, "sweep": sweep, "bench": bench, "push": push, "demo": demo,
    "doctor": doctor, "auto": auto, "play": play, "chat": chat,
}  # fmt: skip
for _name, _module in COMMANDS.items():
    _command = app.command(_name, cls=help.Command, epilog="\n".join(_module.EXAMPLES), context_settings=help.WIDE)
    _command(with_config(_module.run))


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn alignment strength λ: exactly (two models), or merged into one, and measure how far apart the two are."""


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    if issubclass(category, DeraWarning):
        note(f"warning: {one_line(message) if isinstance(message, Warning) else message}")


def main() -> None:
    """Run the command line and exit."""
    take_any_encoding()
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", DeraWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    log = logging.getLogger("dera_merge")
    log.setLevel(logging.INFO)
    log.addHandler(Notes())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it would like to have
    endings.listen()
    try:
        code = _run()
    except KeyboardInterrupt:  # while an error was being told
        code = INTERRUPTED
    endings.listen_no_more()
    if code == INTERRUPTED:
        go_on = _how_to_go_on()
        note(f"interrupted; go on with: {go_on}" if go_on else "interrupted")
    sys.exit(code)


def _run() -> int:
    """The exit status; what went wrong has been told."""
    try:
        return app(standalone_mode=False) or 0
    except typer.Exit as stop:
        return stop.exit_code
    except UsageError as error:
        error.message = in_plain_words(error.message)
        error.show(sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):  # typer makes an exit status of Ctrl-C
        return INTERRUPTED
    except Exception as error:
        if endings.came():  # imports make errors of their own of an interrupt
            return INTERRUPTED
        if os.environ.get("DERA_MERGE_TRACEBACK") and not isinstance(error, DeraError):
            raise
        note(f"error: {_in_words(error)}")
    return 1


def _in_words(error: Exception) -> str:
    """What is wrong, and what to do; of what no one foresaw, how to see where it came from."""
    if isinstance(error, DeraError):
        return one_line(error)
    if isinstance(error, OSError) and is_full(error):
        then = f"go on with: {go_on}" if (go_on := _how_to_go_on()) else "try again"
        return f"the disk is full: {one_line(error)}; make room, then {then}"
    return f"{type(error).__name__}: {one_line(error)} (set DERA_MERGE_TRACEBACK=1 to see where)"


def _how_to_go_on() -> str | None:
    if not (help.Command.begun and help.Command.begun.has_left):  # a command line that is none leaves nothing either
        return None
    resumable = [name for name, module in COMMANDS.items() if "resume" in inspect.signature(module.run).parameters]
    return endings.how_to_go_on(sys.argv[1:], resumable, again=["auto"])
