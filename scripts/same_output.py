"""Does another checkout give the same? Every command on the demo pair, by two checkouts, compared byte for byte.

    git worktree add ../before HEAD~1
    python scripts/same_output.py ../before .            # five minutes each on one core
    python scripts/same_output.py ../before . --only compare,sweep

For changes that are to change nothing: what is printed, every file that is written (weights by their hash), and exit
statuses. Names of the run's own directory and progress bars are left out. Exit status 1 if anything differs; both runs
are kept for a look.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REF, LORA, DENSE = "demo/reference", "demo/aligned-lora", "demo/aligned-dense"  # in a copy, so that names are the same
TWO = [REF, LORA, "--aligned", DENSE]
SHORT = ["--max-new-tokens", "12"]
FILM = ["--prompt", "The film", *SHORT]
ASKED = ["--prompts", "prompts.jsonl", *SHORT]
FEW = ["--with", "all", "--extra-prompts", "2"]
PRAISE = ["--reward", "dera_merge.demo:reward"]
LENGTH = ["--reward", "length"]
PATH = ["--path", "path.safetensors"]
HELP = ("merge", "export-exact", "generate", "compare", "calibrate", "inspect", "sweep", "push", "demo")
# Each is run in one directory, in this order, so that later ones may use what earlier ones wrote.
COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", REF, LORA, "-l", "0:1:0.5", "-o", "merged"],
    "merge json": ["merge", REF, DENSE, "-l", "0.3,1.7", "-o", "dense", "--dtype", "float16", "--seed", "3", "--json"],
    "merge sharded": ["merge", REF, LORA, "-l", "-0.5", "-o", "shards", "--max-shard-size", "600KB", "--rounding",
                      "nearest"],
    "merge adapter": ["merge", REF, LORA, "-l", "0.5,2", "--format", "adapter", "-o", "adapters"],
    "merge cut": ["merge", REF, LORA, "-l", "0.5", "--format", "adapter", "--rank", "2", "-o", "cut", "--json"],
    "merge extract": ["merge", REF, DENSE, "-l", "0.5", "--extract-rank", "4", "-o", "extracted"],
    "merge several": ["merge", *TWO, "-l", "0.5+0.25,0+1", "-o", "several"],
    "merge again": ["merge", REF, LORA, "-l", "0.5", "-o", "merged/lambda-0.5"],
    "merge of a merge": ["merge", "merged/lambda-0.5", DENSE, "-l", "0.5", "-o", "twice", "--json"],
    "export": ["export-exact", REF, LORA, "-l", "0.5", "-o", "exact"],
    "export dense": ["export-exact", REF, DENSE, "-o", "exact-dense", "--copy", "--json"],
    "export whole": ["export-exact", REF, LORA, "-o", "exact-whole", "--merge-adapter", "--json"],
    "generate": ["generate", REF, LORA, "-l", "0.5", *FILM, "--json"],
    "generate merged": ["generate", REF, LORA, "-l", "0.5", *FILM, "--mode", "merged"],
    "generate drafted": ["generate", REF, DENSE, "-l", "2", *FILM, "--mode", "speculative", "--chat", "--temperature",
                         "1"],
    "generate several": ["generate", *TWO, "-l", "0.5+0.5", *FILM],
    "generate 4 bit": ["generate", REF, LORA, "-l", "0.5", *FILM, "--load-in", "4bit", "--json"],
    "generate masked": ["generate", REF, LORA, "-l", "3", *FILM, "--plausibility", "0.1", "--json"],
    "calibrate": ["calibrate", REF, LORA, "-l", "0,2", "-o", "path.safetensors", "--texts", "16", "--passes", "1",
                  "--rank", "2", *SHORT, "--json"],
    "merge path": ["merge", REF, LORA, "-l", "0.5,1.5", "-o", "bent", *PATH],
    "merge path adapter": ["merge", REF, LORA, "-l", "0.5", "--format", "adapter", "-o", "bent-adapter", *PATH],
    "compare": ["compare", REF, LORA, "-l", "0:2:0.5", "-o", "report", *FEW, *ASKED, *PRAISE],
    "compare dense": ["compare", REF, DENSE, "-l", "0.5", "-o", "report-dense", *ASKED, "--json"],
    "compare given": ["compare", REF, LORA, "-l", "0.5,1.5", "-o", "report-given", "--with", "ladder", "--prompts",
                      "given.jsonl", "--json"],
    "compare approx": ["compare", REF, LORA, "-l", "0,0.5", "-o", "report-approx", "--approx", "merged", *ASKED,
                       "--max-kl", "1e-9", "--json"],
    "compare path": ["compare", REF, LORA, "-l", "0.5,1.5", "-o", "report-path", *PATH, *ASKED],
    "compare several": ["compare", *TWO, "-l", "0.5+0.5,0+0", "-o", "report-several", *FEW, *ASKED, "--json"],
    "compare texts": ["compare", REF, LORA, "-l", "1.5", "-o", "report-texts", "--texts", "merged", "--samples", "2",
                      *ASKED],
    "merge report": ["merge", REF, LORA, "-l", "0.5,2", "-o", "judged", "--report", "report", "--json"],
    "inspect": ["inspect", REF, LORA],
    "inspect one": ["inspect", "merged/lambda-0.5", "--json"],
    "inspect merged": ["inspect", REF, LORA, "--merged", "merged/lambda-1", "--json"],
    "inspect dense": ["inspect", REF, DENSE, "--dtype", "float16", "--json"],
    "sweep": ["sweep", REF, LORA, *ASKED, *PRAISE, "-o", "sweep"],
    "sweep json": ["sweep", REF, DENSE, *ASKED, *LENGTH, "--reward", "lexicon", "--weights", "0.5,1", "-l", "0,1",
                   "--no-merged", "-o", "sweep-json", "--beta", "0.1", "--json"],
    "sweep direct": ["sweep", REF, LORA, *ASKED, *LENGTH, "--no-reweight", "-l", "0,1,2", "-o", "sweep-direct",
                     "--mode", "speculative", "--json"],
    "sweep merged": ["sweep", REF, LORA, *ASKED, *LENGTH, "--mode", "merged", "-l", "0,1", "-o", "sweep-merged"],
    "sweep several": ["sweep", *TWO, *ASKED, *LENGTH, "-l", "0:1:0.5+0:1:0.5", "-o", "sweep-several", "--budget", "30",
                      "--json"],
    "sweep scored": ["sweep", REF, LORA, *ASKED, *LENGTH, "--from-scored", "sweep/texts.jsonl", "-o", "sweep-scored"],
    "push": ["push", "merged", "me/model", "--main", "0.5", "--dry-run", "--license", "mit"],
    "push report": ["push", "merged/lambda-0.5", "me/model", "--report", "report-approx", "--dry-run", "--force",
                    "--json"],
    "demo": ["demo", "-o", "demo-output", "--json"],
    **{f"{name} --help": [name, "--help"] for name in HELP},
    "--help": ["--help"],
    "no folder": ["merge", REF, "demo/nowhere", "-l", "1", "-o", "none"],
    "no number": ["merge", REF, LORA, "-l", "one", "-o", "none"],
    "two λ": ["generate", REF, LORA, "-l", "0,1", *FILM],
    "no rank": ["merge", REF, LORA, "-l", "1", "-o", "none", "--rank", "3"],
    "shard and adapter": ["merge", REF, LORA, "-l", "1", "-o", "none", "--format", "adapter", "--shard", "1/2"],
    "over an input": ["merge", REF, LORA, "-l", "1", "-o", REF],
    "another base": ["merge", LORA, DENSE, "-l", "1", "-o", "none", "--format", "adapter"],
    "another path": ["merge", REF, DENSE, "-l", "0.5", "-o", "none", *PATH],
    "no extra": ["compare", REF, LORA, "-l", "0.5", "-o", "none", "--with", "everything"],
    "no device": ["compare", REF, LORA, "-l", "0.5", "-o", "none", "--device", "tpu"],
    "no reward": ["sweep", REF, LORA, *ASKED, "--reward", "nothing", "-o", "none"],
    "no prompts": ["sweep", REF, LORA, "--prompts", "nowhere.jsonl", *LENGTH, "-o", "none"],
    "several with a path": ["merge", *TWO, "-l", "0.5+0.5", "-o", "none", *PATH],
    "several predicted": ["compare", *TWO, "-l", "0.5+0.5", "-o", "none", "--with", "predict"],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT")
    parser.add_argument("--only", help="commands with one of these words in their name, with commas")
    parser.add_argument("--keep", type=Path, help="where both runs lie, and a run that is there is not done again")
    chosen = parser.parse_args()
    home = chosen.keep or Path(tempfile.mkdtemp(prefix="same-output-"))
    names = [name for name in COMMANDS if not chosen.only or any(word in name for word in chosen.only.split(","))]
    sides = zip(chosen.checkouts, ("before", "after"), strict=True)
    before, after = (run(checkout.resolve(), home / side, names) for checkout, side in sides)
    different = [key for key in before | after if before.get(key) != after.get(key)]
    for key in different:
        print(f"--- {key}")
        lines = [str(side.get(key, "(not there)")).splitlines() for side in (before, after)]
        print("\n".join(list(difflib.unified_diff(*lines, "before", "after", lineterm="", n=1))[:30]))
    print(f"{len(different)} of {len(before | after)} outputs differ; both runs lie in {home}")
    return int(bool(different))


def run(checkout: Path, place: Path, names: list[str]) -> dict[str, str]:
    """Every command with the package of a checkout: what was printed, and what lies there afterwards."""
    record = place.with_suffix(".json")
    if record.is_file():
        return json.loads(record.read_text())
    place.mkdir(parents=True)
    shutil.copytree(
        checkout / "dera_merge" / "demo", place / "demo", ignore=shutil.ignore_patterns("*.py", "__pycache__")
    )
    entries = [json.loads(line) for line in (place / "demo" / "prompts.jsonl").read_text().splitlines()[:6]]
    (place / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    given = [entry | {"completion": " It was a very good film, I liked it."} for entry in entries]
    (place / "given.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in given))
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "COLUMNS": "100", "SOURCE_DATE_EPOCH": "0"}  # fmt: skip
    found: dict[str, str] = {}
    for name in names:
        command = [sys.executable, "-m", "dera_merge", *COMMANDS[name]]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1200)
        said = f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        found[f"$ {name}"] = _plain(said, checkout, place)
        print(f"{place.name}: {name}: {done.returncode}", file=sys.stderr, flush=True)
    for file in sorted(place.rglob("*")):
        if file.is_file():
            found[str(file.relative_to(place))] = _content(file, checkout, place)
    record.write_text(json.dumps(found))
    return found


def _content(file: Path, checkout: Path, place: Path) -> str:
    """A text file's text, or the hash of another's bytes."""
    raw = file.read_bytes()
    if file.suffix == ".safetensors":  # the library writes metadata in an order of chance
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        raw = json.dumps(header).encode() + raw[8 + length :]
        return hashlib.sha256(raw).hexdigest()
    try:
        return _plain(raw.decode(), checkout, place)
    except UnicodeDecodeError:
        return hashlib.sha256(raw).hexdigest()


def _plain(text: str, checkout: Path, place: Path) -> str:
    text = text.replace(str(place), "PLACE").replace(str(checkout), "CHECKOUT").replace(sys.executable, "python")
    text = re.sub(r"\.exact[\w.-]*\.partial", "TEMPORARY", text)
    return re.sub(r"(?m)^.*it/s\].*$\n?", "", text)


if __name__ == "__main__":
    sys.exit(main())
