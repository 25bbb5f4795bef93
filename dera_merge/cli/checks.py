"""What commands look at before long work begins: the device, prompts, rewards, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import DeraError
from .show import one_line

if TYPE_CHECKING:
    import torch

    from ..models.pair import Pair
    from ..texts.rewards import Reward


def choose_device(name: str, spreads: bool = False) -> torch.device:
    """A device by its name; `auto` is this process's, of several, or the best there is. Raises DeraError.

    Args:
        spreads: whether `spread`, all devices together, is one for this command.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # transformers' bars per loaded model would break into ours
    from ..processes import launched

    if name == "spread" and spreads:
        from ..models.spread import begin

        return begin()
    if name == "auto" and launched()[1] > 1:
        from accelerate import PartialState

        return PartialState().device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError) as error:
        raise DeraError(f"device {name!r} cannot be used: {one_line(error)}") from error
    return device


def given_prompts(source: str | None, limit: int | None) -> list[dict[str, Any]] | None:
    """The prompts of `--prompts` and `--limit`; None where none are given. Raises DeraError or BadParameter."""
    from ..texts.prompts import read

    if source is None and limit is not None:
        raise typer.BadParameter("counts the prompts of --prompts; give that too", param_hint="--limit")
    return None if source is None else read(source, limit)


def given_rewards(
    specs: Sequence[str] | None, judge_prompt: str = "pairwise", folder: Path | None = None
) -> Callable[[Any], list[Reward]]:
    """What makes the rewards of `--reward` on a device; all that take none are there already, before torch is.

    Raises:
        DeraError: there is no such reward.
    """
    from ..texts.rewards import load_reward

    def load(spec: str, device: Any = None) -> Reward:
        return load_reward(spec, device, judge_prompt, folder)

    found = [spec if spec.startswith("model:") else load(spec) for spec in specs or ()]
    return lambda device: [load(each, device) if isinstance(each, str) else each for each in found]


def check_report_folder(folder: Path, pair: Pair) -> None:
    """Raises DeraError where a report would lie over a file or in an input."""
    if folder.exists() and not folder.is_dir():
        raise DeraError(f"{folder} is a file; give a directory for the report")
    inputs = [source.folder for side in pair.sides for source in (side.source, side.base)]
    if any(folder.resolve().is_relative_to(place) for place in inputs):
        raise DeraError(f"{folder} is or lies in an input; give another --output")
