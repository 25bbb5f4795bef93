"""The floor plan of docs/architecture.md: every import goes down, nothing goes in a circle, and each room stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dera_merge

PACKAGE = Path(dera_merge.__file__).parent
# From the ground up; rooms of one floor do not see each other.
FLOORS = [
    {"errors", "progress", "lambdas", "processes", "demo"},
    {"files", "statistics"},
    {"models", "pages"},
    {"merging", "decoding"},
    {"texts"},
    {"serving", "vllm"},
    {"measuring"},
    {"calibrating", "choosing", "publishing", "doctor", "playing", "api"},
    {"auto"},
    {"tour", "exact", "retraining", "lm_eval", "__init__"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name without `dera_merge.`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(file.read_text())
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that one imports, anywhere in it: in functions and under TYPE_CHECKING too."""
    is_package = name == "__init__" or (PACKAGE / name.replace(".", "/")).is_dir()
    here = [] if name == "__init__" else name.split(".")
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            base = here[: len(here) - node.level + is_package] if name != "__init__" else []
        elif (node.module or "").partition(".")[0] == "dera_merge":
            base = []
        else:
            continue
        module = [*base, *(part for part in (node.module or "").split(".") if part and part != "dera_merge")]
        for alias in node.names:
            whole = ".".join([*module, alias.name])
            found.add(whole if whole in known else ".".join(module) or "__init__")
    return found - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    trees = modules()
    return {name: imports(name, tree, set(trees)) for name, tree in trees.items()}


def test_every_import_goes_down(graph):
    up = [
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        for room, theirs in [(name.partition(".")[0], other.partition(".")[0])]
        if room != theirs and FLOOR_OF[theirs] >= FLOOR_OF[room]
    ]
    assert up == []
    assert "merging.path" in graph["merging.theta"]  # else nothing was looked at
    assert "models.pair" in graph["decoding.load"]


def test_nothing_goes_in_a_circle(graph):
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' → '.join(error.args[1])}")


def test_the_floor_plan_in_the_docs_names_files_that_exist():
    """`merging/merge.py`, and `steps.py` alone where the room is clear; and it has a line for each file of each room."""
    text = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_/]+\.py)`", text))
    files = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")}
    names = files | {file.rpartition("/")[2] for file in files}
    others = {"dera_merge/exact.py", "dera_merge/retraining.py", "tests/test_house.py"}
    assert named - names - others == set()
    assert len(named) > 20  # else nothing was looked at
    plan = text[text.index("- ground:") : text.index("## Words that are ours")]
    rooms = [file for file in files if "/" in file and not file.startswith(("cli/", "vllm/", "demo/")) and "__" not in file]
    assert [file for file in rooms if f"`{Path(file).stem}`" not in plan] == []


def test_every_room_says_what_it_knows_and_what_it_must_not_know():
    for room in PACKAGE.iterdir():
        if (room / "__init__.py").is_file() and room.name not in ("demo", "cli", "vllm"):
            words = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
            assert "knows" in words.lower(), f"{room.name} does not say what it knows"


@pytest.mark.parametrize(
    "what", ["dera_merge.cli", "dera_merge.pages.fidelity, dera_merge.pages.sweep", "dera_merge.statistics.verdict"]
)
def test_what_is_light_imports_no_torch(what):
    code = f"import sys, {what}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_merge_of_two_checkpoints_builds_no_model(tmp_path):
    """Not even an empty one: importing what transformers builds models of takes longer than a small merge."""
    code = (
        "import sys; from dera_merge import ModelPair, demo\n"
        f"ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE).merge({str(tmp_path / 'out')!r}, [0.5])\n"
        "sys.exit('transformers.models.auto.modeling_auto' in sys.modules or 'peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    "door",
    [
        "dera_merge.exact:DeraForCausalLM",
        "dera_merge.retraining:agreement",
        "dera_merge.demo:reward",
        "dera_merge.cli:main",
    ],
)
def test_doors_that_people_use_stay_open(door):
    from importlib import import_module

    module, _, name = door.partition(":")
    assert callable(getattr(import_module(module), name))
