"""Examine a directory that any tool has made: a finding for each thing that is wrong, and what would load it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import DeraError, DeraWarning
from ..files.places import inner_models
from ..measuring.inspection import inspect_pair
from ..merging.recipe import CONFIGS, PARTIAL, RECIPE, verify
from ..merging.tally import LOUD, doubt
from ..models.pair import Pair
from ..models.source import Source, load_config
from ..models.trust import Trust
from . import stored
from .adapters import Tell, check_adapter
from .endings import check_endings
from .findings import Findings
from .names import build_config, check_names
from .settings import check_companions, check_config, check_links

_STILL = 0.95  # share of weights that did not move; training in bfloat16 with a small step leaves less than that
_ROUNDED = "merge again in float32, or by dera-merge, which rounds stochastically"  # what to do about it
PROGRAMS = {"full": ("transformers", "vLLM", "llama.cpp"), "adapter": ("PEFT", "vLLM", "llama.cpp")}


def examine(
    name: str,
    base: str | None = None,
    adapter: str | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Examine a model or an adapter, from its files alone.

    Args:
        name: a directory or a Hub id.
        base: of an adapter, what it was trained on; of a full model, what it was made of.
        adapter: with `base`: what was merged into `name`, to see whether that lost anything.
        allow_pickle, trust_remote_code: what the user allows.
        progress: called with (tensors read, tensors in all).

    Returns:
        `name`; `kind`: `"full"`, `"adapter"`, `"several"` (models inside) or None; `findings`, each with `level`
        (`"broken"` or `"warning"`), `where`, `what` and `do`; `loads`: program → None, or what stands against that it
        loads this; `needs`: program → the option that it needs; `broken`: whether a finding is.

    Raises:
        DeraError: it is neither a directory nor a repository that can be reached.
    """
    trust = Trust(allow_pickle, trust_remote_code)
    source = Source.locate(name, trust=trust)
    for other in (base, adapter):
        if other is not None:  # a name that was mistyped says nothing about `name`
            Source.locate(other, trust=trust)
    findings = Findings()
    if inner := _ours_inside(source.folder):
        kind: str | None = "several"
        for part in inner:
            own = Findings()
            _examine_one(own, Source(part, source.folder / part), base, adapter, trust, progress)
            findings.add(own, part)
        if (source.folder / "config.json").is_file():  # of export-exact: what loads the parts does not load the pair
            findings.loads.clear()
            findings.needs.clear()
    else:
        kind = _examine_one(findings, source, base, adapter, trust, progress)
    return {
        "name": name,
        "kind": kind,
        "findings": [finding.to_dict() for finding in findings.found],
        "loads": findings.loads,
        "needs": findings.needs,
        "broken": findings.any_broken,
    }


def _ours_inside(folder: Path) -> list[str]:
    """The models inside of what merge wrote for several λ, or export-exact for a pair; none elsewhere."""
    if (folder / "config.json").is_file():
        try:
            with_pair = load_config(Source(str(folder), folder)).get("model_type") == "dera"
        except DeraError:  # a finding, when the directory is examined
            return []
        return [part for part in ("base", "ref", "aligned") if with_pair and (folder / part).is_dir()]
    inner = [] if any((folder / name).is_file() for name in CONFIGS) else inner_models(folder)
    return inner if all(part.startswith("lambda-") for part in inner) else []


def _examine_one(
    findings: Findings, source: Source, base: str | None, adapter: str | None, trust: Trust, progress: Tell
) -> str | None:
    """Examine one model or adapter; `"full"`, `"adapter"`, or None where it is neither."""
    folder = source.folder
    if (folder / PARTIAL).is_file() and not any((folder / name).is_file() for name in CONFIGS):
        findings.broken(PARTIAL, "this merge is not finished", "run merge again with --resume")
        return None
    with findings.refusals("directory"):
        kind = "adapter" if source.is_adapter else "full"
        findings.loads |= dict.fromkeys(PROGRAMS[kind])
        check_links(findings, folder)
        recipe = _check_recipe(findings, folder) if (folder / RECIPE).is_file() else None
        check_companions(findings, folder)
        if kind == "adapter":
            check_adapter(findings, source, base, trust, progress)
        else:
            _check_full(findings, source, trust, progress)
            if base and not (
                adapter and recipe and recipe["lambda"] != 1
            ):  # else what should be in it is another model
                _check_against(findings, source, base, adapter, trust, progress)
        return kind
    return None


def _check_recipe(findings: Findings, folder: Path) -> dict[str, Any] | None:
    """Whether a merge of ours is still what was written, and kept what its λ asks for; its recipe."""
    try:
        recipe = verify(folder)
    except DeraError as error:
        findings.reason(RECIPE, str(error), broken=False)
        return None
    figures = recipe.get("statistics") or {}
    if said := doubt(figures.get("kept"), figures.get("error"), recipe.get("rounding"), recipe["lambda"]):
        findings.reason(RECIPE, said, broken=False)
    return recipe


def _check_full(findings: Findings, source: Source, trust: Trust, progress: Tell) -> None:
    try:
        config = load_config(source)
    except DeraError as error:
        return findings.reason("config.json", str(error))
    built = build_config(findings, source, config, trust)
    checkpoint = stored.open_weights(findings, source.folder, "model", trust)
    if checkpoint is not None:
        stored.check_files(findings, checkpoint, "model")
        stored.check_values(findings, checkpoint, progress)
        check_config(findings, source.folder, config, checkpoint)
        if built is not None and not any(finding.where == "weights" for finding in findings.found):
            check_names(findings, source, config, built, checkpoint, trust)
    if built is not None:
        check_endings(findings, source.folder, config, trust)
    return None


def _check_moved(findings: Findings, layers: Iterable[dict[str, Any]]) -> None:
    """A model of which hardly a weight moved, and then by an ulp: what rounding to nearest leaves of a small Δ."""
    changed = [row for row in layers if row["steps"].get("unchanged", 1) < 1]
    weights = sum(row["weights"] for row in changed)
    still, far = (sum(row["weights"] * row["steps"][step] for row in changed) for step in ("unchanged", ">1½"))
    if weights and still / weights > _STILL and far < (weights - still) / 2:
        findings.warn("weights", f"{still / weights:.1%} of the weights of layers that differ are BASE's own, and most "
                      "others moved by one ulp, so that rounding may have taken the change",
                      _ROUNDED)  # fmt: skip


def _check_against(
    findings: Findings, source: Source, base: str, adapter: str | None, trust: Trust, progress: Tell
) -> None:
    """A full model against what it was made of: whether anything of the training is in it, or all of an adapter."""
    # Tokens that BASE lacks are no fault of a model: they are what training, or `--new-tokens aligned`, added.
    allowed = {"allow_pickle": trust.pickle, "trust_remote_code": trust.code, "new_tokens": "aligned"}
    with warnings.catch_warnings(), findings.refusals("weights", stops=False):
        warnings.simplefilter("ignore", DeraWarning)
        if adapter is None:
            pair = Pair.from_pretrained(base, source.folder, **allowed)
            result = inspect_pair(pair, progress=progress)
            if result["problem"]:
                raise DeraError(result["problem"])
            _check_moved(findings, result["layers"].values())
            return
        result = inspect_pair(Pair.from_pretrained(base, adapter, **allowed), None, progress, source.folder)
        if result["problem"]:
            raise DeraError(result["problem"])
        rows, lost, error = result["tensors"], result["lost"], result["total"]["error"]
        if lost and lost[0] in rows:
            findings.broken(
                lost[0],
                f"it keeps {rows[lost[0]]['kept']:.1%} of what the adapter changes, and "
                f"{len(lost)} of {len(rows)} tensors keep less than 90 %",
                _ROUNDED,
                stops=False,
            )
        elif lost:
            findings.broken(
                lost[0],
                "it differs from BASE, though the adapter leaves it",
                "give the base that was merged",
                stops=False,
            )
        elif error > LOUD:
            findings.warn("weights", f"the noise of rounding is {error:.3g} times what the adapter changes", _ROUNDED)
