"""`dera-merge export-exact`: both models in one directory, for vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .options import Given, with_models
from .show import print_json, progress, say


@with_models(base_quantization=True)
def run(
    given: Given,
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.")],
    lam: Annotated[str, typer.Option("-l", "--lambda", help="λ of requests that bring none.")] = "1",
    merge_adapter: Annotated[bool, typer.Option("--merge-adapter", help="Store an adapter's model whole.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weight files instead of linking them.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a directory that this command wrote.")
    ] = False,
) -> None:
    """Put both models into one directory, from which vLLM serves exact DeRa with a λ for each request.

    Example: dera-merge export-exact my-sft my-dpo-lora -l 0.5 -o exact
    """
    value = given.lam([lam])
    pair = given.open()
    with progress("exporting") as tell:
        made = pair.export_exact(
            output, value, merge_adapter=merge_adapter, copy=copy, overwrite=overwrite, progress=tell
        )  # fmt: skip
    if given.as_json:
        return print_json({**given.names, **made})
    sizes = f"{made['linked'] / 1e6:,.1f} MB linked, {made['copied'] / 1e6:,.1f} MB copied"
    held = "base and adapter on one set of weights" if made["held_once"] else "two full models"
    say(f"{output}  ({sizes}; {held})")
    say(f"vllm serve {shlex.quote(str(output))}")
