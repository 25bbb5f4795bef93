"""`dera-merge inspect`: what a model is, how far two are apart, what would stop a merge."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from .help import how, what
from .options import Dtype, Given, MaybeAligned, with_models
from .show import PLAIN, note, print_json, progress, say, say_figures

EXAMPLES = (
    "dera-merge inspect demo/reference",
    "dera-merge inspect demo/reference demo/aligned-lora",
)


@with_models(aligned=MaybeAligned, base_quantization=True)
def run(
    given: Given,
    merged: Annotated[str | None, what(help="A checkpoint merged at λ=1 by any tool: did it lose anything?")] = None,
    dtype: Annotated[Dtype, how(help="Count ulps of this dtype; auto: of each tensor's in REF.")] = "auto",
) -> None:
    """Say what a model is, or how far two are apart. Of two, also what would stop a merge."""
    from ..measuring.inspection import describe, inspect_pair

    if merged and not given.aligned:
        raise typer.BadParameter("needs ALIGNED, to know what should be in it", param_hint="--merged")
    trust = given.allow_pickle, given.trust_remote_code
    models = [describe(name, *trust) for name in (given.ref, given.aligned, merged) if name]
    result: dict[str, Any] = {"models": models}
    if given.aligned:
        pair = given.open()
        import torch

        with progress("reading") as tell:
            kind = None if dtype == "auto" else getattr(torch, dtype)
            result["delta"] = inspect_pair(pair, kind, lambda done, total: tell(None, done, total), merged)
    failed = typer.Exit(3) if merged and result["delta"]["lost"] else None
    if given.as_json:
        print_json(result)
        if failed:
            raise failed
        return
    for model in models:
        say(_model_line(model))
    if given.aligned:
        delta = result["delta"]
        if delta["layers"]:
            say_figures(_delta_table(delta))
        ending = f"A merge is not possible: {delta['problem']}" if delta["problem"] else "Nothing stops a merge."
        say(ending)
        if delta["tensors"]:
            say(_kept_line(delta, merged or "a merge at λ=1"))
        if delta["doubt"]:
            note(f"warning: {delta['doubt']}")
    if failed:
        raise failed


def _delta_table(delta: dict[str, Any]) -> Table:
    """Δ by kind of layer."""
    from ..measuring.inspection import STEPS

    table = Table(title="Δ = θ_aligned - θ_ref; |Δ| in ulps of the output dtype", **PLAIN)
    for column in ("layer", "weights", "‖Δ‖/‖θ‖", *STEPS):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for kind, row in [*delta["layers"].items(), ("all", delta["total"])]:
        size = "–" if row["relative"] is None else f"{row['relative']:.1e}"
        table.add_row(kind, f"{row['weights']:,}", size, *(f"{row['steps'].get(step, 0):.1%}" for step in STEPS))
    return table


def _kept_line(delta: dict[str, Any], where: str) -> str:
    """What a merge keeps of Δ, or loses."""
    rows = delta["tensors"]
    noise = f"; the noise of rounding is {delta['total']['error']:.2g} times as large as Δ"
    if lost := delta["lost"]:
        first = lost[0]
        part = (
            f"keeps {rows[first]['kept']:.1%} of its change"
            if first in rows
            else "changed, though the adapter leaves it"
        )
        return f"LOST in {where}: {len(lost)} of {len(rows)} changed tensors; {first} {part}{noise}"
    worst = min(rows, key=lambda name: rows[name]["kept"])
    least = f"{worst} keeps least, {rows[worst]['kept']:.1%} of Δ"
    return f"Nothing is lost in {where}: of {len(rows)} changed tensors {least}{noise}."


def _layout_parts(layout: dict[str, Any] | None, works: dict[str, Any] | None) -> list[str]:
    """How a full model's files are laid out, and what will not work on it."""
    if layout is None or works is None:
        return []
    parts = [f"layers at {layout['prefix']}"] if layout["prefix"] else []
    parts += [f"experts {layout['experts']}"] if layout["experts"] else []
    parts += [f"{name} of {weights:,} parameters" for name, weights in layout["towers"].items()]
    parts += [f"{layout['mtp']} tensors that predict further tokens"] if layout["mtp"] else []
    reasons: dict[str, list[str]] = {}
    for use, answer in works.items():
        if answer is not True and not (use == "images" and not layout["towers"]):
            reasons.setdefault(answer, []).append(use.replace("_", " "))
    return parts + [f"no {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _model_line(model: dict[str, Any]) -> str:
    kind = (
        model["adapter"] + f" adapter of {model['base']}" if model["kind"] == "adapter" else str(model["architecture"])
    )
    parts = [kind, f"{model['parameters']:,} parameters", "/".join(model["dtypes"]), f"{model['bytes'] / 1e6:.1f} MB"]
    parts += _layout_parts(model.get("layout"), model.get("works"))
    if model.get("quantised"):
        parts.append("quantised")
    if model.get("partial"):
        parts.append("PARTIAL: an unfinished merge")
    if model.get("unmergeable"):
        parts.append(model["unmergeable"])
    if merged := model.get("merged"):
        sides = [merged["ref"], merged["aligned"], *(merged["others"] or ())]
        names = " and ".join(side["name"] for side in sides)
        lams = ", ".join([f"λ={merged['lambda']:g}", *merged.get("lambda_for", ())])
        parts.append(f"merged by dera-merge: {lams} of {names}")
        again = [side["name"] for side in sides if side.get("merge")]
        parts += [f"{name} is a merge itself" for name in again]
    if fidelity := model.get("fidelity"):
        from ..pages.frame import number

        figures = [f"{key} {number(fidelity[key])}" for key in ("kl", "tv", "top1") if fidelity[key] is not None]
        parts.append(f"{fidelity['verdict']} ({', '.join(figures)})")
    return f"{model['name']}: " + ", ".join(parts)
