"""Publish merged directories on the Hub: one repository, a branch for each λ, the chosen one on main.

`_planned` looks at everything and writes nothing: directories whole and unchanged, a report that belongs to them, licences
that agree, what lies in the repository. `_push` then uploads all weights, makes one commit for each branch, and that of main
last. A commit is the Hub's one atomic step, and each is bound to the commit that was planned on; so whatever breaks,
main is what it was, and a second run uploads what is missing.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from . import card, lambdas
from .checkpoint import json_bytes
from .errors import DeraError
from .output import CONFIGS, FIGURES, RECIPE, verify, weights_digest
from .pair import TOKENIZER_FILES, warn

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from .fidelity import Report

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

CARD, PLOT = "README.md", "fidelity.png"
_REPLACED = {*CONFIGS, "generation_config.json", *TOKENIZER_FILES, RECIPE, FIGURES, PLOT}
_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|(pytorch_model|adapter_model).*\.bin(\.index\.json)?|tf_model\.h5|flax_model\.msgpack"
)
NO_TOKEN = "the Hub wants a token that it knows: hf auth login stores one"
PATIENCE = 600  # seconds to wait for a rate limit in all
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
        exists: whether the branch does.
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
        """Whether the repository does."""
        return self.head is not None

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id, "exists": self.exists, "private": self.private, "create_pr": self.create_pr,
            "notes": self.notes, "commits": self.commits,
            "branches": [
                {"revision": t.revision, "lambda": t.lam, "new": not t.exists, "delete": t.delete, "card": t.card,
                 "files": {name: t.size(name) for name in t.files}}
                for t in self.targets
            ],
        }  # fmt: skip


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    main: float | Literal["none"] | None = None,
    report: str | os.PathLike[str] | Report | None = None,
    license: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    force: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Upload what `merge` wrote to a model repository, which is made if it is not there.

    Args:
        folder: a merged directory, or the parent of `lambda-*`, each a full checkpoint or an adapter.
        repo_id: `user/name`.
        revision: a branch for the one λ; default: `main`.
        main: with several λ, the one that is on `main` too; `"none"` puts a card alone there.
        report: a report of `compare` on these weights, its directory or its report.json.
        license: the licence, where the parents' differ or say nothing.
        private: make a private repository. One that exists must be what is asked for.
        create_pr: open a pull request with the one λ.
        force: publish what failed the report's gate.
        dry_run: plan, and send nothing but questions.
        token: of the Hub; default: the one that is stored, or `HF_TOKEN`.
        progress: called with what is being done, and how far it is.

    Returns:
        The plan, with the commits that were made.

    Raises:
        DeraError: a directory is partial or was changed, the report is of other weights or its gate failed, licences
            conflict, or the Hub says no.
    """
    tell = progress or (lambda what, done, total: None)
    with _said(repo_id):
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        plan = _planned(
            api, Path(folder), repo_id, revision=revision, main=main, report=report, license=license, private=private,
            create_pr=create_pr, force=force, dry_run=dry_run, tell=tell,
        )  # fmt: skip
        if not dry_run:
            _push(api, plan, tell)
    return plan


# What is to be done


def _planned(
    api: HfApi, folder: Path, repo_id: str, *, revision: str | None, main: float | Literal["none"] | None,
    report: str | os.PathLike[str] | Report | None, license: str | None, private: bool | None, create_pr: bool, force: bool,
    dry_run: bool, tell: Progress,
) -> Plan:  # fmt: skip
    folders = merged_folders(folder)
    recipes: dict[float, tuple[Path, dict[str, Any]]] = {}
    for number, place in enumerate(folders):
        tell("checking the files", number, len(folders))
        recipe = verify(place)
        if (lam := recipe["lambda"]) in recipes:
            raise DeraError(f"{place} and {recipes[lam][0]} both hold λ={lam:g}; move one away")
        recipes[lam] = place, recipe
    lams = sorted(recipes)
    branches = _branches(lams, revision, main, create_pr)
    shown = _report_of(report, recipes, force) if report is not None else None

    repo_id = _full_id(api, repo_id)
    plan = Plan(repo_id, private, create_pr)
    asked = True
    try:
        info = _there(lambda: api.repo_info(repo_id))
    except Exception as error:  # a plan can be looked at without a network or a token
        if not dry_run:
            raise
        info, asked = None, False
        why = _explained(_cause(error), repo_id).partition(";")[0]
        plan.notes.append(f"{why}; this plan takes {repo_id} to be new")
    plan.head = info.sha if info is not None else None
    if info is not None and private is not None and bool(info.private) != private:
        now = "private" if info.private else "public"
        raise DeraError(f"{repo_id} is there and {now}; its settings on the Hub change that, --private does not")
    if asked and _there(lambda: api.repo_info(repo_id, repo_type="dataset")) is not None:
        plan.notes.append(f"a dataset is called {repo_id} too; this is the model of that name")
    parents = [parent for _, recipe in recipes.values() for parent in card.parents(recipe)]
    inherited = _inherited(api, parents, license, plan)
    for parent in {parent.name: parent for parent in parents if parent.role != "base"}.values():
        if not parent.on_hub:
            plan.notes.append(f"{parent.name} is a local model: the card names it in words, not as base_model")
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
    found = sorted(place for place in folder.glob("lambda-*") if place.is_dir())
    if not found:
        raise DeraError(f"{folder} holds no {RECIPE} and no lambda-*; give a directory that dera-merge merge wrote")
    return found


def _branches(
    lams: list[lambdas.Lam], revision: str | None, main: lambdas.Lam | Literal["none"] | None, create_pr: bool
) -> list[tuple[str, lambdas.Lam | None]]:
    """Branch and λ of each commit, main last; λ is None for a card alone."""
    if len(lams) > 1 and main is None:
        names = ", ".join(lambdas.name(lam) for lam in lams)
        raise DeraError(f"several λ ({names}); --main says which one is on main, --main none puts the card alone there")
    if create_pr and (len(lams) > 1 or main is not None):
        raise DeraError("--create-pr is for one λ; a pull request has one commit's files")
    if revision is not None and (len(lams) > 1 or main is not None):
        raise DeraError("--revision is for one λ; with --main each λ has a branch lambda-<λ>")
    if revision is not None and (not _BRANCH.fullmatch(revision) or ".." in revision or revision.endswith((".lock", "."))):
        raise DeraError(f"{revision!r} is no name for a branch")
    if main is None:
        return [(revision or "main", lams[0])]
    if main != "none" and main not in lams:
        raise DeraError(f"--main {main:g}: there is no λ={main:g} here, only {', '.join(map(lambdas.name, lams))}")
    return [*((lambdas.folder_name(lam), lam) for lam in lams), ("main", None if main == "none" else main)]


def _target(
    api: HfApi, plan: Plan, branch: str, lam: float | None, recipes: dict[float, tuple[Path, dict[str, Any]]],
    report: Report | None, figures: dict[str, Path | bytes], inherited: dict[str, Any], license: str | None,
    siblings: Sequence[tuple[str, float]],
) -> Target:  # fmt: skip
    repo_id = plan.repo_id
    found = _there(lambda: api.repo_info(repo_id, revision=branch)) if plan.exists else None
    exists, parent = found is not None, found.sha if found else plan.head  # a new branch begins as main
    lying = _lying(api, repo_id, parent)
    files: dict[str, Path | bytes] = {}
    place, recipe = recipes[siblings[0][1] if lam is None else lam]
    if lam is not None:
        files = {name: place / name for name in [*recipe["files"], RECIPE]} | figures
    plot = PLOT if PLOT in files else None
    ours = card.section(recipe, report, repo_id, branch, siblings, alone=lam is None, plot=plot)
    values = card.metadata(recipe, None if lam is None else report, repo_id, inherited)
    old = _downloaded(api, repo_id, parent, CARD) if CARD in lying else None
    replace = ("license", "license_name", "license_link") if license else ()
    _check_licence(old, inherited, license, repo_id)
    text = card.edited(old, values, ours, repo_id.rpartition("/")[2], replace)
    stale = {name for name in lying if name in _REPLACED or _WEIGHTS.fullmatch(name)} - files.keys()
    if lam is None and RECIPE not in lying and stale:
        plan.notes.append(f"main keeps its {len(stale)} files of a model that dera-merge did not write")
        stale = set()
    return Target(branch, lam, files | {CARD: text.encode()}, sorted(stale), parent, exists, text)


def _lying(api: HfApi, repo_id: str, commit: str | None) -> set[str]:
    """Names of the files at the top of a repository."""
    if commit is None:
        return set()
    return {entry.path for entry in api.list_repo_tree(repo_id, revision=commit) if hasattr(entry, "blob_id")}


def _downloaded(api: HfApi, repo_id: str, commit: str | None, name: str) -> str | None:
    """A small text file of a repository; None where there is none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = api.hf_hub_download(repo_id, name, revision=commit)
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # of the local cache: the Hub was not reached
            raise
        return None
    try:
        return Path(file).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DeraError(f"the {name} of {repo_id} is not UTF-8 ({error}); mend it first") from error


def _figures(report: Report) -> dict[str, Path | bytes]:
    """The report as files: its figures without texts, and its plot."""
    from .report import plot_fidelity

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
    from .fidelity import Report

    found = report if isinstance(report, Report) else Report.load(report)
    name = "the report" if isinstance(report, Report) else os.fspath(report)
    settings = found.settings
    for lam, (place, recipe) in recipes.items():
        row = found.at(lam)
        if other := _differs(row, settings, recipe):
            raise DeraError(f"{name} is of other weights than {place}: another {other}; compare these (--approx {place})")
        if lam in (found.gated or {}).get("failed", ()) and not force:
            raise DeraError(f"λ={lam:g} failed the gate of {name}; --force publishes it all the same")
        if row["verdict"] == "not DeRa any more":
            warn(f"λ={lam:g}: {name} says \"{row['verdict']}\", and so will the card")
    return found


def _differs(row: dict[str, Any], settings: dict[str, Any], recipe: dict[str, Any]) -> str | None:
    """In what a report differs from these weights; None where it was measured on them.

    A report with `--approx` has their hash. Any other was measured on the weights that its settings make, which are those
    of a directory that the same settings made.
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


# Licence and language


def _inherited(api: HfApi, parents: Sequence[card.Parent], license: str | None, plan: Plan) -> dict[str, Any]:
    """Licence and languages of the parents. Raises DeraError where licences differ and none was chosen."""
    licences: dict[tuple[Any, ...], str] = {}
    languages: list[str] = []
    for parent in {parent.typed: parent for parent in parents}.values():
        said = _metadata_of(api, parent, plan)
        language = said.get("language") or []
        languages += [str(entry) for entry in (language if isinstance(language, list) else [language])]
        if said.get("license"):
            kept = tuple(str(said[key]) for key in ("license", "license_name", "license_link") if said.get(key))
            licences.setdefault(kept, parent.name)
    values: dict[str, Any] = {}
    if license:
        values["license"] = license
    elif len(licences) > 1:
        named = ", ".join(f"{name} is under {licence[1 if len(licence) > 1 else 0]}" for licence, name in licences.items())
        raise DeraError(f"the parents' licences differ ({named}); --license says under which this is published")
    elif licences:
        values |= dict(zip(("license", "license_name", "license_link"), next(iter(licences)), strict=False))
    else:
        plan.notes.append("no parent's card names a licence, so this one names none; --license does")
    if languages:
        values["language"] = list(dict.fromkeys(languages))
    return values


def _metadata_of(api: HfApi, parent: card.Parent, plan: Plan) -> dict[str, Any]:
    """What a parent's card says of it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if parent.on_hub:
            text = _downloaded(api, parent.name, parent.revision, CARD)
        else:
            file = Path(parent.name).expanduser() / CARD
            text = file.read_bytes().decode("utf-8", errors="replace") if file.is_file() else None
        return card.read_metadata(text) if text else {}
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, DeraError):
        plan.notes.append(f"the card of {parent.name} could not be read, its licence is not known")
        return {}


def _check_licence(old: str | None, inherited: dict[str, Any], license: str | None, repo_id: str) -> None:
    there = card.read_metadata(old).get("license") if old else None
    if there and not license and inherited.get("license") not in (None, there):
        raise DeraError(
            f"the card of {repo_id} says license {there}, the parents' is {inherited['license']}; --license says which it is"
        )


# Doing it


def _push(api: HfApi, plan: Plan, tell: Progress) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id = plan.repo_id
    for target in plan.targets:  # before a repository is made for a card that the Hub refuses
        _patiently(lambda t=target: _check_card(t.card))
    if not plan.exists:
        _patiently(lambda: api.create_repo(repo_id, private=plan.private, exist_ok=False))
        first = _patiently(lambda: api.repo_info(repo_id)).sha
        for target in plan.targets:
            target.parent = first
    steps = len(plan.targets)
    # Weights first, for all branches: what takes long and may break off makes nothing visible.
    adds: list[list[CommitOperationAdd]] = []
    for number, target in enumerate(plan.targets):
        tell(f"uploading {target.revision}", number, steps)
        adds.append([CommitOperationAdd(name, content) for name, content in target.files.items()])
        # What is there already is judged by the branch, or by main, which a new branch begins as.
        onto = target.revision if target.exists else "main"
        _patiently(
            lambda adds=adds[-1], onto=onto: api.preupload_lfs_files(
                repo_id, adds, revision=onto, create_pr=plan.create_pr, free_memory=False
            )
        )  # fmt: skip
    for number, (target, added) in enumerate(zip(plan.targets, adds, strict=True)):
        tell(f"committing {target.revision}", number, steps)
        if not target.exists and target.revision != "main":
            _patiently(lambda t=target: api.create_branch(repo_id, branch=t.revision, revision=t.parent))
        what = f"λ={target.lam:g}" if target.lam is not None else "card"
        commit = _patiently(
            lambda t=target, added=added, what=what: api.create_commit(
                repo_id, [*added, *(CommitOperationDelete(name) for name in t.delete)], revision=t.revision,
                commit_message=f"dera-merge: {what}", parent_commit=t.parent, create_pr=plan.create_pr,
            )
        )  # fmt: skip
        plan.commits[target.revision] = commit.pr_url or commit.commit_url
    tell("done", steps, steps)


def _check_card(text: str) -> None:
    """Raises DeraError where the Hub would not take a card."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text).validate()
    except ValueError as error:
        said = "; ".join(re.findall(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error))) or str(error)
        raise DeraError(f"the Hub does not accept the card: {' '.join(said.split())}") from error


def _patiently(call: Callable[[], T]) -> T:
    """Call the Hub; where it says that there were too many requests, wait visibly as long as it asks, but not for ever."""
    from huggingface_hub.errors import HfHubHTTPError

    waited = 0
    while True:
        try:
            return call()
        except (HfHubHTTPError, RuntimeError) as error:  # an upload's failure is a RuntimeError
            response = getattr(_cause(error), "response", None)
            if response is None or response.status_code != 429:
                raise
            wait = _asked_to_wait(response.headers)
            if waited + wait > PATIENCE:
                raise
            warn(f"the Hub limits the rate of requests; waiting {wait} s, as it asks")
            time.sleep(wait)
            waited += wait


def _asked_to_wait(headers: Any) -> int:
    """Seconds, from `Retry-After` or the Hub's `RateLimit: …;t=<seconds>`; 30 where neither says."""
    asked = re.fullmatch(r"\d+", headers.get("Retry-After", "")) or re.search(r"(?<=t=)\d+", headers.get("RateLimit", ""))
    return max(1, int(asked[0])) if asked else 30


# Talking to the Hub


def _full_id(api: HfApi, repo_id: str) -> str:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _there(ask: Callable[[], T]) -> T | None:
    """An answer of the Hub; None where it says that there is no such repository or branch."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return ask()
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if error.response.status_code == 401:  # to a stranger a missing repository and a private one look alike
            raise
        return None


def _cause(error: BaseException) -> BaseException:
    """What the Hub answered: an upload that failed carries it behind an error of its own."""
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _said(repo_id: str) -> Iterator[None]:
    """Make one line of whatever the Hub or the way there answers."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise DeraError(f"{repo_id!r} is no id for a repository; give user/name") from error
    except LocalTokenNotFoundError as error:
        raise DeraError(f"{NO_TOKEN}, or set HF_TOKEN") from error
    except (*HfHubHTTPError.__bases__, RuntimeError, ValueError) as error:  # the HTTP library's own too, whichever it is
        raise DeraError(_explained(_cause(error), repo_id)) from error


def _explained(error: BaseException, repo_id: str) -> str:
    """One line on what the Hub answered, and what to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
    response = getattr(error, "response", None)
    if response is None:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"{HfApi().endpoint} broke off or cannot be reached: {reason}; what is uploaded stays, run it again"
    status = response.status_code
    said = " ".join((getattr(error, "server_message", None) or "").split())
    said = f" ({said})" if said else ""
    ways = {
        400: f"the Hub does not accept it{said}",
        401: f"{NO_TOKEN}, or set HF_TOKEN{said}",
        403: f"this token may not write to {repo_id}{said}; it needs write permission there",
        404: f"the Hub finds no {repo_id}, or this token may not see it{said}",
        409: f"something else is being written to {repo_id}{said}; run it again",
        412: f"{repo_id} was changed by someone else meanwhile{said}; look at it, then run it again",
        413: f"the Hub finds this too large{said}",
        429: f"the Hub limits the rate of requests{said}; try again later, what is uploaded stays",
    }
    broken = f"the Hub has trouble of its own (HTTP {status}){said}; try again later, what is uploaded stays"
    return ways.get(status, broken if status >= 500 else f"the Hub answers HTTP {status}{said}")
