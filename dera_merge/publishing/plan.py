"""Everything that a push will do: looked at before anything is sent."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .. import lambdas
from ..errors import DeraError, warn
from ..files.atomic import json_bytes, load_json
from ..measuring.report import Report
from ..merging.parts import output_name
from ..merging.recipe import CONFIGS, FIGURES, RECIPE, verify, weights_digest
from ..models.kinds import sees_images
from ..models.source import GENERATION, PROCESSOR_FILES, TOKENIZER_FILES
from ..pages.fidelity import plot_fidelity
from ..progress import Progress
from . import card
from .hub import CARD, cause_of, downloaded, explained, files_at, full_id, if_there
from .licence import check_licence, inherited_from

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PLOT = "fidelity.png"
_REPLACED = {*CONFIGS, GENERATION, *TOKENIZER_FILES, *PROCESSOR_FILES, RECIPE, FIGURES, PLOT}
_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch_model|adapter_model).*\.bin(\.index\.json)?|tf_model\.h5|flax_model\.msgpack"
)
_BRANCH = re.compile(r"[\w+][\w.+\-]*(/[\w+][\w.+\-]*)*", re.ASCII)


@dataclass
class Target:
    """What one branch will be.

    Attributes:
        revision: the branch.
        lam: λ of its weights; None for a card alone.
        files: path in the repository → local file, or bytes.
        delete: what lies there and would contradict these files.
        parent: the commit that this was planned on; None where the repository is new.
        exists: whether the branch exists.
        card: its README.md.
    """

    revision: str
    lam: lambdas.Lam | None
    files: dict[str, Path | bytes]
    delete: list[str]
    parent: str | None
    exists: bool
    card: str

    def size(self, name: str) -> int:
        """Bytes of one of its files."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


@dataclass
class Plan:
    """Everything that a push will do, main last.

    Attributes:
        head: the last commit of main; None where the repository is new.
        notes: what is worth knowing before.
        commits: revision → address of the commit, once it is made.
    """

    repo_id: str
    private: bool | None
    create_pr: bool
    head: str | None = None
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commits: dict[str, str] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether the repository exists."""
        return self.head is not None

    def to_dict(self) -> dict[str, Any]:
        """What `push --json` prints."""
        return {
            "repo_id": self.repo_id, "exists": self.exists, "private": self.private, "create_pr": self.create_pr,
            "notes": self.notes, "commits": self.commits,
            "branches": [
                {"revision": t.revision, "lambda": t.lam, "new": not t.exists, "delete": t.delete, "card": t.card,
                 "files": {name: t.size(name) for name in t.files}}
                for t in self.targets
            ],
        }  # fmt: skip


def planned(
    api: HfApi, folder: Path, repo_id: str, *, revision: str | None, main: float | Literal["none"] | None,
    report: str | os.PathLike[str] | Report | None, license: str | None, private: bool | None, create_pr: bool,
    force: bool,
    dry_run: bool, tell: Progress,
) -> Plan:  # fmt: skip
    """The plan of a push, from the arguments of `push_to_hub`; asks the Hub, and sends nothing.

    Raises:
        DeraError: as `push_to_hub`.
    """
    folders = merged_folders(folder)
    recipes: dict[float, tuple[Path, dict[str, Any]]] = {}
    for number, place in enumerate(folders):
        tell("checking the files", number, len(folders))
        recipe = verify(place)
        if (lam := recipe["lambda"]) in recipes:
            raise DeraError(f"{place} and {recipes[lam][0]} both hold λ={lam:g}; move one away")
        recipes[lam] = place, recipe
    named = {lam: output_name(lam, recipe.get("path")) for lam, (_, recipe) in sorted(recipes.items())}
    branches = _branches(named, revision, main, create_pr)
    shown = _report_of(report, recipes, force) if report is not None else None

    repo_id = full_id(api, repo_id)
    plan = Plan(repo_id, private, create_pr)
    asked = True
    try:
        info = if_there(lambda: api.repo_info(repo_id))
    except Exception as error:  # a plan can be looked at without a network or a token
        if not dry_run:
            raise
        info, asked = None, False
        why = explained(cause_of(error), repo_id).partition(";")[0]
        plan.notes.append(f"{why}; this plan takes {repo_id} to be new")
    plan.head = info.sha if info is not None else None
    if info is not None and private is not None and bool(info.private) != private:
        now = "private" if info.private else "public"
        raise DeraError(f"{repo_id} is there and {now}; its settings on the Hub change that, --private does not")
    if asked and if_there(lambda: api.repo_info(repo_id, repo_type="dataset")) is not None:
        plan.notes.append(f"a dataset is called {repo_id} too; this is the model of that name")
    parents = [parent for _, recipe in recipes.values() for parent in card.parents(recipe)]
    inherited = inherited_from(api, parents, license, plan.notes)
    for parent in {parent.name: parent for parent in parents if parent.role != "base"}.values():
        if not parent.on_hub:
            plan.notes.append(f"{parent.name} is a local model: the card names it in words, not as base_model")
    adapters = [recipe for _, recipe in recipes.values() if recipe.get("format") == "adapter"]
    if adapters and not (base := card.base_of(adapters[0])).on_hub:
        plan.notes.append(f"the adapter names its base by a path of this machine; others need {base.name} too, and "
                          "pass it to PEFT themselves")  # fmt: skip
    siblings = [(branch, lam) for branch, lam in branches if lam is not None and branch != "main"]
    figures = _figures(shown) if shown else {}
    for branch, lam in branches:
        plan.targets.append(_target(api, plan, branch, lam, recipes, shown, figures, inherited, license, siblings))
    return plan


def merged_folders(folder: Path) -> list[Path]:
    """A merged directory itself, or the `lambda-*` in it. Raises DeraError where there is neither."""
    if not folder.is_dir():
        raise DeraError(f"there is no directory {folder}")
    if any((folder / name).exists() for name in (RECIPE, *CONFIGS)):
        return [folder]
    folders = sorted(place for place in folder.glob("lambda-*") if place.is_dir())
    if not folders:
        raise DeraError(f"{folder} holds no {RECIPE} and no lambda-*; give a directory that dera-merge merge wrote")
    return folders


def _branches(
    named: dict[lambdas.Lam, str], revision: str | None, main: lambdas.Lam | Literal["none"] | None, create_pr: bool
) -> list[tuple[str, lambdas.Lam | None]]:
    """Branch and λ of each commit, main last; λ is None for a card alone.

    Args:
        named: λ → what its branch is called where there are several.
    """
    lams = list(named)
    if len(lams) > 1 and main is None:
        names = ", ".join(lambdas.name(lam) for lam in lams)
        raise DeraError(f"several λ ({names}); --main says which one is on main, --main none puts the card alone there")
    if create_pr and (len(lams) > 1 or main is not None):
        raise DeraError("--create-pr is for one λ; a pull request has one commit's files")
    if revision is not None and (len(lams) > 1 or main is not None):
        raise DeraError("--revision is for one λ; with --main each λ has a branch lambda-<λ>")
    if revision is not None and (
        not _BRANCH.fullmatch(revision) or ".." in revision or revision.endswith((".lock", "."))
    ):
        raise DeraError(f"{revision!r} is no name for a branch")
    if main is None:
        return [(revision or "main", lams[0])]
    if main != "none" and main not in lams:
        raise DeraError(f"--main {main:g}: there is no λ={main:g} here, only {', '.join(map(lambdas.name, lams))}")
    return [*((branch, lam) for lam, branch in named.items()), ("main", None if main == "none" else main)]


def _target(
    api: HfApi, plan: Plan, branch: str, lam: float | None, recipes: dict[float, tuple[Path, dict[str, Any]]],
    report: Report | None, figures: dict[str, Path | bytes], inherited: dict[str, Any], license: str | None,
    siblings: Sequence[tuple[str, float]],
) -> Target:  # fmt: skip
    """What one branch will be; arguments as in `planned`, `siblings` as for `card.section`."""
    repo_id = plan.repo_id
    info = if_there(lambda: api.repo_info(repo_id, revision=branch)) if plan.exists else None
    exists, parent = info is not None, info.sha if info else plan.head  # a new branch begins as main
    present = files_at(api, repo_id, parent)
    files: dict[str, Path | bytes] = {}
    place, recipe = recipes[siblings[0][1] if lam is None else lam]
    if lam is not None:
        files = {name: place / name for name in [*recipe["files"], RECIPE]} | figures
    plot = PLOT if PLOT in files else None
    config = load_json(place / "config.json") if (place / "config.json").is_file() else {}
    section = card.section(recipe, report, repo_id, branch, siblings, lam is None, plot, sees_images(config))
    values = card.metadata(recipe, None if lam is None else report, repo_id, inherited)
    old = downloaded(api, repo_id, parent, CARD) if CARD in present else None
    replace = ("license", "license_name", "license_link") if license else ()
    check_licence(old, inherited, license, repo_id)
    text = card.edited(old, values, section, repo_id.rpartition("/")[2], replace)
    stale = {name for name in present if name in _REPLACED or _WEIGHTS.fullmatch(name)} - files.keys()
    if lam is None and RECIPE not in present and stale:
        plan.notes.append(f"main keeps its {len(stale)} files of a model that dera-merge did not write")
        stale = set()
    return Target(branch, lam, files | {CARD: text.encode()}, sorted(stale), parent, exists, text)


def _figures(report: Report) -> dict[str, Path | bytes]:
    """The report as files: its figures without texts, and its plot."""
    left_out = ("worst", "per_prompt", "per_position", "layers")
    rows = [{key: value for key, value in row.items() if key not in left_out} for row in report.results]
    content: dict[str, Any] = report.to_dict() | {"results": rows, "texts": []}
    files: dict[str, Path | bytes] = {FIGURES: json_bytes(content)}
    with tempfile.TemporaryDirectory() as place:
        if plot := plot_fidelity(report.results, Path(place) / PLOT, prediction=report.prediction):
            files[PLOT] = plot.read_bytes()
    return files


def _report_of(
    report: str | os.PathLike[str] | Report, recipes: dict[float, tuple[Path, dict[str, Any]]], force: bool
) -> Report:
    """The report, after checking that it is of these weights and that its gate was passed."""
    loaded = report if isinstance(report, Report) else Report.load(report)
    name = "the report" if isinstance(report, Report) else os.fspath(report)
    settings = loaded.settings
    for lam, (place, recipe) in recipes.items():
        row = loaded.at(lam)
        if difference := _differs(row, settings, recipe):
            raise DeraError(
                f"{name} is of other weights than {place}: another {difference}; compare these (--approx {place})"
            )
        if lam in (loaded.gated or {}).get("failed", ()) and not force:
            raise DeraError(f"λ={lam:g} failed the gate of {name}; --force publishes it all the same")
        if row["verdict"] == "not DeRa any more":
            warn(f'λ={lam:g}: {name} says "{row["verdict"]}", and so will the card')
    return loaded


def _differs(row: dict[str, Any], settings: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """In what a report differs from these weights; None where it was measured on them.

    A report with `--approx` has their hash. Any other was measured on the weights that its settings make, which are
    those of a directory that the same settings made.
    """
    if row.get("weights"):
        return None if row["weights"] == weights_digest(recipe) else "hash"
    measured, stored = (
        {"pair": source.get("fingerprint"), "path": path.get("sha256") if isinstance(path, dict) else None,
         "dtype": source.get("dtype"), "rounding": source.get("rounding"), "seed": source.get(seed)}
        for source, seed in ((settings, "merge_seed"), (recipe, "seed")) for path in [source.get("path")]
    )  # fmt: skip
    if recipe.get("format") == "adapter":  # λΔ itself, whatever it is stored in, unless its rank was cut
        stored["dtype"], stored["rank"], measured["rank"] = "float32", recipe.get("statistics", {}).get("energy"), 1.0
    if measured["dtype"] == "float32" or measured["rounding"] == stored["rounding"] == "nearest":  # nothing is drawn
        measured["rounding"], measured["seed"] = stored["rounding"], stored["seed"]
    return next((key for key in stored if measured[key] != stored[key]), None)
