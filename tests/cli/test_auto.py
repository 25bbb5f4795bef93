"""`auto`: from two models to the one to ship, each step once, and what was decided on the way."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from builders import weights
from commands import run
from test_cli import assert_one_line
from transformers import AutoModelForCausalLM

from dera_merge import demo
from dera_merge.auto import Wanted, auto
from dera_merge.auto.journal import Journal
from dera_merge.errors import DeraError
from dera_merge.models.pair import Pair
from dera_merge.pages import auto as pages
from dera_merge.publishing import card

ROOM = importlib.import_module("dera_merge.auto.auto")  # the room gives the name to the function
PAIR = demo.REF, demo.ALIGNED_LORA
WANTED = Wanted(demo.prompts("validation")[:4], lam=0.75, calibrate=False, max_new_tokens=8)
QUICK = ("--limit", 4, "--prompts", demo.FOLDER / "validation.jsonl", "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def pair():
    return Pair.from_pretrained(*PAIR)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Look at one λ beside the one that is wanted, and learn from few texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ROOM, "LOOKED_AT", (0.5,))
        patch.setattr(ROOM, "LESSONS", 16)
        patch.setattr(ROOM, "LESSON_TOKENS", 8)
        yield


@pytest.fixture(scope="module")
def outcome(pair, tmp_path_factory):
    """A run that was asked for λ = 0.75, without a learned path."""
    return auto(pair, tmp_path_factory.mktemp("auto") / "out", WANTED)


def test_it_ends_with_an_ordinary_model_at_the_lambda_measured_as_written_and_a_page(outcome):
    AutoModelForCausalLM.from_pretrained(outcome.model)
    recipe = json.loads((outcome.model / "dera_merge.json").read_text())
    assert (recipe["lambda"], recipe["path"]) == (0.75, "line")
    said = json.loads((outcome.folder / "auto.json").read_text())
    assert (said["lambda"], said["chosen_by"]) == (0.75, "given")
    report = json.loads((outcome.folder / "report" / "report.json").read_text())
    assert report["results"][0]["kl"] == said["result"]["kl"]
    assert report["results"][0]["weights"]  # it is of the files that were written
    page = outcome.page.read_text()
    for link in ("compare/report.html", "report/report.html", "card.md"):
        assert f'href="{link}"' in page
        assert (outcome.folder / link).is_file()
    assert "λ = 0.75 (it was asked for), merged on the straight line" in page
    assert all(command in page for command in outcome.commands.values())
    words = re.findall(r"<a [^>]+>([^<]+)</a>", page)
    assert len(set(words)) == len(words)
    (entry,) = card.read_metadata((outcome.folder / "card.md").read_text())["model-index"]
    assert entry["name"] == "aligned-lora-merged λ=0.75"


def test_the_page_connects_the_two_figures_of_a_learned_path():
    learned, line = {"learned": True}, {"kl": 0.006}
    run = {"learning": learned, "line": line, "result": {"kl": 0.002}}
    (said,) = pages._against_the_line(run)
    assert "3 times nearer" in said
    assert pages._against_the_line(run | {"learning": {"learned": False}}) == []


def test_the_next_run_uses_every_step_again_and_says_the_same(outcome, pair):
    before = json.loads((outcome.folder / "auto.json").read_text())
    again = auto(pair, outcome.folder, WANTED).to_dict()
    assert all(step["reused"] for step in again["steps"].values())
    assert {**again, "steps": None} == {**before, "steps": None}


def test_changed_settings_are_noticed_and_only_what_they_change_is_done_again(outcome, pair, caplog):
    caplog.set_level("INFO", "dera_merge")
    other = auto(pair, outcome.folder, replace(WANTED, lam=0.5, prompts=WANTED.prompts))
    steps = {name: step["reused"] for name, step in other.steps.items()}
    assert steps == {"inspect": True, "compare": False, "merge": False, "report": False}
    assert "merge: the settings are others than before; it is done again" in caplog.text
    merged, ref = weights(other.model), weights(demo.REF)
    assert any(not torch.equal(tensor, ref[name]) for name, tensor in merged.items())
    assert json.loads((other.model / "dera_merge.json").read_text())["lambda"] == 0.5


def test_what_stops_a_merge_stops_it_before_anything_is_written(tmp_path):
    assert_one_line(run("auto", demo.REF, demo.REF, "-o", tmp_path / "out"), 1, "Δ = 0")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert_one_line(run("auto", *PAIR, "-o", tmp_path / "mine"), 1, "auto did not write it")
    done = run("auto", *PAIR, "-l", 0.5, "--target-kl", 0.1, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "--target-kl would choose it" in " ".join(done.stderr.split())


def test_a_reward_that_the_prompts_cannot_serve_is_told_before_anything_is_done(pair, tmp_path):
    with pytest.raises(DeraError, match="answer"):
        auto(pair, tmp_path / "out", Wanted(prompts=["one", "two"], rewards=["answer:number"]))
    assert not (tmp_path / "out").exists()


def test_a_task_that_nobody_has_is_told_before_anything_is_done(pair, tmp_path):
    with pytest.raises(DeraError, match=r"no task nosuch; .* has praise, sense"):
        auto(pair, tmp_path / "out", Wanted(tasks=["nosuch"], include_path=demo.FOLDER / "tasks"))
    assert not (tmp_path / "out").exists()


def test_a_step_that_broke_off_goes_on_and_a_lost_result_is_made_again(tmp_path):
    seen, kept = [], {}

    def work(name, fails=False):
        def do(resume):
            seen.append((name, resume))
            if fails:
                raise KeyboardInterrupt
            kept[name] = name
            return name

        return do

    def load(name):
        def do():
            if name not in kept:
                raise DeraError("gone")
            return kept[name]

        return do

    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path).step("a", {"x": 1}, work("a", fails=True), load("a"))
    assert Journal(tmp_path).step("a", {"x": 1}, work("a"), load("a")) == "a"
    assert Journal(tmp_path).step("a", {"x": 1}, work("a"), load("a")) == "a"
    kept.clear()
    Journal(tmp_path).step("a", {"x": 1}, work("a"), load("a"))
    Journal(tmp_path).step("a", {"x": 2}, work("a"), load("a"))
    assert seen == [("a", False), ("a", True), ("a", False), ("a", False)]


def test_of_several_tasks_the_mean_gain_over_the_reference_counts_and_parts_of_a_group_do_not():
    def task(name, values, higher=True, part_of=None):
        rows = [{"lambda": lam, "value": value} for lam, value in values.items()]
        metric = {"metric": "m", "higher_is_better": higher, "exact": rows}
        return {"task": name, "part_of": part_of, "metric": "m", "metrics": [metric]}

    accuracy, perplexity = {0.0: 0.5, 0.5: 0.6, 1.0: 0.4}, {0.0: 10.0, 0.5: 9.0, 1.0: 5.0, 2.0: 1.0}
    gains = ROOM.mean_gains([task("a", accuracy), task("p", perplexity, False), task("x", {0.0: 1.0, 0.5: 9.0}, True, "g")])
    assert gains == pytest.approx({0.0: 0.0, 0.5: (0.2 + 0.1) / 2, 1.0: (-0.2 + 0.5) / 2})


@pytest.mark.slow
def test_a_target_chooses_lambda_and_one_that_no_lambda_meets_stops(pair, tmp_path):
    wanted = replace(WANTED, lam=None, target_kl=0.02)
    chosen = auto(pair, tmp_path / "out", wanted)
    assert chosen.chosen_by == "target_kl"
    assert chosen.lam == chosen.found["best"]["lambda"]
    assert chosen.found["best"]["target"]["reached"] == pytest.approx(0.02, rel=0.1)
    with pytest.raises(DeraError, match="no λ from 0 to 2 has a KL of 40 nats a token"):
        auto(pair, tmp_path / "out", replace(wanted, target_kl=40.0))


@pytest.mark.slow
def test_a_path_is_learned_where_the_line_is_not_safe_and_the_time_is_said_before(pair, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO", "dera_merge")
    wanted = replace(WANTED, prompts=demo.prompts("validation")[:6], lam=2.0, calibrate=None)
    outcome = auto(pair, tmp_path / "out", wanted)
    assert outcome.line["verdict"] != "safe"
    assert "Learning a path takes about" in caplog.text
    recipe = json.loads((outcome.model / "dera_merge.json").read_text())
    assert (recipe["path"] != "line") == outcome.learning["learned"]
    monkeypatch.setattr(ROOM, "PATIENCE", 0)
    outcome = auto(pair, tmp_path / "other", wanted)
    assert "--calibrate learns one all the same" in outcome.learning["why"]


@pytest.mark.slow
def test_from_the_command_line_a_recipe_stays_that_does_it_again(tmp_path):
    first = run("auto", *PAIR, *QUICK, "-l", 0.75, "--no-calibrate", "-o", "out", "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    said = json.loads(first.stdout)
    recipe = yaml.safe_load((tmp_path / "out" / "auto.yaml").read_text())
    assert (recipe["lambda"], recipe["calibrate"]) == ("0.75", False)
    again = json.loads(run("auto", "--config", "out/auto.yaml", "--json", cwd=tmp_path).stdout)
    assert all(step["reused"] for step in again["steps"].values())
    assert {**again, "steps": None} == {**said, "steps": None}
