#!/usr/bin/env python3
"""From a pair to a model repository with measured branches, in four calls.

    python scripts/export_to_hub.py REF ALIGNED REPO_ID -o DIR [--lambdas 0.25,0.5,0.75] [--main 0.5] [--send]

Merges, measures what was merged, and shows the plan; --send publishes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dera_merge import ModelPair, compare, push_to_hub
from dera_merge.lambdas import parse_lambdas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("repo_id")
    parser.add_argument("-o", "--out", required=True, type=Path)
    parser.add_argument("--lambdas", default="0.25,0.5,0.75")
    parser.add_argument("--main", type=float, default=0.5, help="the λ on main (0.5)")
    parser.add_argument("--license")
    parser.add_argument("--send", action="store_true")
    args = parser.parse_args()

    lams = parse_lambdas([args.lambdas])
    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    pair.merge(args.out / "merged", lams, resume=True)
    approx = args.out / "merged"
    compare(pair, lams, approx=approx, max_new_tokens=40).save(args.out / "report")
    main = args.main if len(lams) > 1 else None
    plan = push_to_hub(
        approx, args.repo_id, main=main, report=args.out / "report", license=args.license, dry_run=not args.send
    )
    for target in plan.targets:
        print(target.revision, plan.commits.get(target.revision, "(not sent)"), *sorted(target.files), sep="\n  ")


if __name__ == "__main__":
    main()
