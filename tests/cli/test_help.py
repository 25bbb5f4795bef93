"""`--help`: two screens a command, every option in a panel, and examples that run as they stand."""

import shlex

import pytest
import typer
from commands import run
from test_cli import assert_one_line

from dera_merge import __version__, cli, demo
from dera_merge.cli import help

PROGRAM = typer.main.get_command(cli.app)
NAMES = list(cli.COMMANDS)
EXAMPLES = [line for module in cli.COMMANDS.values() for line in module.EXAMPLES]


def shown(name):
    command = PROGRAM.commands[name]
    return command.get_help(command.make_context(name, [], resilient_parsing=True, terminal_width=100))


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_every_option_stands_in_a_panel_and_all_fit_two_screens(name):
    text = shown(name)
    assert len(text.splitlines()) <= 80
    for option in PROGRAM.commands[name].params:
        if option.param_type_name == "option":
            assert option.rich_help_panel in help.PANELS, f"{option.opts[0]} of {name} is in no panel"
            assert option.opts[-1] in text
            assert option.help, f"{option.opts[0]} of {name} says nothing"


@pytest.mark.core
@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_nothing_and_what_has_to_be_given_stands_in_the_line_of_usage(width):
    listed = " ".join(PROGRAM.get_help(PROGRAM.make_context("dera-merge", [], resilient_parsing=True, terminal_width=width)).split())
    for name in NAMES:
        command = PROGRAM.commands[name]
        assert f" {name} {command.help.partition('. ')[0].rstrip('.')} " in listed
        context = command.make_context(name, [], resilient_parsing=True, terminal_width=width)
        usage, _, rest = command.get_help(context).partition("\n\n")
        for parameter in command.params:
            if parameter.required:
                assert (parameter.metavar if parameter.param_type_name == "argument" else f"{parameter.opts[0]} ") in usage
        assert "required" not in rest
        assert not set("{}") & set(usage)


@pytest.mark.core
@pytest.mark.parametrize("name", NAMES)
def test_two_examples_or_more_are_shown_whole_and_parse(name):
    examples = cli.COMMANDS[name].EXAMPLES
    assert len(examples) >= 2
    for line in examples:
        assert f"\n  {line}" in shown(name)
        program, command, *words = shlex.split(line)
        assert (program, command) == ("dera-merge", name)
        PROGRAM.commands[name].make_context(name, words)


@pytest.mark.core
def test_the_version_is_told_without_models():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"dera-merge {__version__}\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the demo pair lies as the examples name it."""
    folder = tmp_path_factory.mktemp("examples")
    assert run(*shlex.split(help.FIRST)[1:], cwd=folder).returncode == 0
    return folder


def test_the_pair_is_copied_whole_and_nothing_that_is_there_is_touched(place):
    for part in (demo.REF, demo.ALIGNED_LORA, demo.ALIGNED_DENSE, demo.ALIGNED_BRIEF):
        for file in part.iterdir():
            assert (place / "demo" / part.name / file.name).read_bytes() == file.read_bytes()
    assert (place / "demo" / "prompts.jsonl").is_file()
    assert_one_line(run("demo", "--pair", "demo", cwd=place), 1, "not empty")


FAST = ("merge", "generate", "inspect", "doctor", "push", "export-exact")


def test_the_first_example_of_each_fast_command_runs(place):
    for name in FAST:
        done = run(*shlex.split(cli.COMMANDS[name].EXAMPLES[0])[1:], cwd=place)
        assert done.returncode == 0, (name, done.stderr)
        assert done.stdout


@pytest.mark.slow
def test_all_examples_run_one_after_the_other(tmp_path):
    assert run(*shlex.split(help.FIRST)[1:], cwd=tmp_path).returncode == 0
    for line in EXAMPLES:
        if line != help.FIRST and not line.startswith("dera-merge play"):  # which serves until it is stopped
            done = run(*shlex.split(line)[1:], cwd=tmp_path)
            assert done.returncode == 0, (line, done.stderr)
