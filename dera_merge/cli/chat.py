"""`dera-merge chat`: a conversation in the terminal, in which λ can be turned."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import lambdas
from ..errors import DeraError
from ..files.atomic import json_bytes, write_atomically
from .checks import choose_device
from .help import how, what
from .options import Devices, Dtype, Given, OneLambda, Seed, with_models
from .show import note, one_line, print_json

if TYPE_CHECKING:
    from ..playing.chat import Conversation

HELP = """\
/lambda 1.5     turn λ; the replies that follow are at it
/mode merged    let the merged model reply, or exact again
/again          the last reply anew, at the λ and in the mode of now
/system TEXT    the system's turn; without TEXT none
/clear          begin anew
/save FILE      write the conversation as JSON
/quit           end it, as Ctrl-D does; Ctrl-C ends a reply
A line that begins with a space is said as it is."""


EXAMPLES = (
    "dera-merge chat demo/reference demo/aligned-lora -l 0.5",
    "dera-merge chat demo/reference demo/aligned-lora -l 2 --mode merged --temperature 1",
)


@with_models(several=True, base_quantization=True)
def run(
    given: Given,
    lam: OneLambda,
    mode: Annotated[Literal["exact", "merged"], how(help="Who replies: two models, or one.")] = "exact",
    system: Annotated[str | None, what(help="The system's turn.")] = None,
    max_new_tokens: Annotated[int, how(min=1, help="Length of a reply.")] = 256,
    temperature: Annotated[float | None, how(min=0.0, help="0, the default, is greedy.")] = None,
    seed: Seed = 0,
    device: Devices = "auto",
    compute_dtype: Annotated[Dtype, how(help="auto: float32 on CPU, else the checkpoint's.")] = "auto",
) -> None:
    """Talk to the pair at λ, and turn λ while you talk. Reads lines, so that it works in a pipe too."""
    value = given.lam(lam)
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise typer.BadParameter("must be 0 (greedy) or from 0.001 to 1000", param_hint="--temperature")
    place = choose_device(device, spreads=True)
    pair = given.open()
    from ..playing.both import Both
    from ..playing.chat import Conversation

    both = Both(pair, place, None if compute_dtype == "auto" else compute_dtype)
    talk = Conversation(
        both, value, mode=mode, system=system, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    if not talk.templated:
        note("the tokenizer has no chat template: what you type is a text, and each reply goes on with it")
    if sys.stdin.isatty():
        note(f"λ = {lambdas.name(value)}, {mode}; /help says what else there is")
    converse(talk, _typed())
    if given.as_json:
        print_json({**given.names, **talk.saved()})


def _typed() -> Iterator[str]:
    """Lines of a terminal, which can be edited, or of a pipe; Ctrl-C at the prompt gives up the line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D ends the conversation")


def converse(talk: Conversation, lines: Iterator[str]) -> None:
    """Answer line after line, until /quit or their end."""
    for line in lines:
        said = line.strip()
        word, _, rest = said.partition(" ")
        try:
            if line.startswith("/quit"):
                return
            if line.startswith("/"):
                _obey(talk, word, rest.strip())
            elif said:
                _heard(partial(talk.say, said))
        except (DeraError, ValueError, OSError) as error:
            note(f"error: {one_line(error)}")


def _obey(talk: Conversation, word: str, rest: str) -> None:
    """Do what a line says that begins with a slash."""
    if word == "/help":
        note(HELP)
    elif word == "/lambda":
        if rest:
            values = lambdas.parse_lambdas([rest], talk.both.pair.models)
            if len(values) > 1:
                raise ValueError(f"one λ at a time, not {len(values)}")
            talk.lam = values[0]
        note(f"λ = {lambdas.name(talk.lam)}")
    elif word == "/mode":
        if rest not in ("exact", "merged", ""):
            raise ValueError(f"{rest!r} is no mode; there are exact and merged")
        talk.mode = rest or talk.mode
        note(f"{talk.mode}, λ = {lambdas.name(talk.lam)}")
    elif word == "/again":
        _heard(talk.again)
    elif word == "/system":
        talk.system = rest
        note("the conversation has no system's turn" if not rest else "the system's turn is set")
    elif word == "/clear":
        talk.clear()
        note("a new conversation")
    elif word == "/save":
        _save(talk, rest)
    else:
        raise ValueError(f"there is no {word}; /help says what there is, and a space before it says it as it is")


def _save(talk: Conversation, name: str) -> None:
    if not name:
        raise ValueError("where to? /save FILE")
    file = Path(name).expanduser()
    if file.exists():
        raise ValueError(f"{name} is there already; take another name")
    try:
        write_atomically(file, json_bytes(talk.saved()))
    except OSError as error:
        raise ValueError(f"{name} cannot be written: {error.strerror or error}") from error
    note(f"saved {name}")


def _heard(reply: Callable[[Callable[[str], None], threading.Event], Any]) -> None:
    """Show a reply as it comes. Ctrl-C ends it; a second one, while a long prompt is read, gives it up."""
    stop = threading.Event()

    def shown(text: str) -> None:
        # What a model writes must not steer the terminal.
        sys.stdout.write("".join(c for c in text if c.isprintable() or c in "\n\t"))
        sys.stdout.flush()

    try:
        with _interrupts(stop):
            reply(shown, stop)
    except KeyboardInterrupt:
        if not stop.is_set():  # not by Ctrl-C
            raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stop.is_set():
        note("(stopped)")


@contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets `stop`, and raises KeyboardInterrupt where that is set already."""

    def caught(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, caught)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
