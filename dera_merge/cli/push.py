"""`dera-merge push`: publish on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import lambdas
from .help import how, what, where
from .options import AsJson, parse_one
from .show import err, note, one_line, print_json, say

EXAMPLES = (
    "dera-merge push merged me/my-model --main 0.5 --dry-run",
    "dera-merge push merged/lambda-0.5 me/my-model --report report --dry-run",
)


def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What merge wrote: one λ, or the parent of lambda-*.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Model repository, user/name; made if it is not there.")
    ],
    revision: Annotated[str | None, what(help="Branch for the one λ; default: main.")] = None,
    main: Annotated[str | None, what(help="With several λ: the one on main; none: a card alone.")] = None,
    report: Annotated[Path | None, what(help="Of compare on these weights, for the card.")] = None,
    license: Annotated[str | None, what(help="Where the parents' differ, or say nothing.")] = None,
    private: Annotated[bool, where("--private", help="Make a private repository.")] = False,
    create_pr: Annotated[bool, where("--create-pr", help="Open a pull request instead of committing.")] = False,
    force: Annotated[bool, how("--force", help="Publish what failed the report's gate.")] = False,
    dry_run: Annotated[bool, where("--dry-run", help="Show files, commits and cards; send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Publish what merge wrote on the Hub. Each λ is a branch, with a card that says what it is."""
    from ..publishing.push import push_to_hub

    chosen: Any = main if main in (None, "none") else parse_one([main], lambdas.width(main))
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not err.is_terminal:
        disable_progress_bars()

    def tell(what: str, done: int, total: int) -> None:
        if err.is_terminal:  # huggingface_hub draws the bars of uploads itself
            note(f"{what} ({done}/{total})")

    plan = push_to_hub(
        folder, repo_id, revision=revision, main=chosen, report=report, license=license, private=private or None,
        create_pr=create_pr, force=force, dry_run=dry_run, progress=tell,
    )  # fmt: skip
    if as_json:
        return print_json(plan.to_dict())
    for remark in plan.notes:
        note(f"note: {one_line(remark)}")
    if dry_run:
        where = plan.repo_id if plan.exists else f"{plan.repo_id} (new{', private' if private else ''})"
        say(f"Nothing was sent. {len(plan.targets)} commits to {where}, main last:")
    for target in plan.targets:
        sizes = sum(map(target.size, target.files))
        done = plan.commits.get(target.revision, "new branch" if not target.exists else "")
        line = f"{target.revision}  {len(target.files)} files, {sizes / 1e6:.1f} MB  {done}"
        say(line)
        if dry_run:
            for name in target.files:
                say(f"  + {name}  {target.size(name):,} bytes")
            for name in target.delete:
                say(f"  - {name}")
    if dry_run:
        card = plan.targets[-1]
        say(f"\nThe card of {card.revision}:\n\n{card.card}")
