"""Hours of work are not lost: to a signal, to the same command typed again, to a second run, or to a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import pytest
from commands import FORKS, Started, run

from dera_merge import DeraError, ModelPair, calibrate, compare, load_reward, sweep
from dera_merge.files.room import LOCK, alone
from dera_merge.measuring.ledger import Ledger

pytestmark = pytest.mark.skipif(not FORKS, reason="processes are forked")
PROMPTS = [f"w{n} w{n + 1} w{n + 2}" for n in range(5, 13)]


@pytest.fixture(scope="module")
def models(llama, lora):
    base = llama(0)
    return [str(base), str(lora(base))]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


def words(models, prompts, out, *more):
    return ["sweep", *models, "--prompts", prompts, "--reward", "length", "--max-new-tokens", "8", "--samples", "4", "--no-merged", "--budget", "1", "-o", out, *more]


def texts(out):
    """(mode, λ, prompt, sample) of each whole line."""
    lines = (out / "texts.jsonl").read_text().split("\n")[1:-1]
    return [(row["mode"], str(row["lambda"]), row["prompt"], row["sample"]) for row in map(json.loads, lines)]


def wait_for(what, job):
    while not what():
        assert not job.ended, job.said
        time.sleep(0.01)


def test_signals_at_random_moments_lose_nothing_and_say_how_to_go_on(models, prompts, tmp_path):
    dice, out, folder = random.Random(0), tmp_path / "out", tmp_path / "said"
    folder.mkdir()
    kept, interrupted = 0, 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP):
        job = Started(folder, *words(models, prompts, out, "--resume"))
        wait_for(lambda job=job: job.said, job)  # it has begun
        time.sleep(dice.uniform(0, 0.4))
        os.kill(job.pid, number)
        code, said = job.end()
        if code not in (0, -number):
            assert code == 130
            (line,) = [line for line in said.splitlines() if "interrupted" in line]
            left = (out / "texts.jsonl").is_file()
            assert line.endswith("--resume" if left else "interrupted")
            assert line.count("--resume") == left
            interrupted += 1
        if (out / "texts.jsonl").is_file():
            assert len(texts(out)) >= kept
            kept = len(texts(out))
    assert interrupted
    assert run(*words(models, prompts, out, "--resume")).returncode == 0
    assert len(texts(out)) == len(set(texts(out))) == 4 * 8 * 4, "anchors, prompts and samples"
    assert not list(out.glob("*.partial")) + list(out.glob(".*.partial"))


def test_the_same_command_typed_again_throws_no_text_away(models, tmp_path):
    pair, out, rewards = ModelPair.from_pretrained(*models), tmp_path / "out", [load_reward("length")]
    how = {"max_new_tokens": 8, "merged": False, "budget": 1, "check": False, "out": out}
    sweep(pair, PROMPTS, rewards, **how)
    before = (out / "texts.jsonl").read_bytes()
    for more, problem in (({}, "--resume goes on"), ({"seed": 1}, "of another call"), ({"seed": 1, "resume": True}, "of another call")):
        with pytest.raises(DeraError, match=problem):
            sweep(pair, PROMPTS, rewards, **how, **more)
        assert (out / "texts.jsonl").read_bytes() == before
    sweep(pair, PROMPTS, rewards, **how, resume=True)
    assert (out / "texts.jsonl").read_bytes() == before
    sweep(pair, PROMPTS, rewards, **how, seed=1, overwrite=True)
    assert (out / "texts.jsonl").read_bytes() != before


def test_a_second_run_in_a_directory_is_refused_until_the_first_is_gone_however_it_went(models, prompts, tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef slow(text):\n    time.sleep(60)\n")
    out, folder = tmp_path / "out", tmp_path / "said"
    folder.mkdir()
    job = Started(folder, *words(models, prompts, out, "--reward", "slow:slow"), cwd=tmp_path)
    wait_for((out / LOCK).is_file, job)
    for more in (("--resume",), ("--overwrite", "--seed", "3")):
        done = run(*words(models, prompts, out, *more))
        assert done.returncode == 1
        assert f"another run (process {job.pid})" in done.stderr
    os.kill(job.pid, signal.SIGKILL)
    job.end()
    assert run(*words(models, prompts, out)).returncode == 0


def test_every_long_command_keeps_others_out_of_its_place(models, tmp_path):
    pair = ModelPair.from_pretrained(*models)
    with alone(tmp_path / "a" / ".unfinished"), pytest.raises(DeraError, match="another run"):
        compare(pair, [0.5], PROMPTS, max_new_tokens=2, extras=(), unfinished=tmp_path / "a")
    with alone(tmp_path / "b.safetensors.unfinished"), pytest.raises(DeraError, match="another run"):
        calibrate(pair, [0.0, 1.0], PROMPTS, texts=16, max_new_tokens=2, out=tmp_path / "b.safetensors")
    with alone(tmp_path / "c"):
        for resume in (False, True):
            with pytest.raises(DeraError, match="another run"):
                pair.merge(tmp_path / "c", [0.5], resume=resume)
    with alone(tmp_path / "d"), pytest.raises(DeraError, match="another run"):
        pair.merge(tmp_path / "d", [0.5], format="adapter")
    assert not list(tmp_path.iterdir())
    with alone(tmp_path / "e", shared=True):
        pair.merge(tmp_path / "e", [0.5], shard=(1, 1))
    assert (tmp_path / "e" / "config.json").is_file()
    assert not (tmp_path / "e" / LOCK).exists()


def test_a_calibration_that_is_told_to_stop_can_be_resumed_from_the_command_line(models, prompts, tmp_path):
    out, folder = tmp_path / "path.safetensors", tmp_path / "said"
    folder.mkdir()
    command = ["calibrate", *models, "-l", "0,2", "--prompts", prompts, "--texts", "480", "--max-new-tokens", "8", "--rank", "2", "--passes", "1", "-o", out]
    job = Started(folder, *command)
    wait_for((tmp_path / "path.safetensors.unfinished" / "texts-0.npz").is_file, job)
    os.kill(job.pid, signal.SIGTERM)
    code, said = job.end()
    assert code == 130
    assert said.splitlines()[-1].endswith("--resume")
    assert not out.exists()
    again = run(*command)
    assert again.returncode == 1
    assert "--resume goes on" in again.stderr
    done = run(*command, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 480
    assert sorted(file.name for file in tmp_path.iterdir()) == ["path.safetensors", "prompts.txt", "said"]


def test_a_full_disk_loses_nothing_and_says_what_to_do(models, prompts, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "said"
    folder.mkdir()
    code, said = Started(folder, *words(models, prompts, out), limit=8_000).end()
    assert code == 1
    assert "the disk is full" in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("--resume")
    kept = texts(out)
    assert 20 < len(kept) < 128
    done = run(*words(models, prompts, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert texts(out)[: len(kept)] == kept
    assert len(texts(out)) == len(set(texts(out)))


def test_space_is_looked_at_before_the_work(models, tmp_path, monkeypatch):
    pair = ModelPair.from_pretrained(*models)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10_000))

    def never(*said):
        raise AssertionError("work began")

    with pytest.raises(DeraError, match="are free there"):
        sweep(pair, PROMPTS, [load_reward("length")], out=tmp_path / "a", progress=never)
    with pytest.raises(DeraError, match="are free there"):
        compare(pair, [0.5], PROMPTS, unfinished=tmp_path / "b", progress=never)
    with pytest.raises(DeraError, match="are free there"):
        calibrate(pair, [0.0, 2.0], PROMPTS, out=tmp_path / "c", progress=never)
    assert not list(tmp_path.iterdir())


def test_a_ledger_gives_back_what_it_was_given_and_goes_with_its_folders(tmp_path):
    import numpy as np

    place = tmp_path / "deep" / "steps"
    with Ledger(place, {"a": 1}) as ledger:
        assert ledger.step("one", lambda: {"x": np.arange(3)})["x"].tolist() == [0, 1, 2]
        ledger.keep("one", {"x": np.arange(2)})
    with Ledger(place, {"a": 1}, resume=True) as ledger:
        assert ledger.step("one", lambda: 1 / 0)["x"].tolist() == [0, 1]
    ledger.close()
    assert (tmp_path / "deep").is_dir()  # another ledger's, that was there before this one
    with Ledger(tmp_path / "new" / "steps", {}):
        pass
    assert not (tmp_path / "new").exists()
