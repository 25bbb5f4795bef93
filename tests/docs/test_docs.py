"""The documentation: every command in it exists, every block runs as it stands, every page can be found."""

import html
import inspect
import os
import pydoc
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from blocks import PAGES, ROOT, blocks

import dera_merge
from dera_merge import cli

PROGRAM = typer.main.get_command(cli.app)
BLOCKS = blocks()
RUN = [page for page in PAGES if any(block.page == page and block.why is None for block in BLOCKS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page):
    """Those too that are not run. Options of our scripts are looked for in the scripts."""
    for block in BLOCKS:
        if block.page != page or block.kind == "python":
            continue
        for words in block.commands:
            name, *rest = words
            if Path(name).name == "dera-merge":
                command, *arguments = rest
                if not command.startswith("-"):
                    PROGRAM.commands[command].make_context(command, arguments, resilient_parsing="--json" in arguments)
            elif name == "python" and rest[0].startswith("scripts/"):
                script = (ROOT / rest[0]).read_text()
                assert [word for word in rest if word.startswith("--") and f'"{word}"' not in script] == []
            elif name == "make":
                targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
                assert rest[0] in targets


def test_python_blocks_are_python():
    for block in BLOCKS:
        if block.kind == "python":
            compile(block.text, str(block.page), "exec")


def test_most_blocks_run_and_the_others_say_why():
    marked = [block for block in BLOCKS if block.why]
    assert all(len(block.why) > 5 for block in marked)
    assert len(marked) < len(BLOCKS) / 2, [(block.page.name, block.why) for block in marked]
    text = "".join(page.read_text() for page in PAGES)
    assert text.count("<!-- not run") == len(marked), "a mark stands directly above its block"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


def test_advice_to_install_names_what_pyproject_asks_for():
    """By its own name, which pip finds wherever this package came from."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {requirement for extra in extras.values() for requirement in extra}
    said = [found for file in (ROOT / "dera_merge").rglob("*") if file.suffix in (".py", ".html")
            for found in re.findall(r"pip install ((?:'[^'{]+' ?)+)", html.unescape(file.read_text()))]  # fmt: skip
    assert len(said) > 5
    assert {each for words in said for each in shlex.split(words)} <= known


def test_pictures_are_small():
    assert [file.name for file in (ROOT / "docs").rglob("*.png") if file.stat().st_size > 300_000] == []


def navigation() -> list[str]:
    class Loader(yaml.SafeLoader):
        """Takes tags that only mkdocs knows as text."""

    def pages(node):
        if isinstance(node, str):
            return [node]
        return [page for entry in (node.values() if isinstance(node, dict) else node) for page in pages(entry)]

    return pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])


def test_every_page_is_in_the_navigation_and_in_llms_txt():
    files = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert set(navigation()) == files
    listed = re.findall(r"\]\((?:docs/)?([\w.-]+\.md)\)", (ROOT / "llms.txt").read_text())
    assert set(listed) - {"README.md", "CHANGELOG.md"} == files


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def documented() -> list[object]:
    """What docs/api.md shows: modules, classes and functions."""
    return [pydoc.locate(name) for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)]


def test_the_api_page_shows_all_that_the_package_gives():
    shown = documented()
    assert [name for name in dera_merge.__all__ if not any(getattr(dera_merge, name) is each for each in shown)] == []
    assert [name for name in dera_merge.__all__ if name not in dir(dera_merge)] == []


def test_docstrings_name_arguments_one_by_one_and_only_such_as_there_are():
    """The site's builder takes a line of several for one of a strange name, and stops."""
    functions = [
        each
        for shown in documented()
        for each in ([shown, *(member for name, member in inspect.getmembers(shown, callable) if name[0] != "_")]
                     if inspect.isclass(shown) else [shown])
        if getattr(each, "__module__", "").startswith("dera_merge")
    ]  # fmt: skip
    wrong = []
    for function in functions:
        _, _, section = (inspect.getdoc(function) or "").partition("Args:\n")
        named = re.findall(r"^    ([^\s:][^:\n]*):", section.partition("\n\n")[0], re.M)
        wrong += [(function, name) for name in named if name not in inspect.signature(function).parameters]
    assert len(functions) > 30
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, tmp_path):
    """In an empty directory: the page's commands one after the other, then its Python as one program."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    mine = [block for block in BLOCKS if block.page == page and block.why is None]
    bash = "".join(block.text for block in mine if block.kind == "bash")
    python = "".join(block.text for block in mine if block.kind == "python")
    for command in (["bash", "-e", "-c", bash], [sys.executable, "-c", python]):
        if command[-1]:
            ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
            assert ended.returncode == 0, ended.stderr[-3000:]
            assert "Loading weights" not in ended.stderr


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    for file in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', file.read_text())
        assert fetched == [], f"{file.name} fetches {fetched}"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    file = ROOT / "docs" / "dera.ipynb"
    notebook = nbformat.read(file, as_version=4)
    assert file.stat().st_size < 200_000
    assert len(notebook.cells) <= 15
    os.environ["PYTHONPATH"] = str(ROOT)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    last = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "lambda-" in last
