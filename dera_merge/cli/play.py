"""`dera-merge play`: a page on which λ is turned by hand."""

from __future__ import annotations

import shlex
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DeraError
from .checks import choose_device
from .help import how, what, where
from .options import Device, Dtype, Given, MaybeAligned, MaybeRef, with_models
from .show import note, print_json, say

if TYPE_CHECKING:
    import gradio


EXAMPLES = (
    "dera-merge play",
    "dera-merge play demo/reference demo/aligned-lora --aligned demo/aligned-brief -l 0.5+0.25",
)


@with_models(ref=MaybeRef, aligned=MaybeAligned, several=True, base_quantization=True)
def run(
    given: Given,
    lam: Annotated[str | None, what("-l", "--lambda", metavar="λ", help="To begin with; default 0.5.")] = None,
    max_new_tokens: Annotated[int, how(min=8, max=256, help="Length of answers to begin with, 8 to 256.")] = 64,
    host: Annotated[str, where(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, where(min=1, max=65535, help="Default: the first that is free from 7860 on.")] = None,
    device: Device = "auto",
    compute_dtype: Annotated[Dtype, how(help="auto: float32 on CPU, else the checkpoint's.")] = "auto",
) -> None:
    """Turn λ by hand, on a page: exact and merged answers side by side. Without models: the package's pair."""
    if (given.ref is None) != (given.aligned is None):
        raise typer.BadParameter("give both, or neither for the pair in the package", param_hint="REF ALIGNED")
    given, examples = _with_prompts(given)
    lams = given.lam([lam or "+".join(["0.5"] * given.models)])
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise DeraError("the page needs gradio: pip install 'gradio>=6.31'")
    place = choose_device(device)
    note("loading both models …")
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // 2))  # two texts are written at once, a thread each
    pair = given.open()
    from ..lambdas import numbers
    from ..playing.both import Both
    from ..playing.page import Desk, build, launching

    both = Both(pair, place, None if compute_dtype == "auto" else compute_dtype)
    with both.merged(lams):  # so that what cannot be merged is told now, and the first visitor does not wait
        pass
    command, variables = _merge_command(given)
    desk = Desk(both, command)
    blocks = build(pair, desk, examples, numbers(lams), max_new_tokens)
    try:
        _serve(blocks, launching(host, port), given, variables)
    finally:
        desk.close()


def _with_prompts(given: Given) -> tuple[Given, list[str]]:
    """The models, those of the package where none are given; and prompts to try."""
    from .. import demo

    if given.ref is None:
        from dataclasses import replace

        prompts = [row["messages"][-1]["content"] for row in demo.prompts()]
        return replace(given, ref=str(demo.REF), aligned=str(demo.ALIGNED_LORA)), prompts[2:7]
    from ..texts.prompts import built_in

    return given, [row["messages"][-1]["content"] for row in built_in()[:5]]


def _merge_command(given: Given) -> tuple[str, dict[str, str]]:
    """What begins the command that writes a merge, with a variable for each model, and what these stand for.

    The page says no more than the variables; what they stand for is said where the command was typed.
    """
    variables = {"REF": given.ref, "ALIGNED": given.aligned}
    words = ['"$REF"', '"$ALIGNED"']
    for number, model in enumerate(given.more or (), 2):
        variables[f"ALIGNED_{number}"] = model
        words += ["--aligned", f'"$ALIGNED_{number}"']
    if given.base:
        variables["BASE"] = given.base
        words += ["--base", '"$BASE"']
    return " ".join(["dera-merge", "merge", *words, *given.how]), variables


def _serve(blocks: gradio.Blocks, how: dict[str, Any], given: Given, variables: dict[str, str]) -> None:
    """Serve the page until the command is stopped."""
    try:
        _, url, _ = blocks.launch(prevent_thread_lock=True, **how)
    except OSError as error:
        raise DeraError(f"cannot listen there: {error}; give another --host or --port") from error
    if how["server_name"] not in ("127.0.0.1", "localhost", "::1"):
        note("everybody who reaches this machine can use the page: there is no password")
    note(" ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()))
    if given.as_json:
        print_json({**given.names, "url": url})
    else:
        say(f"Turn λ at {url}   (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
