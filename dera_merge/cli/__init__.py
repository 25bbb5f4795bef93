"""The command line. It parses, calls the library, and prints; it decides nothing.

A module for each command; `options` declares what several of them take, `show` is what people see. Results go to
stdout, everything else to stderr. Exit status: 0 done, 1 failure (one line says what and what to do), 2 usage, 3 a gate
is not met, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import typer

from ..errors import DeraError, DeraWarning
from . import calibrate, compare, demo, export, generate, inspection, merge, push, sweep
from .show import Notes, note, one_line

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer versions of typer carry

app = typer.Typer(
    name="dera-merge", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn alignment strength λ: exactly (two models), or merged into one, and measure how far apart the two are.",
)  # fmt: skip
COMMANDS = {
    "merge": merge, "export-exact": export, "generate": generate, "compare": compare, "calibrate": calibrate,
    "inspect": inspection, "sweep": sweep, "push": push, "demo": demo,
}  # fmt: skip
for _name, _module in COMMANDS.items():
    app.command(_name)(_module.run)


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    if issubclass(category, DeraWarning):
        note(f"warning: {one_line(message) if isinstance(message, Warning) else message}")


def main() -> None:
    """Run the command line and exit."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", DeraWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    log = logging.getLogger("dera_merge")
    log.setLevel(logging.INFO)
    log.addHandler(Notes())
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that it would like to have
    try:
        code = app(standalone_mode=False) or 0
    except typer.Exit as stop:
        code = stop.exit_code
    except UsageError as error:
        error.show(sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except DeraError as error:
        note(f"error: {one_line(error)}")
        code = 1
    except Exception as error:  # what no one foresaw is one line too; the environment variable shows where it came from
        if os.environ.get("DERA_MERGE_TRACEBACK"):
            raise
        hint = "set DERA_MERGE_TRACEBACK=1 to see where"
        note(f"error: {type(error).__name__}: {one_line(error)} ({hint})")
        code = 1
    if code == 130:  # typer makes it of Ctrl-C, and says nothing
        note("interrupted")
    sys.exit(code)
