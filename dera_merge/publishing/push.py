"""Publish merged directories on the Hub: one repository, a branch for each λ, the chosen one on main.

`plan.planned` looks at everything and writes nothing: directories whole and unchanged, a report that belongs to them,
licences that agree, what lies in the repository. `_push` then uploads all weights, makes one commit for each branch,
and that of main last. A commit is the Hub's one atomic step, and each is bound to the commit that was planned on; so
whatever breaks, main is what it was, and a second run uploads what is missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..progress import Progress, unheard
from .hub import check_card, hub_errors, patiently
from .plan import Plan, planned

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from ..measuring.report import Report


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
    tell = progress or unheard
    with hub_errors(repo_id):
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        plan = planned(
            api, Path(folder), repo_id, revision=revision, main=main, report=report, license=license, private=private,
            create_pr=create_pr, force=force, dry_run=dry_run, tell=tell,
        )  # fmt: skip
        if not dry_run:
            _push(api, plan, tell)
    return plan


def _push(api: HfApi, plan: Plan, tell: Progress) -> None:
    """Do what was planned; `plan.commits` gets the commits."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id = plan.repo_id
    for target in plan.targets:  # before a repository is made for a card that the Hub refuses
        patiently(lambda t=target: check_card(t.card))
    if not plan.exists:
        patiently(lambda: api.create_repo(repo_id, private=plan.private, exist_ok=False))
        first = patiently(lambda: api.repo_info(repo_id)).sha
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
        patiently(
            lambda adds=adds[-1], onto=onto: api.preupload_lfs_files(
                repo_id, adds, revision=onto, create_pr=plan.create_pr, free_memory=False
            )
        )  # fmt: skip
    for number, (target, added) in enumerate(zip(plan.targets, adds, strict=True)):
        tell(f"committing {target.revision}", number, steps)
        if not target.exists and target.revision != "main":
            patiently(lambda t=target: api.create_branch(repo_id, branch=t.revision, revision=t.parent))
        label = f"λ={target.lam:g}" if target.lam is not None else "card"
        commit = patiently(
            lambda t=target, added=added, label=label: api.create_commit(
                repo_id, [*added, *(CommitOperationDelete(name) for name in t.delete)], revision=t.revision,
                commit_message=f"dera-merge: {label}", parent_commit=t.parent, create_pr=plan.create_pr,
            )
        )  # fmt: skip
        plan.commits[target.revision] = commit.pr_url or commit.commit_url
    tell("done", steps, steps)
