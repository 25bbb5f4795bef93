"""`dera-merge compare`: how far the merged model is from exact DeRa."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import DeraError
from .checks import check_report_folder, choose_device, given_prompts, given_rewards
from .help import how, what, where
from .options import (
    BatchSize,
    ComputeDtype,
    Devices,
    Dtype,
    Given,
    LambdaFor,
    Lambdas,
    Limit,
    MaxMemory,
    MaybePrompts,
    Overwrite,
    PathFile,
    Resume,
    Rounding,
    SampleEngine,
    Seed,
    with_models,
)
from .recipes import command_line
from .show import fidelity_table, print_json, progress, say, say_figures

Texts = Literal["exact", "merged"]
EXTRAS = ("floor", "ladder", "predict", "layers", "coupled")
EXAMPLES = (
    "dera-merge compare demo/reference demo/aligned-lora -l 0.25,0.5 -o report --max-kl 0.02",
    "dera-merge compare demo/reference demo/aligned-lora -l 0.25,0.5 -o measured --approx merged",
)


@with_models(several=True)
def run(
    given: Given,
    context: typer.Context,
    lam: Lambdas,
    output: Annotated[Path, where("-o", "--output", help="Directory of the report.")],
    prompts: MaybePrompts = None,
    limit: Limit = None,
    approx: Annotated[Path | None, what(help="A merged directory to measure, or the parent of lambda-*.")] = None,
    dtype: Annotated[Dtype, how(help="How the merged model is stored.")] = "auto",
    rounding: Annotated[Rounding | None, how(help="Default: stochastic for 16-bit storage.")] = None,
    path: PathFile = None,
    lambda_for: LambdaFor = None,
    texts: Annotated[Texts, how(help="Whose texts to sample and score.")] = "exact",
    samples: Annotated[int, how(min=1, help="Texts for each prompt.")] = 1,
    max_new_tokens: Annotated[int, how(min=1, help="Length of sampled texts.")] = 64,
    extras: Annotated[str, how("--with", help=f"What else to measure: {', '.join(EXTRAS)}; all, or none.")] = "floor",
    extra_prompts: Annotated[int, how(min=1, help="How many prompts floor, ladder and layers look at.")] = 8,
    reward: Annotated[str | None, what(help="As for sweep; for --with coupled.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    max_kl: Annotated[float | None, how(help="Gate: exit 3 if kl is above this at any λ.")] = None,
    min_top1: Annotated[float | None, how(help="Gate: exit 3 if top1 is below this at any λ.")] = None,
    engine: SampleEngine = None,
    device: Devices = "auto",
    compute_dtype: ComputeDtype = "auto",
    batch_size: BatchSize = None,
    max_memory: MaxMemory = None,
) -> None:
    """Measure the merged model against exact DeRa, token by token."""
    lams = given.lams(lam)
    wanted = _extras(extras, given.models > 1)
    if reward and "coupled" not in wanted:
        raise typer.BadParameter("needs --with coupled (or all)", param_hint="--reward")
    if any(limit is not None and not math.isfinite(limit) for limit in (max_kl, min_top1)):
        raise typer.BadParameter("a gate must be a finite number", param_hint="--max-kl, --min-top1")
    parts, rows = given.lambda_for(lambda_for), given_prompts(prompts, limit)
    rewards = given_rewards([reward] if reward else None)
    pair = given.open()
    place = choose_device(device, spreads=True)
    check_report_folder(output, pair)
    from ..measuring.compare import compare as measured_compare
    from ..processes import launched

    with progress("comparing") as tell:
        report = measured_compare(
            pair, lams, rows, approx=approx, path=path, lambda_for=parts, dtype=dtype, rounding=rounding,
            texts=texts, samples=samples, max_new_tokens=max_new_tokens, extras=wanted, extra_prompts=extra_prompts,
            reward=next(iter(rewards(place)), None), seed=seed, engine=engine, device=place,
            batch_size=batch_size, max_memory=max_memory,
            progress=tell, compute_dtype=compute_dtype, unfinished=output,
            resume=resume, overwrite=overwrite,
        )  # fmt: skip
    report.command = command_line(context)
    gate = report.gate(max_kl, min_top1) if max_kl is not None or min_top1 is not None else None
    if launched()[0]:  # another process writes and prints
        raise typer.Exit(3 if gate and not gate["passed"] else 0)
    report.save(output)
    if reward and not any((row.get("coupled") or {}).get("reward") for row in report.results):
        raise DeraError(f"the reward {reward} fails on every text, so {output / 'report.html'} has none of it; mend "
                        "it, or leave --reward out")  # fmt: skip
    if given.as_json:
        print_json(report.to_dict())
    else:
        say_figures(fidelity_table(report.results))
        from ..pages.fidelity import LEGEND, sentences

        say(LEGEND)
        if report.settings["compute_dtype"] != "float32":
            resolution = report.settings["resolution"]
            say(f"Computed in {report.settings['compute_dtype']}, float32 heads: kl below {resolution:.1e} is noise.")
        for row in report.results:
            say(f"- {' '.join(sentences(row))}")
        say(f"Report: {output / 'report.html'}")
        if gate:
            verdict = "passed" if gate["passed"] else "not met at λ = " + ", ".join(f"{x:g}" for x in gate["failed"])
            say(f"Gate: {verdict}")
    if gate and not gate["passed"]:
        raise typer.Exit(3)


def _extras(text: str, several: bool) -> list[Any]:
    """The names in `--with`. Raises BadParameter where one is unknown."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return [extra for extra in EXTRAS if not (several and extra in ("predict", "layers"))]
    if names in (["none"], []):
        return []
    if unknown := [name for name in names if name not in EXTRAS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(EXTRAS)}, all, none", param_hint="--with")
    return names
