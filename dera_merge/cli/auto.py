"""`dera-merge auto`: from two models to the one to ship."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from .checks import choose_device, given_prompts, given_rewards
from .help import how, what, where
from .options import ComputeDtype, Device, Given, Limit, MaybePrompts, Seed, with_models
from .recipes import write_recipe
from .show import print_json, progress, say

EXAMPLES = (
    "dera-merge auto demo/reference demo/aligned-lora -o auto",
    "dera-merge auto demo/reference demo/aligned-lora --prompts demo/validation.jsonl --reward lexicon -o rewarded",
)


@with_models()
def run(
    given: Given,
    context: typer.Context,
    output: Annotated[Path, where("-o", "--output", help="Directory of everything; finished steps are used again.")],
    prompts: MaybePrompts = None,
    limit: Limit = None,
    reward: Annotated[list[str] | None, what(help="Choose λ by it, as sweep does; repeatable.")] = None,
    target_kl: Annotated[float | None, what(help="Choose λ at this KL from REF, nats a token.")] = None,
    tasks: Annotated[list[str] | None, what(help="Choose λ by benchmarks, as bench does; repeatable.")] = None,
    include_path: Annotated[Path | None, what(help="A directory with task files of your own.")] = None,
    lam: Annotated[
        str | None,
        what("-l", "--lambda", metavar="λ", help="Where it is known. Default without anything to choose by: 0.5."),
    ] = None,
    calibrate: Annotated[
        bool | None,
        how("--calibrate/--no-calibrate", help="Learn a path; default: where the line is not safe, in ten minutes."),
    ] = None,
    max_new_tokens: Annotated[int, how(min=1, help="Length of sampled texts.")] = 48,
    seed: Seed = 0,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
) -> None:
    """Find the λ to ship and make the model: inspect, compare, choose, calibrate, merge, measure; one page tells it."""
    value = given.lam([lam]) if lam else None
    if target_kl is not None and not 0 < target_kl < math.inf:
        raise typer.BadParameter("must be above 0", param_hint="--target-kl")
    if lam and (reward or tasks or target_kl is not None):
        other = "--reward" if reward else "--tasks" if tasks else "--target-kl"
        raise typer.BadParameter(f"says what λ is, and {other} would choose it; leave one out", param_hint="--lambda")
    if tasks and (reward or target_kl is not None):
        other = "--reward" if reward else "--target-kl"
        raise typer.BadParameter(f"chooses λ, and so does {other}; leave one out", param_hint="--tasks")
    names = [name.strip() for text in tasks or () for name in text.split(",") if name.strip()]
    rows = given_prompts(prompts, None if names and prompts is None else limit)
    rewards = given_rewards(reward, folder=output / "sweep")
    pair = given.open()
    place = choose_device(device)
    from ..auto import Wanted
    from ..auto import auto as follow

    wanted = Wanted(
        prompts=rows, rewards=rewards(place),
        target_kl=target_kl, tasks=names, include_path=include_path, limit=limit, lam=value, calibrate=calibrate,
        max_new_tokens=max_new_tokens, seed=seed, device=place,
        compute_dtype="float32" if compute_dtype == "auto" else compute_dtype,
    )  # fmt: skip
    with progress("auto") as tell:
        outcome = follow(pair, output, wanted, tell)
    recipe = write_recipe(context, output / "auto.yaml")
    content: dict[str, Any] = outcome.to_dict() | {"recipe": str(recipe)}
    if given.as_json:
        print_json(content)
    else:
        from ..pages.auto import sentences

        for sentence in sentences(content):
            say(f"- {sentence}")
        say(f"- {content['learning']['why'][:1].upper()}{content['learning']['why'][1:]}.")
        for words, command in outcome.commands.items():
            say(f"To {words}:\n    {command}")
        say(f"Page: {outcome.page}\nRecipe: {recipe}")
