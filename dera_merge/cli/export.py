"""`dera-merge export-exact`: both models in one directory, for vLLM."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from .help import how, what, where
from .options import Given, with_models
from .show import print_json, progress, say

EXAMPLES = (
    "dera-merge export-exact demo/reference demo/aligned-lora -l 0.5 -o exact",
    "dera-merge export-exact demo/reference demo/aligned-dense -o exact-dense",
)


@with_models(base_quantization=True)
def run(
    given: Given,
    output: Annotated[Path, where("-o", "--output", help="The directory to write.")],
    lam: Annotated[str, what("-l", "--lambda", metavar="λ", help="For requests that bring none.")] = "1",
    merge_adapter: Annotated[bool, how("--merge-adapter", help="Store an adapter's model whole.")] = False,
    copy: Annotated[bool, where("--copy", help="Copy weight files instead of linking them.")] = False,
    overwrite: Annotated[bool, where("--overwrite", help="Replace a directory that this command wrote.")] = False,
) -> None:
    """Write both models to one directory, for exact DeRa in vLLM. Each request there may bring its own λ."""
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
