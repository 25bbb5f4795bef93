"""Does it work with what people install? The core of the tests with the oldest, the pinned and the newest releases.

    make test-versions                                    # all four environments, and a table
    python scripts/try_versions.py --only oldest         # one of them
    python scripts/try_versions.py --torch 2.14.1        # another torch in all of them

`oldest` has each direct dependency at the floor that pyproject.toml states, `pinned` what constraints.txt says,
`newest` the newest release of everything. torch is left out of all three: it is the one named, so that a CPU build can
be taken. `wheel` is what a user gets: the wheel alone in a fresh environment, no extras and no constraints but torch,
where the command line, the demo and the README's Python run in an empty directory. The table at the end is what
docs/versions.md holds. Exit status 1 if anything failed. Environments are kept in .venv-versions, and made anew when
what is in them changes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-versions"
ENVIRONMENTS = ("oldest", "pinned", "newest")
EXTRAS = ("dev", "eval", "train", "smollm2")  # those that install beside each other; vllm wants versions of its own
IN_TABLE = (
    "python", "torch", "transformers", "peft", "safetensors", "huggingface-hub", "numpy", "typer", "rich", "jinja2",
    "pyyaml", "accelerate", "numba", "bitsandbytes", "matplotlib", "optuna", "lm-eval", "trl", "gguf",
)  # fmt: skip
CUDA = re.compile(r"(nvidia|cuda|triton)", re.IGNORECASE)  # what the CPU build of torch does not use
PATIENCE = 1800  # seconds for one environment's tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*ENVIRONMENTS, "wheel")), help="which, with commas")
    parser.add_argument("--torch", default=_pins()["torch"], help="release of torch in all environments")
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    if unknown := set(names) - {*ENVIRONMENTS, "wheel"}:
        parser.error(f"there is no environment {unknown.pop()!r}; choose from {', '.join((*ENVIRONMENTS, 'wheel'))}")
    HOME.mkdir(exist_ok=True)
    tools = _tools()
    wheel = _built(tools)
    columns: dict[str, dict[str, str]] = {}
    for name in names:
        bin = _installed(name, tools, wheel, chosen.torch)
        started = time.monotonic()
        outcome = _used(bin) if name == "wheel" else _tested(bin)
        columns[name] = {**_versions(bin), "result": outcome, "seconds": f"{time.monotonic() - started:.0f}"}
        print(f"{name}: {outcome}", flush=True)
    table = _table(columns)
    (HOME / "table.md").write_text(table)
    print(f"\n{table}")
    return int(any(not column["result"].startswith("passed") for column in columns.values()))


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def _tools() -> Path:
    """uv, which resolves, and build, which makes the wheel; in an environment of their own."""
    bin = HOME / "tools" / "bin"
    if not (bin / "uv").exists():
        _run(sys.executable, "-m", "venv", HOME / "tools")
        _run(bin / "pip", "install", "--quiet", "--disable-pip-version-check", "uv", "build")
    return bin


def _built(tools: Path) -> Path:
    """The wheel of this checkout, made by way of its sdist; holds the package and nothing else."""
    for old in (HOME / "dist").glob("*"):
        old.unlink()
    _run(tools / "python", "-m", "build", "--outdir", HOME / "dist", ROOT, quiet=True)
    (wheel,) = (HOME / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    if strange := [name for name in names if not re.match(r"dera_merge(/|-[\d.]+\.dist-info/)", name)]:
        raise SystemExit(f"{wheel.name} holds {strange[0]}, which is not of the package")
    needed = (
        "demo/reference/model.safetensors", "demo/prompts.jsonl", "pages/templates/", "py.typed", "texts/prompts.jsonl",
    )  # fmt: skip
    if missing := [part for part in needed if not any(part in name for name in names)]:
        raise SystemExit(f"{wheel.name} lacks {missing[0]}")
    return wheel


def _installed(name: str, tools: Path, wheel: Path, torch: str) -> Path:
    """An environment with what was resolved for it, and the wheel; returns its folder of programs."""
    constraints = HOME / f"{name}-constraints.txt"
    pins = {**_pins(), "torch": torch} if name == "pinned" else {"torch": torch}
    constraints.write_text("".join(f"{library}=={pin}\n" for library, pin in pins.items()))
    extras = [word for extra in EXTRAS if name != "wheel" for word in ("--extra", extra)]
    how = "lowest-direct" if name == "oldest" else "highest"
    resolved = HOME / f"{name}.txt"
    _run(tools / "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--resolution", how, "--python",
         sys.executable, "--constraints", constraints, *extras, "--output-file", resolved, "--upgrade",
         ROOT / "pyproject.toml", quiet=True)  # fmt: skip
    lines = [line for line in resolved.read_text().splitlines() if not CUDA.match(line)]
    installed = "\n".join([f"# Python {platform.python_version()}", *lines])
    bin, mark = HOME / name / "bin", HOME / name / "installed.txt"
    uv = (tools / "uv", "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", "--python", bin / "python")
    if not mark.exists() or mark.read_text() != installed:
        _run(sys.executable, "-m", "venv", "--clear", HOME / name)
        # With what its build needs: a CPU build where pip finds one, else the index's.
        _run(bin / "pip", "install", "--quiet", "--disable-pip-version-check", f"torch=={torch}", quiet=True)
        rest = HOME / f"{name}-rest.txt"
        rest.write_text("\n".join(line for line in lines if not line.startswith("torch==")))
        _run(*uv, "--requirement", rest)
        mark.write_text(installed)
    _run(*uv, "--reinstall", wheel)
    return bin


def _tested(bin: Path) -> str:
    """The core of the suite against the installed wheel: from the tests' folder, where no checkout is in the way."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = HOME / f"{bin.parent.name}.log"
    command = [bin / "pytest", "--override-ini=addopts=", "-q", "--durations=20", "-m", "core", "-n", "logical",
               "--maxprocesses", "4", "--dist", "worksteal", "-p", "no:cacheprovider", ROOT / "tests"]  # fmt: skip
    with log.open("w") as out:
        try:
            done = subprocess.run(list(map(str, command)), cwd=ROOT / "tests", env=environment, stdout=out, stderr=out,
                                  timeout=PATIENCE)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no end within {PATIENCE} s, see {log.relative_to(ROOT)}"
    (*_, last) = ["", *re.findall(r"^.*\d+ (?:passed|failed|errors?)\b.* in [\d.]+s.*$", log.read_text(), re.MULTILINE)]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last)
    if done.returncode == 0:
        return "passed: " + ", ".join(counts)
    return f"FAILED ({', '.join(counts) or 'no test ran'}), see {log.relative_to(ROOT)}"


def _used(bin: Path) -> str:
    """What a user does first, in an empty directory."""
    log, place = HOME / "wheel.log", HOME / "empty"
    subprocess.run(["rm", "-rf", place], check=True)
    place.mkdir()
    script = place / "readme.py"
    script.write_text(re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1])
    commands = {
        "--help": [bin / "dera-merge", "--help"],
        "import": [bin / "python", "-c", "import dera_merge"],
        "demo": [bin / "dera-merge", "demo"],
        "the README's Python": [bin / "python", script],
    }
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        for what, command in commands.items():
            done = subprocess.run(list(map(str, command)), cwd=place, env=offline, stdout=out, stderr=out,
                                  timeout=PATIENCE)  # fmt: skip
            if done.returncode:
                return f"FAILED: {what}, see {log.relative_to(ROOT)}"
    return "passed: " + ", ".join(commands)


def _versions(bin: Path) -> dict[str, str]:
    listed = subprocess.run([bin / "pip", "list", "--format", "freeze", "--disable-pip-version-check"], check=True,
                            capture_output=True, text=True).stdout  # fmt: skip
    found = {line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2] for line in listed.splitlines()}
    return {"python": platform.python_version(), **{name: found[name] for name in IN_TABLE if name in found}}


def _table(columns: dict[str, dict[str, str]]) -> str:
    """Markdown: a row a library, a column an environment."""
    rows = [["", *columns], ["---"] * (1 + len(columns))]
    for name in (*IN_TABLE, "result", "seconds"):
        rows.append([name, *(column.get(name, "–") for column in columns.values())])
    title = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores: `make test-versions`\n\n"
    return title + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _run(*command: object, quiet: bool = False) -> None:
    done = subprocess.run(list(map(str, command)), cwd=HOME, capture_output=quiet, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stderr or ''}")


if __name__ == "__main__":
    sys.exit(main())
