"""The command line. It parses, calls the library, and prints; it decides nothing.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failure (one line says what and what to do),
2 usage, 3 a gate is not met, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import lambdas
from .errors import DeraError, DeraWarning

if TYPE_CHECKING:
    import torch

    from .pair import ModelPair, Source

UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer versions of typer carry

app = typer.Typer(
    name="dera-merge", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Turn alignment strength λ: exactly (two models), or merged into one, and measure how far apart the two are.",
)  # fmt: skip
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)
LOG_SECONDS = 60  # between two lines of progress where there is no terminal for a bar

PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 0, 0, 1), "pad_edge": False}  # fits 80 columns

Rounding = Literal["stochastic", "nearest"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Format = Literal["full", "adapter"]
BaseQuantisation = Literal["none", "nf4", "nf4-double", "fp4", "fp4-double"]
Mode = Literal["exact", "merged", "speculative"]
LoadIn = Literal["4bit", "8bit"]
Texts = Literal["exact", "merged"]
PathKind = Literal["curve", "gains"]
EXTRAS = ("floor", "ladder", "predict", "layers", "coupled")

Ref = Annotated[str, typer.Argument(metavar="REF", help="Reference model: a directory or a Hub id (id@revision).")]
Aligned = Annotated[str, typer.Argument(metavar="ALIGNED", help="Aligned model: a full checkpoint or a PEFT adapter.")]
Lambdas = Annotated[
    list[str], typer.Option("-l", "--lambda", help="λ: a number, a list 0.25,0.5 or a range 0:2:0.25; repeatable.")
]
More = Annotated[
    list[str] | None, typer.Option("--aligned", help="A further aligned model, repeatable; λ is then a vector: 0.5+0.25.")
]
Base = Annotated[str | None, typer.Option(help="Base model of adapters, instead of the one that their config names.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin files (with weights_only=True).")]
BaseQuantization = Annotated[
    BaseQuantisation | None, typer.Option(help="What the adapter's base was quantised to in training; REF is then that.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let transformers run code from checkpoints.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling and of stochastic rounding.")]
PathFile = Annotated[Path | None, typer.Option("--path", help="A path that calibrate learned, instead of the line.")]
SampleEngine = Annotated[
    str | None, typer.Option("--engine", help="Sample by vLLM: the address of a server of export-exact's DIR, or vllm.")
]
ComputeDtype = Annotated[Dtype, typer.Option(help="auto: float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]


@app.command()
def merge(
    ref: Ref,
    aligned: Aligned,
    lam: Lambdas,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory; with several λ, the parent of lambda-<λ>.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the output; auto: each tensor's dtype in REF.")] = "auto",
    rounding: Annotated[Rounding | None, typer.Option(help="Default: stochastic for 16-bit output.")] = None,
    seed: Seed = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    format: Annotated[Format, typer.Option(help="Checkpoints, or λΔ as PEFT adapters over the base.")] = "full",
    rank: Annotated[int | None, typer.Option(min=1, help="Cut adapters to this rank by SVD.")] = None,
    extract_rank: Annotated[int | None, typer.Option(min=1, help="Δ of a dense pair as adapters of this rank.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that dera-merge wrote.")] = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Store NaN and infinity, counted.")] = False,
    shard: Annotated[str | None, typer.Option(help="i/n: write the i-th of n shares. Default: the launcher's rank.")] = None,
    path: PathFile = None,
    report: Annotated[Path | None, typer.Option(help="Of compare; warns of λ that it does not call safe.")] = None,
    more: More = None,
    base: Base = None,
    base_quantization: BaseQuantization = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write θ_ref + λΔ as an ordinary checkpoint.

    Example: dera-merge merge my-sft my-dpo-lora -l 0.25,0.5 -o merged
    """
    lams = _lams(lam, _models(more))
    common: dict[str, Any] = {"dtype": dtype, "rounding": rounding, "seed": seed, "resume": resume, "overwrite": overwrite}
    common |= {"path": path, "report": report}
    share = _share(shard)
    if format == "adapter" or extract_rank:
        if shard or allow_nonfinite:
            raise typer.BadParameter("does not go with adapters", param_hint="--shard" if shard else "--allow-nonfinite")
        common |= {"format": "adapter", "rank": rank, "extract_rank": extract_rank}
    elif rank:
        raise typer.BadParameter("goes with --format adapter", param_hint="--rank")
    else:
        common |= {"max_shard_size": max_shard_size, "allow_nonfinite": allow_nonfinite, "shard": share}
    pair = _open(ref, aligned, base, allow_pickle, trust_remote_code, base_quantization, more)
    with _progress("merging") as tell:
        unit = 0 if "format" in common else 20  # tensors, or MiB
        folders = pair.merge(output, lams, **common, progress=lambda done, all: tell(None, done >> unit, all >> unit))
    written = [_merged(value, folder) for value, folder in zip(lams, folders, strict=True)]
    if as_json:
        return _print_json({"ref": ref, **_named(aligned, more), "outputs": written})
    for entry in written:
        note = ""
        if not entry["complete"]:
            note = f"  (share {share[0]}/{share[1]} is written; the process that ends last completes it)" if share else ""
        elif entry["energy"] is not None:
            note = f"  (adapter of rank {entry['rank']}, {entry['energy']:.1%} of ‖λΔ‖²)"
        elif entry["kept"] is not None:
            note = f"  ({entry['kept']:.1%} of λΔ kept by {entry['rounding']} rounding)"
        out.print(f"λ={entry['lambda']:g}  {entry['path']}{note}", markup=False, highlight=False)
        for count, what in ((entry["saturated"], "saturated"), (entry["nonfinite"], "are NaN or infinite")):
            if count:
                err.print(f"warning: λ={entry['lambda']:g}: {count:,} weights {what}", markup=False, highlight=False)
    if all(entry["complete"] for entry in written):
        base = pair.ref.base if "format" in common else None
        out.print(_serve_lines(base, lams, folders), markup=False, highlight=False)


@app.command("export-exact")
def export_exact(
    ref: Ref,
    aligned: Aligned,
    output: Annotated[Path, typer.Option("-o", "--output", help="The directory to write.")],
    lam: Annotated[str, typer.Option("-l", "--lambda", help="λ of requests that bring none.")] = "1",
    merge_adapter: Annotated[bool, typer.Option("--merge-adapter", help="Store an adapter's model whole.")] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weight files instead of linking them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory that this command wrote.")] = False,
    base: Base = None,
    base_quantization: BaseQuantization = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Put both models into one directory, from which vLLM serves exact DeRa with a λ for each request.

    Example: dera-merge export-exact my-sft my-dpo-lora -l 0.5 -o exact
    """
    (value,) = _lams([lam], one=True)
    pair = _open(ref, aligned, base, allow_pickle, trust_remote_code, base_quantization)
    with _progress("exporting") as tell:
        made = pair.export_exact(
            output, value, merge_adapter=merge_adapter, copy=copy, overwrite=overwrite, progress=tell
        )  # fmt: skip
    if as_json:
        return _print_json({"ref": ref, "aligned": aligned, **made})
    sizes = f"{made['linked'] / 1e6:,.1f} MB linked, {made['copied'] / 1e6:,.1f} MB copied"
    held = "base and adapter on one set of weights" if made["held_once"] else "two full models"
    out.print(f"{output}  ({sizes}; {held})", markup=False, highlight=False)
    out.print(f"vllm serve {shlex.quote(str(output))}", markup=False, highlight=False)


@app.command()
def generate(
    ref: Ref,
    aligned: Aligned,
    lam: Lambdas,
    prompt: Annotated[str, typer.Option(help="Raw text, tokenized with the tokenizer's defaults (but see --chat).")],
    mode: Annotated[Mode, typer.Option(help="Two models, one, or two with one drafting.")] = "exact",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template as a user's turn.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …; cuda:0,cuda:1 puts REF and ALIGNED on two.")] = "auto",
    compute_dtype: Annotated[Dtype, typer.Option(help="auto: float32 on CPU, else the checkpoint's.")] = "auto",
    load_in: Annotated[LoadIn | None, typer.Option(help="Quantise both models on loading (bitsandbytes).")] = None,
    plausibility: Annotated[
        float | None, typer.Option(help="α in (0, 1]: no token below α times ALIGNED's best. Not exact DeRa any more.")
    ] = None,
    path: PathFile = None,
    more: More = None,
    base: Base = None,
    base_quantization: BaseQuantization = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Decode one prompt at λ.

    Example: dera-merge generate my-sft my-dpo-lora -l 0.5 --chat --prompt "What is rain?"
    """
    (value,) = _lams(lam, _models(more), one=True)
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise typer.BadParameter("must be 0 (greedy) or from 0.001 to 1000", param_hint="--temperature")
    if plausibility is not None and not 0 < plausibility <= 1:
        raise typer.BadParameter("must be above 0 and at most 1", param_hint="--plausibility")
    if mode == "merged" and (load_in or plausibility):
        hint = "--load-in" if load_in else "--plausibility"
        raise typer.BadParameter("is for exact and speculative decoding", param_hint=hint)
    if mode == "exact" and path:
        raise typer.BadParameter("is for --mode merged and speculative; exact decoding merges nothing", param_hint="--path")
    pair = _open(ref, aligned, base, allow_pickle, trust_remote_code, base_quantization, more)
    places = [_device(name) for name in device.split(",")]
    if len(places) > 2 or (len(places) == 2 and mode == "merged"):
        raise typer.BadParameter("one device, or two for exact decoding", param_hint="--device")
    from .decode import decode

    kind = None if compute_dtype == "auto" else compute_dtype
    text = decode(
        pair, value, prompt, mode=mode, chat=chat, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        device=places if len(places) == 2 else places[0], compute_dtype=kind, load_in=load_in, plausibility=plausibility,
        path=path,
    )  # fmt: skip
    if as_json:
        settings = {"load_in": load_in, "plausibility": plausibility}
        return _print_json({"ref": ref, **_named(aligned, more), "lambda": value, "mode": mode, **settings, **text})
    out.print(text["text"], markup=False, highlight=False)
    notes = []
    if text.get("acceptance_rate") is not None:
        gain = f"{text['tokens_per_verification']:.1f} tokens a verification"
        notes.append(f"speculation: {text['acceptance_rate']:.0%} of {text['drafted']} drafted tokens kept, {gain}")
    if plausibility:
        notes.append(f"not exact DeRa: tokens below {plausibility:g} times the aligned model's best are masked")
    for note in notes:
        err.print(note, markup=False, highlight=False)


@app.command()
def compare(
    ref: Ref,
    aligned: Aligned,
    lam: Lambdas,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the report.")],
    prompts: Annotated[Path | None, typer.Option(help="JSON Lines or text lines; default: 32 general prompts.")] = None,
    approx: Annotated[Path | None, typer.Option(help="A merged directory to measure, or the parent of lambda-*.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="How the merged model is stored.")] = "auto",
    rounding: Annotated[Rounding | None, typer.Option(help="Default: stochastic for 16-bit storage.")] = None,
    path: PathFile = None,
    texts: Annotated[Texts, typer.Option(help="Whose texts to sample and score.")] = "exact",
    samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of sampled texts.")] = 64,
    extras: Annotated[
        str, typer.Option("--with", help=f"What else to measure: {', '.join(EXTRAS)}; all, or none.")
    ] = "floor",
    extra_prompts: Annotated[int, typer.Option(min=1, help="How many prompts floor, ladder and layers look at.")] = 8,
    reward: Annotated[str | None, typer.Option(help="module:function, text → number; for --with coupled.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted comparison.")] = False,
    seed: Seed = 0,
    max_kl: Annotated[float | None, typer.Option(help="Gate: exit 3 if kl is above this at any λ.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Gate: exit 3 if top1 is below this at any λ.")] = None,
    engine: SampleEngine = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    more: More = None,
    base: Base = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure the merged model against exact DeRa, token by token.

    Example: dera-merge compare my-sft my-dpo-lora -l 0:2:0.25 -o report --max-kl 0.02
    """
    lams = _lams(lam, _models(more))
    wanted = _extras(extras, bool(more))
    if reward and "coupled" not in wanted:
        raise typer.BadParameter("needs --with coupled (or all)", param_hint="--reward")
    if any(limit is not None and not math.isfinite(limit) for limit in (max_kl, min_top1)):
        raise typer.BadParameter("a gate must be a finite number", param_hint="--max-kl, --min-top1")
    pair = _open(ref, aligned, base, allow_pickle, trust_remote_code, more=more)
    place = _device(device)
    _check_report_folder(output, pair)
    from . import fidelity
    from .ledger import launched
    from .prompts import read
    from .rewards import function

    with _progress("comparing") as tell:
        report = fidelity.compare(
            pair, lams, None if prompts is None else read(prompts), approx=approx, path=path, dtype=dtype, rounding=rounding,
            texts=texts, samples=samples, max_new_tokens=max_new_tokens, extras=wanted, extra_prompts=extra_prompts,
            reward=function(reward) if reward else None, seed=seed, engine=engine, device=place,
            progress=tell, compute_dtype="float32" if compute_dtype == "auto" else compute_dtype, unfinished=output,
            resume=resume,
        )  # fmt: skip
    report.command = shlex.join(["dera-merge", *sys.argv[1:]])
    gate = report.gate(max_kl, min_top1) if max_kl is not None or min_top1 is not None else None
    if launched()[0]:  # another process writes and prints
        raise typer.Exit(3 if gate and not gate["passed"] else 0)
    report.save(output)
    if as_json:
        _print_json(report.to_dict())
    else:
        out.print(_fidelity_table(report.results))
        from .report import LEGEND, sentences

        out.print(LEGEND, markup=False, highlight=False)
        for row in report.results:
            out.print(f"- {' '.join(sentences(row))}", markup=False, highlight=False)
        out.print(f"Report: {output / 'report.html'}", markup=False, highlight=False)
        if gate:
            verdict = "passed" if gate["passed"] else "not met at λ = " + ", ".join(f"{x:g}" for x in gate["failed"])
            out.print(f"Gate: {verdict}", markup=False, highlight=False)
    if gate and not gate["passed"]:
        raise typer.Exit(3)


@app.command()
def calibrate(
    ref: Ref,
    aligned: Aligned,
    lam: Lambdas,
    output: Annotated[Path, typer.Option("-o", "--output", help="The path file to write (.safetensors).")],
    prompts: Annotated[Path | None, typer.Option(help="What to learn on; default: prompts that REF writes itself.")] = None,
    kind: Annotated[PathKind, typer.Option(help="curve: gains and low-rank curves; gains: a number a layer.")] = "curve",
    rank: Annotated[int, typer.Option(min=1, help="Of the curve.")] = 16,
    texts: Annotated[int, typer.Option(min=1, help="How many to sample from exact DeRa.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of these texts.")] = 48,
    passes: Annotated[int, typer.Option(min=1, help="How often to go over them.")] = 3,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Relative to the size of what it changes.")] = 0.02,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a path file.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    base: Base = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Learn a path through the two models that follows exact DeRa, for merge, compare and generate --path.

    Example: dera-merge calibrate my-sft my-dpo-lora -l 0,2 -o path.safetensors
    """
    lams = _lams(lam)
    if not 0 < learning_rate < 1:
        raise typer.BadParameter("must be between 0 and 1", param_hint="--learning-rate")
    pair = _open(ref, aligned, base, allow_pickle, trust_remote_code)
    place = _device(device)
    _check_path_file(output, overwrite)
    from .calibration import calibrate as learn
    from .prompts import read

    with _progress("calibrating") as tell:
        curve = learn(
            pair, lams, None if prompts is None else read(prompts), kind=kind, rank=rank, texts=texts,
            max_new_tokens=max_new_tokens, passes=passes, learning_rate=learning_rate, seed=seed, device=place,
            compute_dtype="float32" if compute_dtype == "auto" else compute_dtype, progress=tell,
        )  # fmt: skip
    curve.save(output)
    if as_json:
        return _print_json({"ref": ref, "aligned": aligned, "path": str(output), **curve.describe(), **curve.recipe})
    for side, row in curve.recipe["held_out"].items():
        where = "λ ≤ 1" if side == "inner" else "λ > 1"
        gain = f"{row['line'] / row['path']:.2f} times nearer" if row["path"] < row["line"] else "nothing was learned"
        figures = f"{row['line']:.2g} on the line, {row['path']:.2g} on the path ({gain})"
        out.print(f"{where}: kl on {row['texts']} held-out texts {figures}", markup=False, highlight=False)
    out.print(f"{output}  ({curve.kind}, λ from {curve.span[0]:g} to {curve.span[1]:g})", markup=False, highlight=False)


@app.command()
def inspect(
    ref: Ref,
    aligned: Annotated[str | None, typer.Argument(metavar="[ALIGNED]", help="Aligned model.")] = None,
    merged: Annotated[str | None, typer.Option(help="A checkpoint merged at λ=1 by any tool: did it lose anything?")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Count ulps of this dtype; auto: of each tensor's in REF.")] = "auto",
    base: Base = None,
    base_quantization: BaseQuantization = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what a model is, or how far two are apart and what would stop a merge.

    Example: dera-merge inspect my-sft my-dpo-lora
    """
    from .inspect import describe, inspect_pair

    if merged and not aligned:
        raise typer.BadParameter("needs ALIGNED, to know what should be in it", param_hint="--merged")
    models = [describe(name, allow_pickle, trust_remote_code) for name in (ref, aligned, merged) if name]
    result: dict[str, Any] = {"models": models}
    if aligned:
        pair = _open(ref, aligned, base, allow_pickle, trust_remote_code, base_quantization)
        import torch

        with _progress("reading") as tell:
            kind = None if dtype == "auto" else getattr(torch, dtype)
            result["delta"] = inspect_pair(pair, kind, lambda done, total: tell(None, done, total), merged)
    failed = typer.Exit(3) if merged and result["delta"]["lost"] else None
    if as_json:
        _print_json(result)
        if failed:
            raise failed
        return
    for model in models:
        out.print(_model_line(model), markup=False, highlight=False)
    if aligned:
        delta = result["delta"]
        if delta["layers"]:
            out.print(_delta_table(delta))
        ending = f"A merge is not possible: {delta['problem']}" if delta["problem"] else "Nothing stops a merge."
        out.print(ending, markup=False, highlight=False)
        if delta["tensors"]:
            out.print(_kept_line(delta, merged or "a merge at λ=1"), markup=False, highlight=False)
    if failed:
        raise failed


@app.command()
def sweep(
    ref: Ref,
    aligned: Aligned,
    prompts: Annotated[Path, typer.Option(help="The validation set: JSON Lines or text lines.")],
    reward: Annotated[
        list[str], typer.Option(help="module:function, command:…, model:ID[#LABEL], length or lexicon; repeatable.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory of the report, and of texts as they come.")],
    lam: Annotated[
        list[str] | None, typer.Option("-l", "--lambda", help="λ of interest (default 0,2): the curve spans them.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Of several rewards: 1,0.5. Default: 1 each.")] = None,
    anchors: Annotated[str | None, typer.Option(help="λ to sample at. Default: 0,0.5,1,2 and the ends.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt at each anchor.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of sampled texts.")] = 64,
    mode: Annotated[Mode, typer.Option(help="Whose texts; speculative: exact DeRa's, the merged model drafting.")] = "exact",
    reweight: Annotated[bool, typer.Option("--reweight/--no-reweight", help="Curves from the texts of a few λ.")] = True,
    merged: Annotated[bool, typer.Option("--merged/--no-merged", help="Sample the merged model at the anchors too.")] = True,
    budget: Annotated[int | None, typer.Option(min=1, help="Texts of exact DeRa in all; default: 3 more anchors.")] = None,
    from_scored: Annotated[Path | None, typer.Option(help="Texts sampled and scored before; nothing is sampled.")] = None,
    beta: Annotated[float | None, typer.Option(help="KL coefficient of ALIGNED's training, for β/λ.")] = None,
    path: PathFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted sweep.")] = False,
    seed: Seed = 0,
    engine: SampleEngine = None,
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    more: More = None,
    base: Base = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Choose λ: reward against KL on a validation set.

    Example: dera-merge sweep my-sft my-dpo-lora --prompts validation.jsonl --reward mymodule:reward -o sweep
    """
    lams = _lams(lam, _models(more)) if lam else None
    places = _lams([anchors], _models(more)) if anchors else None
    try:
        shares = [float(part) for part in weights.split(",")] if weights else None
    except ValueError:
        raise typer.BadParameter(f"{weights!r} is no list of numbers", param_hint="--weights") from None
    if shares and len(shares) != len(reward):
        raise typer.BadParameter(f"{len(shares)} for {len(reward)} rewards", param_hint="--weights")
    if engine and from_scored:
        raise typer.BadParameter("samples nothing, as --from-scored brings the texts", param_hint="--engine")
    if beta is not None and not 0 < beta < math.inf:
        raise typer.BadParameter("must be above 0", param_hint="--beta")
    pair = _open(ref, aligned, base, allow_pickle, trust_remote_code, more=more)
    place = _device(device)
    _check_report_folder(output, pair)
    from .ledger import launched
    from .prompts import read
    from .rewards import load_reward
    from .selection import read_scored
    from .selection import sweep as choose

    rewards = [load_reward(spec, place) for spec in reward]
    scored = read_scored(from_scored) if from_scored else None
    with _progress("sweeping") as tell:
        result = choose(
            pair, read(prompts), rewards, lams, weights=shares, anchors=places, samples=samples,
            max_new_tokens=max_new_tokens, mode=mode, reweight=reweight, merged=merged, budget=budget, scored=scored,
            beta=beta, path=path, seed=seed, engine=engine, device=place, out=output, resume=resume, progress=tell,
            compute_dtype="float32" if compute_dtype == "auto" else compute_dtype,
        )  # fmt: skip
    if launched()[0]:  # another process writes and prints
        return
    result.save(output)
    if as_json:
        return _print_json(result.to_dict())
    from .sweep_report import LEGEND, cells, columns, sentences, shown

    table = Table(title="What λ earns and costs", **PLAIN)
    left_out = ("length", "wins_aligned", "wins_ref")  # so that it fits 80 columns; the report has all
    left_out += ("gain_ci",) if len(rewards) > 1 else ()  # each reward has a column then
    wanted = tuple(column for column in columns(result) if column not in left_out)
    for column in wanted:
        table.add_column("λ" if column == "lambda" else column, justify="right", overflow="fold")
    for row in shown(result):
        table.add_row(*cells(row, wanted), style="bold" if row["lambda"] == result.best["lambda"] else None)
    out.print(table)
    out.print(LEGEND, markup=False, highlight=False)
    for sentence in sentences(result):
        out.print(f"- {sentence}", markup=False, highlight=False)
    if result.commands:
        out.print("To ship it:", markup=False, highlight=False)
    for line in result.commands:
        out.print(f"    {line}", markup=False, highlight=False)
    out.print(f"Report: {output / 'sweep.html'}", markup=False, highlight=False)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What merge wrote: one λ, or the parent of lambda-*.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Model repository, user/name; made if it is not there.")],
    revision: Annotated[str | None, typer.Option(help="Branch for the one λ; default: main.")] = None,
    main: Annotated[str | None, typer.Option(help="With several λ: the one on main; none: a card alone.")] = None,
    report: Annotated[Path | None, typer.Option(help="Of compare on these weights, for the card.")] = None,
    license: Annotated[str | None, typer.Option(help="Where the parents' differ, or say nothing.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Publish what failed the report's gate.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files, commits and cards; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish merged checkpoints or adapters on the Hub, each λ a branch, with a card that says what they are.

    Example: dera-merge push merged me/my-model --main 0.5 --report report
    """
    from .hub import push_to_hub

    chosen: Any = main if main in (None, "none") else _lams([main], models=lambdas.width(main), one=True)[0]
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not err.is_terminal:
        disable_progress_bars()

    def tell(what: str, done: int, total: int) -> None:
        if err.is_terminal:  # huggingface_hub draws the bars of uploads itself
            err.print(f"{what} ({done}/{total})", markup=False, highlight=False)

    plan = push_to_hub(
        folder, repo_id, revision=revision, main=chosen, report=report, license=license, private=private or None,
        create_pr=create_pr, force=force, dry_run=dry_run, progress=tell,
    )  # fmt: skip
    if as_json:
        return _print_json(plan.to_dict())
    for note in plan.notes:
        err.print(f"note: {_line(note)}", markup=False, highlight=False)
    if dry_run:
        where = plan.repo_id if plan.exists else f"{plan.repo_id} (new{', private' if private else ''})"
        out.print(f"Nothing was sent. {len(plan.targets)} commits to {where}, main last:", markup=False, highlight=False)
    for target in plan.targets:
        sizes = sum(map(target.size, target.files))
        done = plan.commits.get(target.revision, "new branch" if not target.exists else "")
        what = f"{target.revision}  {len(target.files)} files, {sizes / 1e6:.1f} MB  {done}"
        out.print(what, markup=False, highlight=False)
        if dry_run:
            for name in target.files:
                out.print(f"  + {name}  {target.size(name):,} bytes", markup=False, highlight=False)
            for name in target.delete:
                out.print(f"  - {name}", markup=False, highlight=False)
    if dry_run:
        card = plan.targets[-1]
        out.print(f"\nThe card of {card.revision}:\n\n{card.card}", markup=False, highlight=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the demo writes.")] = Path("demo-output"),
    as_json: AsJson = False,
) -> None:
    """Show what λ does, on a tiny pair that comes with the package: texts, figures, a plot, a merged checkpoint.

    Example: dera-merge demo
    """
    from .demo.run import run

    _device("cpu")
    with _progress("demo") as tell:
        result = run(output, progress=tell)
    if as_json:
        return _print_json(result)
    table = Table("λ", "exact DeRa (two models)", "merged (one model)", title=f"Prompt: {result['prompt']}", show_lines=True)
    for sample in result["samples"]:
        table.add_row(f"{sample['lambda']:g}", sample["exact"], sample["merged"])
    out.print(table)
    rewards = {f"reward {name}": [f"{value:.2f}" for value in result[f"reward_{name}"]] for name in ("exact", "merged")}
    out.print(_fidelity_table(result["results"], ("lambda", "kl", "tv", "top1", "kl_ref", "captured"), rewards))
    out.print(f"Plot: {result['plot']}\nMerged checkpoint, loaded back with plain transformers: {result['checkpoint']}",
              markup=False, highlight=False)  # fmt: skip


# Helpers


def _lams(texts: list[str], models: int = 1, one: bool = False) -> list[Any]:
    try:
        values = lambdas.parse_lambdas(texts, models)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--lambda") from None
    if one and len(values) != 1:
        raise typer.BadParameter(f"this command takes one λ, not {len(values)}", param_hint="--lambda")
    return values


def _models(more: list[str] | None) -> int:
    """How many aligned models there are."""
    return 1 + len(more or ())


def _open(
    ref: str, aligned: str, base: str | None, allow_pickle: bool, trust_remote_code: bool,
    base_quantization: str | None = None, more: list[str] | None = None,
) -> ModelPair:  # fmt: skip
    from .pair import ModelPair

    return ModelPair.from_pretrained(
        ref, [aligned, *(more or ())], base=base, base_quantization=base_quantization, allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def _named(aligned: str, more: list[str] | None) -> dict[str, Any]:
    """What JSON says of the aligned model, or of several."""
    return {"aligned": [aligned, *more] if more else aligned}


def _share(text: str | None) -> tuple[int, int] | None:
    """`i/n`, or what `torchrun`, `accelerate launch` or `srun` say of this process."""
    if text is None:
        for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
            if os.environ.get(rank, "").isdigit() and os.environ.get(size, "").isdigit() and int(os.environ[size]) > 1:
                return int(os.environ[rank]) + 1, int(os.environ[size])
        return None
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise typer.BadParameter(f"{text!r} is not i/n with 1 ≤ i ≤ n", param_hint="--shard")
    return int(i), int(n)


def _merged(lam: Any, folder: Path) -> dict[str, Any]:
    """What `merge` says of one output."""
    from .output import RECIPE, read_recipe

    entry: dict[str, Any] = {"lambda": lam, "path": str(folder), "complete": (folder / RECIPE).is_file()}
    recipe = read_recipe(folder) if entry["complete"] else {}
    statistics = recipe.get("statistics", {})
    return entry | {key: recipe.get(key) for key in ("rounding", "rank")} | {
        key: statistics.get(key) for key in ("kept", "error", "saturated", "nonfinite", "energy")
    }  # fmt: skip


def _serve_lines(base: Source | None, lams: list[Any], folders: list[Path]) -> str:
    """How to serve what was merged with vLLM: each checkpoint by itself, or all adapters over `base`."""
    from .adapter import serving_rank

    if base is None:
        return "\n".join(shlex.join(["vllm", "serve", str(folder)]) for folder in folders)
    rank = serving_rank(folders[0])
    if rank is None:
        return "The rank is above what vLLM serves (512); --rank cuts it"
    revision = ["--revision", base.revision] if base.revision else []
    model = base.name.partition("@")[0] if base.revision else base.name
    words = ["vllm", "serve", model, *revision, "--enable-lora", "--max-lora-rank", rank, "--max-loras", len(lams)]
    modules = [f"lambda-{lam:g}={folder}" for lam, folder in zip(lams, folders, strict=True)]
    return shlex.join(map(str, [*words, "--lora-modules", *modules]))


def _device(name: str) -> torch.device:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # transformers' bars per loaded model would break into ours
    from .ledger import launched

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
        raise DeraError(f"device {name!r} cannot be used: {_line(error)}") from error
    return device


def _extras(text: str, several: bool) -> list[Any]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return [extra for extra in EXTRAS if not (several and extra in ("predict", "layers"))]
    if names in (["none"], []):
        return []
    if unknown := [name for name in names if name not in EXTRAS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(EXTRAS)}, all, none", param_hint="--with")
    return names


def _check_path_file(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise DeraError(f"{file} is a directory; give a file for the path")
    if not file.exists():
        return
    if not overwrite:
        raise DeraError(f"{file} exists; --overwrite replaces it, or give another --output")
    from .curve import Curve

    Curve.load(file)  # only what dera-merge wrote is replaced


def _check_report_folder(folder: Path, pair: ModelPair) -> None:
    if folder.exists() and not folder.is_dir():
        raise DeraError(f"{folder} is a file; give a directory for the report")
    inputs = [source.folder for side in pair.every_side for source in (side.source, side.base)]
    if any(folder.resolve().is_relative_to(place) for place in inputs):
        raise DeraError(f"{folder} is or lies in an input; give another --output")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _fidelity_table(
    results: list[dict[str, Any]], columns: Sequence[str] | None = None, extra: dict[str, list[str]] | None = None
) -> Table:
    from .report import COLUMNS, cells

    left_out = ("tokens", "kl_rounding", "verdict")  # so that it fits 80 columns; the report has all
    fits = [column for column in COLUMNS if column not in left_out]
    wanted, extra = columns or fits, extra or {}
    table = Table(title="Merged against exact DeRa", **PLAIN)
    for column in (*wanted, *extra):
        table.add_column("λ" if column == "lambda" else column, justify="right", overflow="fold")
    for result, *more in zip(results, *extra.values(), strict=True):
        row = dict(zip(COLUMNS, cells(result), strict=True))
        table.add_row(*(row[column] for column in wanted), *more)
    return table


def _delta_table(delta: dict[str, Any]) -> Table:
    from .inspect import STEPS

    table = Table(title="Δ = θ_aligned - θ_ref; |Δ| in ulps of the output dtype", **PLAIN)
    for column in ("layer", "weights", "‖Δ‖/‖θ‖", *STEPS):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for kind, row in [*delta["layers"].items(), ("all", delta["total"])]:
        size = "–" if row["relative"] is None else f"{row['relative']:.1e}"
        table.add_row(kind, f"{row['weights']:,}", size, *(f"{row['steps'].get(step, 0):.1%}" for step in STEPS))
    return table


def _kept_line(delta: dict[str, Any], where: str) -> str:
    rows = delta["tensors"]
    if lost := delta["lost"]:
        first = lost[0]
        part = f"keeps {rows[first]['kept']:.1%} of its change" if first in rows else "changed, though the adapter leaves it"
        return f"LOST in {where}: {len(lost)} of {len(rows)} changed tensors; {first} {part}"
    worst = min(rows, key=lambda name: rows[name]["kept"])
    return f"Nothing is lost in {where}: of {len(rows)} changed tensors {worst} keeps least, {rows[worst]['kept']:.1%} of Δ."


def _model_line(model: dict[str, Any]) -> str:
    what = model["adapter"] + f" adapter of {model['base']}" if model["kind"] == "adapter" else str(model["architecture"])
    parts = [what, f"{model['parameters']:,} parameters", "/".join(model["dtypes"]), f"{model['bytes'] / 1e6:.1f} MB"]
    if model.get("quantised"):
        parts.append("quantised")
    if model.get("partial"):
        parts.append("PARTIAL: an unfinished merge")
    if model.get("unmergeable"):
        parts.append(model["unmergeable"])
    if merged := model.get("merged"):
        sides = [merged["ref"], merged["aligned"], *(merged["others"] or ())]
        names = " and ".join(side["name"] for side in sides)
        parts.append(f"merged by dera-merge: λ={merged['lambda']:g} of {names}")
        again = [side["name"] for side in sides if side.get("merge")]
        parts += [f"{name} is a merge itself" for name in again]
    if fidelity := model.get("fidelity"):
        from .report import number

        figures = [f"{key} {number(fidelity[key])}" for key in ("kl", "tv", "top1") if fidelity[key] is not None]
        parts.append(f"{fidelity['verdict']} ({', '.join(figures)})")
    return f"{model['name']}: " + ", ".join(parts)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str | None, int, int], None]]:
    """A progress bar on stderr with the time left, or a line a minute in a log; gives a function (what, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    logged = time.monotonic()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def tell(what: str | None, done: int, total: int) -> None:
            nonlocal logged
            bar.update(task, description=what or title, completed=done, total=total)
            if not err.is_terminal and time.monotonic() - logged >= LOG_SECONDS:
                logged = time.monotonic()
                err.print(f"{what or title}: {done} of {total}", markup=False, highlight=False)

        yield tell


def _line(error: BaseException | str) -> str:
    """An error's message as one line, control characters escaped."""
    text = " ".join(part.strip() for part in str(error).splitlines() if part.strip()) or type(error).__name__
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    if issubclass(category, DeraWarning):
        err.print(f"warning: {_line(message) if isinstance(message, Warning) else message}", markup=False, highlight=False)


def main() -> None:
    """Run the command line and exit."""
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", DeraWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
        err.print(f"error: {_line(error)}", markup=False, highlight=False)
        code = 1
    except Exception as error:  # what no one foresaw is one line too; the environment variable shows where it came from
        if os.environ.get("DERA_MERGE_TRACEBACK"):
            raise
        hint = "set DERA_MERGE_TRACEBACK=1 to see where"
        err.print(f"error: {type(error).__name__}: {_line(error)} ({hint})", markup=False, highlight=False)
        code = 1
    if code == 130:  # typer makes it of Ctrl-C, and says nothing
        err.print("interrupted")
    sys.exit(code)
