"""`dera-merge sweep`: choose λ by reward against KL, or by a target."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from .checks import check_report_folder, choose_device, given_prompts, given_rewards
from .help import how, what, where
from .options import (
    BatchSize,
    ComputeDtype,
    Devices,
    Given,
    Limit,
    Mode,
    Overwrite,
    PathFile,
    Prompts,
    Resume,
    SampleEngine,
    Seed,
    with_models,
)
from .recipes import command_line
from .show import PLAIN, print_json, progress, say, say_figures

if TYPE_CHECKING:
    from ..choosing.report import Sweep

EXAMPLES = (
    "dera-merge sweep demo/reference demo/aligned-lora --prompts demo/validation.jsonl --reward lexicon -o sweep",
    "dera-merge sweep demo/reference demo/aligned-lora --prompts demo/validation.jsonl --target-kl 0.05 -o kl",
)


@with_models(several=True)
def run(
    given: Given,
    context: typer.Context,
    prompts: Prompts,
    output: Annotated[Path, where("-o", "--output", help="Directory of the report, and of texts as they come.")],
    reward: Annotated[
        list[str] | None,
        what(help="lexicon, length, tokens, answer:number, module:function, file.py:function, command:…, model:ID, "
             "http://…; repeatable."),
    ] = None,
    judge_prompt: Annotated[
        str, what(metavar="FILE", help="What a judge (…/chat/completions#MODEL) is asked: pairwise, score or a file.")
    ] = "pairwise",
    lam: Annotated[
        list[str] | None, what("-l", "--lambda", metavar="λ", help="Of interest: the curve spans them. Default: 0,2.")
    ] = None,
    weights: Annotated[str | None, what(help="Of several rewards: 1,0.5. Default: 1 each.")] = None,
    target_kl: Annotated[float | None, what(help="Choose λ at this KL from REF, nats a token.")] = None,
    target_length: Annotated[float | None, what(help="Choose λ whose texts have so many tokens.")] = None,
    keep: Annotated[float | None, what(help="Choose the cheapest λ that keeps 0.98 of λ=1's reward.")] = None,
    minimise: Annotated[Literal["tokens", "kl"] | None, what(help="Cost (tokens).")] = None,
    anchors: Annotated[str | None, how(help="λ to sample at. Default: 0,0.5,1,2 and the ends.")] = None,
    samples: Annotated[int, how(min=1, help="Texts for each prompt at each anchor.")] = 1,
    max_new_tokens: Annotated[int, how(min=1, help="Length of sampled texts.")] = 64,
    mode: Annotated[Mode, how(help="Whose texts; speculative: exact DeRa's, the merged model drafting.")] = "exact",
    reweight: Annotated[bool, how("--reweight/--no-reweight", help="Curves from the texts of a few λ.")] = True,
    merged: Annotated[bool, how("--merged/--no-merged", help="Sample the merged model at the anchors too.")] = True,
    budget: Annotated[int | None, how(min=1, help="Texts of exact DeRa in all; default: 3 more anchors.")] = None,
    from_scored: Annotated[Path | None, what(help="Texts sampled and scored before; nothing is sampled.")] = None,
    beta: Annotated[float | None, what(help="KL coefficient of ALIGNED's training, for β/λ.")] = None,
    path: PathFile = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    limit: Limit = None,
    seed: Seed = 0,
    engine: SampleEngine = None,
    device: Devices = "auto",
    compute_dtype: ComputeDtype = "auto",
    batch_size: BatchSize = None,
) -> None:
    """Choose λ by reward, KL or length on a validation set; exit 3 if a target is not met."""
    if sum(target is not None for target in (target_kl, target_length, keep)) > 1:
        raise typer.BadParameter("give one of them", param_hint="--target-kl, --target-length, --keep")
    for option, target in (("--target-kl", target_kl), ("--target-length", target_length), ("--keep", keep)):
        if target is not None and not 0 < target < math.inf:
            raise typer.BadParameter("must be above 0", param_hint=option)
    if minimise and keep is None:
        raise typer.BadParameter("says what is cheap for --keep", param_hint="--minimise")
    if keep is not None and not reward:
        raise typer.BadParameter("is a share of a reward; give --reward too", param_hint="--keep")
    if not reward and target_kl is None and target_length is None:
        raise typer.BadParameter(
            "give one, or --target-kl or --target-length: there is nothing to choose by", param_hint="--reward"
        )
    lams = given.lams(lam) if lam else None
    places = given.lams([anchors]) if anchors else None
    try:
        shares = [float(part) for part in weights.split(",")] if weights else None
    except ValueError:
        raise typer.BadParameter(f"{weights!r} is no list of numbers", param_hint="--weights") from None
    if shares and len(shares) != len(reward or ()):
        raise typer.BadParameter(f"{len(shares)} for {len(reward or ())} rewards", param_hint="--weights")
    if engine and from_scored:
        raise typer.BadParameter("samples nothing, as --from-scored brings the texts", param_hint="--engine")
    if beta is not None and not 0 < beta < math.inf:
        raise typer.BadParameter("must be above 0", param_hint="--beta")
    from ..choosing.answers import read_scored

    rows, rewards = given_prompts(prompts, limit), given_rewards(reward, judge_prompt, output)
    scored = read_scored(from_scored) if from_scored else None
    pair = given.open()
    place = choose_device(device, spreads=True)
    check_report_folder(output, pair)
    from ..choosing.report import commands
    from ..choosing.sweep import sweep as choose
    from ..processes import launched

    with progress("sweeping") as tell:
        result = choose(
            pair, rows, rewards(place), lams, weights=shares, target_kl=target_kl,
            target_length=target_length, keep=keep, minimise=minimise or "tokens", anchors=places, samples=samples,
            max_new_tokens=max_new_tokens, mode=mode, reweight=reweight, merged=merged, budget=budget, scored=scored,
            beta=beta, path=path, seed=seed, engine=engine, device=place, out=output, resume=resume,
            batch_size=batch_size,
            overwrite=overwrite, progress=tell,
            compute_dtype=compute_dtype,
        )  # fmt: skip
    result.command = command_line(context)
    if result.chosen:
        asked = ["--prompts", prompts, *(["--limit", str(limit)] if limit else [])]
        result.commands = commands(result.best["lambda"], given.words, path, output, asked)
    if not launched()[0]:  # of several processes the first writes and prints
        result.save(output)
        print_json(result.to_dict()) if given.as_json else _show(result, output)
    if not result.best.get("target", {"met": True})["met"]:
        raise typer.Exit(3)


def _show(result: Sweep, output: Path) -> None:
    """The table and the answer in words."""
    from ..pages.frame import read as as_read
    from ..pages.sweep import cells, columns, heads, legend, sentences, shown

    content = as_read(result.to_dict())
    table = Table(title="What λ earns and costs", **PLAIN)
    by = content["best"].get("target", {}).get("by")
    left_out = {"wins_aligned", "wins_ref"}  # so that it fits 80 columns; the report has all
    left_out |= {"kl_token", "length"} if by is None else {"gain_ci", "kl_token"} if by == "keep" else {"gain_ci"}
    left_out |= {"gain_ci"} if len(content["settings"]["rewards"]) > 1 else set()  # each reward has a column then
    wanted = tuple(column for column in columns(content) if column not in left_out)
    for head in heads(wanted):
        table.add_column(head, justify="right", overflow="fold")
    for row in shown(content):
        table.add_row(*cells(row, wanted), style="bold" if row["lambda"] == result.best["lambda"] else None)
    say_figures(table)
    say(legend(wanted))
    for sentence in sentences(content):
        say(f"- {sentence}")
    if result.commands:
        say("To ship it:")
    for line in result.commands:
        say(f"    {line}")
    say(f"Report: {output / 'sweep.html'}")
