"""Every family of models that the installed transformers can build: is dera-merge right on it, or does it say why not?

    make test-models                                     # all families, and docs/models.md
    python scripts/check_models.py --families llama,qwen3
    python scripts/check_models.py --seed 7 --hidden 48 --layers 3 --resume

Of each family a tiny random pair is made (`tiny_models.py`), saved as transformers saves it, and goes through the cells
of `family_checks.py`. Each family has a process of its own, so that one that dies or hangs takes nothing along. Results
go to a file of JSON lines, from which `--resume` goes on. Exit status 1 if a cell is wrong or a crash.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from family_checks import ADAPTERS, CELLS, NAMES, NO_EXPERTS, check
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from tiny_models import Sizes, families

ROOT = Path(__file__).resolve().parents[1]


def work(name: str, sizes: Sizes, seed: int, file: Path) -> None:
    """A child process: results to `file` as they come, everything else that is printed beside it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with file.open("a") as out, file.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        warnings.simplefilter("ignore")
        check(name, sizes, seed, lambda line: print(json.dumps(line), file=out, flush=True))


def collected(name: str, seconds: float, lines: list[dict[str, Any]], end: str) -> dict[str, Any]:
    """A family's record; cells that its process did not come to are crashes, of the first of them."""
    record: dict[str, Any] = {"family": name, "seconds": round(seconds, 1), "cells": {}}
    for line in lines:
        if "cell" in line:
            record["cells"][line.pop("cell")] = line
        else:
            record |= line
    if end:
        if "class" not in record:
            return record | {"unbuilt": end}
        for cell in NAMES:
            record["cells"].setdefault(cell, {"state": "crash", "why": end})
    return record


def run(
    names: list[str], sizes: Sizes, seed: int, workers: int, patience: float, say: Callable[[dict[str, Any]], None]
) -> None:
    """Check the families, each in a process forked of this one, which has imported everything once."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(names)), {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    name = waiting.pop()
                    file = Path(scratch, f"{name.replace(':', '-')}.jsonl")
                    child = context.Process(target=work, args=(name, sizes, seed, file))
                    child.start()
                    running[name] = (child, file, time.monotonic())
                time.sleep(0.05)
                for name, (child, file, started) in list(running.items()):
                    seconds = time.monotonic() - started
                    if child.is_alive() and seconds < patience:
                        continue
                    end = f"no end within {patience:.0f} s" if child.is_alive() else ""
                    child.kill()
                    child.join()
                    if code := child.exitcode if not end else 0:
                        end = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
                    say(collected(name, seconds, lines, end))
                    del running[name]
        finally:  # of an interruption
            for child, *_ in running.values():
                child.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="which, with commas; default: all, and the page is written")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--workers", type=int, default=2, help="processes, each of one thread")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one family")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "build" / "models.jsonl", help="results, JSON lines")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has of the same settings")
    parser.add_argument("--page", type=Path, help="where to write the table; default of a run over all: docs/models.md")
    chosen = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(chosen, field.name) for field in fields(Sizes)})
    names = chosen.families.split(",") if chosen.families else list(families())
    if unknown := set(names) - families().keys():
        parser.error(f"transformers has no family {sorted(unknown)[0]!r}")
    settings = {"seed": chosen.seed, "sizes": asdict(sizes), "versions": versions()}
    records: dict[str, dict[str, Any]] = {}
    if chosen.resume and chosen.out.exists():
        stored = [json.loads(line) for line in chosen.out.read_text().splitlines() if line.endswith("}")]
        records = {record["family"]: record for record in stored if record["settings"] == settings}
    todo = [name for name in names if name not in records]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    # No thread of its own: this process forks.
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), auto_refresh=False)
    with chosen.out.open("a" if chosen.resume else "w") as out, bar:
        task = bar.add_task("families", total=len(todo))

        def say(record: dict[str, Any]) -> None:
            records[record["family"]] = record | {"settings": settings}
            print(json.dumps(records[record["family"]]), file=out, flush=True)
            bar.print(f"{record['family']}: {summary(record)}, {record['seconds']:.0f} s", highlight=False)
            bar.update(task, advance=1)
            bar.refresh()

        run(todo, sizes, chosen.seed, chosen.workers, chosen.timeout, say)
    found = [records[name] for name in names if name in records]
    page = chosen.page or (None if chosen.families else ROOT / "docs" / "models.md")
    if page:
        page.write_text(written(found, settings))
    states = Counter(cell["state"] for record in found for cell in record["cells"].values())
    print(", ".join(f"{count} {state}" for state, count in states.most_common()))
    return int(states["wrong"] + states["crash"] > 0)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "peft": peft.__version__,
    }  # fmt: skip


def summary(record: dict[str, Any]) -> str:
    if "unbuilt" in record:
        return f"not built: {record['unbuilt']}"
    states = Counter(cell["state"] for cell in record["cells"].values())
    bad = [f"{name} {cell['state']}" for name, cell in record["cells"].items() if cell["state"] in ("wrong", "crash")]
    return ", ".join([f"{count} {state}" for state, count in states.most_common()] + bad[:3])


# The page

MARKS = {"ok": "●", "refused": "refused", "wrong": "**wrong**", "crash": "**crash**", "n/a": "–"}
GRAVITY = ("crash", "wrong", "refused", "ok", "n/a")  # what a column of several cells is: the worst of them
COLUMNS = {
    **{what: [f"dense {what}"] for what in ("merge", "live", "exact", "generate", "compare")},
    **{form: [f"{form} {what}" for what in CELLS[form] if what != "rows"] for form in ADAPTERS},
    "rows": ["attention rows"],
    "layouts": [f"layouts {what}" for what in CELLS["layouts"]],
}
COLUMNS["generate"] = ["dense generate", "dense own"]


def written(records: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    built = [record for record in records if "unbuilt" not in record]
    notes: dict[str, int] = {}
    table = [["family", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for record in built:
        row = [f"{record['family'].partition(':')[0]} ({record['class']})"]
        for cells in COLUMNS.values():
            found = [record["cells"][cell] for cell in cells if cell in record["cells"]]
            if not found:
                row.append("")
                continue
            worst = min(found, key=lambda cell: GRAVITY.index(cell["state"]))
            note = ""
            if worst["state"] in ("refused", "wrong", "crash") or (worst["why"] and worst["why"] != NO_EXPERTS):
                note = f"[^{notes.setdefault(general(worst['why']), len(notes) + 1)}]"
            row.append(MARKS[worst["state"]] + note)
        table.append(row)
    states = ("ok", "refused", "wrong", "crash", "n/a")
    totals = [["", *states], ["---"] * (1 + len(states))]
    for name in NAMES:
        count = Counter(record["cells"][name]["state"] for record in built if name in record["cells"])
        totals.append([name, *(str(count[state] or "") for state in states)])
    cells = Counter(cell["state"] for record in built for cell in record["cells"].values())
    right, apply = cells["ok"], sum(cells.values()) - cells["n/a"]
    of = ", ".join(f"{library} {version}" for library, version in settings["versions"].items())
    sizes = ", ".join(f"{name} {value}" for name, value in settings["sizes"].items())
    unbuilt = [f"- {record['family']}: {record['unbuilt']}" for record in records if "unbuilt" in record]
    lines = [
        "# Families of models",
        "",
        f"`make test-models`, {datetime.date.today()}: {of}; seed {settings['seed']}, {sizes}; {len(records)} of the",
        f"{len(families())} kinds of model that transformers lists were tried.",
        "",
        f"**{right} of {apply} cells right**; {', '.join(f'{cells[state]} {state}' for state in states[1:])}",
        "",
        f"{len(built)} families that transformers could build, each as a tiny random pair in float32. ●",
        "is right, by an oracle that shares no code with dera-merge: state dicts interpolated in memory, loaded into",
        "the plain class, PEFT's forward with its adapter unmerged, a plain loop over mixed logits. *refused* is one",
        "line that says why, before anything is written. – is where there is nothing to do, or, with a note, where",
        "transformers or PEFT do not agree with themselves; an empty field was not tried.",
        "",
        "An adapter's column is merge, live model, exact forward and padded generation of it together: LoRA on the",
        "layers of attention, on all linear layers, on experts by `target_parameters`, and DoRA. *rows* is `dial`: a λ",
        "for each row of a batch. *generate* is padded greedy decoding, and at λ = 0 and 1 the model's own. *layouts*",
        "is files as they are elsewhere: tensors for multi-token prediction in REF alone, experts fused on one side",
        "and one by one on the other (or other prefixes), adapters with transformers 4's names of modules.",
        "",
        *lines_of(totals),
        "",
        *lines_of(table),
        "",
        *(f"[^{number}]: {note}" for note, number in notes.items()),
    ]
    if unbuilt:
        lines += ["", "Not tried, because no tiny model of them takes text alone here:", "", *unbuilt]
    return "\n".join(lines) + "\n"


def general(why: str) -> str:
    """A reason without what only this run has: its folders."""
    return re.sub(r"\S*/tmp\w+/", "", why)


def lines_of(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
