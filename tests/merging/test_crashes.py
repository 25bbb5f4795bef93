"""Whatever happens while a merge is written: a complete checkpoint, or a directory that says that it is none."""

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import weights
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, ModelPair
from dera_merge.merging.output import LOCK
from dera_merge.merging.recipe import PARTIAL, verify

SHARDS = "60KB"
MERGE = """
import sys
from dera_merge import DeraError, ModelPair
def merge(ref, aligned, out, resume=False, shard=None):
    ModelPair.from_pretrained(ref, aligned).merge(out, [0.3, 0.7], max_shard_size="60KB", resume=resume, shard=shard)
"""
# Imports once, then forks a child per line of stdin: (resume, seconds until SIGKILL or null). Says how each ended.
FORKER = MERGE + """
import json, os, signal, time
ref, aligned, out = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    resume, patience = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            merge(ref, aligned, out, resume)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    if patience is not None:
        time.sleep(patience)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.WIFSIGNALED(status), status]), flush=True)
"""


@pytest.fixture(scope="module")
def pair(llama):
    """Half a million weights in a dozen shards: a merge takes long enough to be killed in the middle."""
    size = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
    return llama(0, **size), llama(1, near=0, **size)


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The bytes of an uninterrupted merge."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return content(ModelPair.from_pretrained(*pair).merge(out, [0.3, 0.7], max_shard_size=SHARDS)[0].parent)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_complete_or_says_that_it_is_not(out: Path, whole: dict[str, bytes]) -> bool:
    done = True
    for folder in sorted(out.glob("lambda-*")):
        if (folder / "config.json").exists():  # it claims to be a model, so all of it must be there
            for name, data in whole.items():
                if name.startswith(f"{folder.name}/"):
                    assert (out / name).read_bytes() == data
        else:
            done = False
            assert not list(folder.iterdir()) or (folder / PARTIAL).exists() or not list(folder.glob("*.safetensors"))
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(folder)
    return done


@pytest.mark.slow  # one kill, and going on, is in test_cli.py
@pytest.mark.parametrize("wanted", [24])
def test_kills_at_random_moments_leave_no_half_truth_and_resume_to_the_same_bytes(pair, whole, tmp_path, wanted):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", FORKER, *map(str, pair), str(out)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip

    def run(resume: bool, patience: float | None) -> bool:
        process.stdin.write(json.dumps([resume, patience]) + "\n")
        process.stdin.flush()
        killed, status = json.loads(process.stdout.readline())
        assert killed or status == 0
        return killed

    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    assert not run(False, None)
    length = time.monotonic() - began
    shutil.rmtree(out)
    rng, kills, in_the_middle = random.Random(0), 0, 0
    while kills < wanted:
        killed = run(True, rng.uniform(0.2 * length, length))
        kills += killed
        finished = assert_complete_or_says_that_it_is_not(out, whole) if out.exists() else False
        in_the_middle += killed and out.exists() and not finished
        if rng.random() < 0.3 or not killed:  # go on to the end from here, else kill the resumed run too
            assert not run(True, None)
            assert content(out) == whole
            shutil.rmtree(out)
    process.stdin.close()
    process.wait(60)
    assert in_the_middle >= wanted // 5  # else the test kills at the wrong moments


def test_a_file_size_limit_or_a_full_disk_breaks_off_and_can_be_resumed(pair, whole, tmp_path):
    out = tmp_path / "out"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    code = MERGE + "merge(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *map(str, pair), str(out)], preexec_fn=limit, capture_output=True)
    assert done.returncode == 1
    assert b"broke off: [Errno 27]" in done.stderr
    assert not assert_complete_or_says_that_it_is_not(out, whole)
    ModelPair.from_pretrained(*pair).merge(out, [0.3, 0.7], max_shard_size=SHARDS, resume=True)
    assert content(out) == whole


def test_too_little_space_is_found_before_the_first_byte(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DeraError, match="are free there"):
        ModelPair.from_pretrained(*pair).merge(tmp_path / "out", [0.3])
    assert not (tmp_path / "out").exists()


def test_files_have_the_modes_of_the_umask(llama, tmp_path):
    before = os.umask(0o027)
    try:
        (out,) = ModelPair.from_pretrained(llama(0), llama(1)).merge(tmp_path / "out", [0.5])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o640}


# Several processes


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_that_share_one_output_write_the_bytes_of_one(pair, whole, tmp_path, count):
    out = tmp_path / "out"
    code = MERGE + "i, n = map(int, sys.argv[4:]); merge(*sys.argv[1:4], shard=(i, n))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, pair), str(out), str(i), str(count)])
        for i in range(1, count + 1)
    ]
    assert [process.wait(120) for process in processes] == [0] * count
    assert content(out) == whole


def test_a_share_alone_is_no_model_and_a_plain_resume_completes_it(pair, whole, tmp_path):
    opened = ModelPair.from_pretrained(*pair)
    out = tmp_path / "out"
    folders = opened.merge(out, [0.3, 0.7], max_shard_size=SHARDS, shard=(2, 2))
    assert all((folder / PARTIAL).exists() and not (folder / "config.json").exists() for folder in folders)
    (folders[0] / LOCK).touch()  # one process died while it finished
    with pytest.raises(DeraError, match="does not go with --overwrite"):
        opened.merge(out, [0.3, 0.7], max_shard_size=SHARDS, shard=(1, 2), overwrite=True)
    with pytest.raises(DeraError, match="--resume"):
        opened.merge(out, [0.3, 0.7], max_shard_size=SHARDS)
    opened.merge(out, [0.3, 0.7], max_shard_size=SHARDS, resume=True)
    assert content(out) == whole


@pytest.mark.slow
def test_a_launcher_gives_each_process_its_share(pair, whole, tmp_path):
    command = Path(sys.executable).with_name("dera-merge")
    out = tmp_path / "out"
    arguments = ["merge", *map(str, pair), "-l", "0.3,0.7", "-o", str(out), "--max-shard-size", SHARDS]
    for rank in ("1", "0"):
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
        said = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True, check=True)
        assert ("the process that ends last completes it" in said.stdout) == (rank == "1")
    assert content(out) == whole
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([command, *arguments, "--shard", "3/2"], capture_output=True, check=True)


# Statistics


def test_saturated_and_nonfinite_weights_are_counted(llama, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(llama(1, near=0), tmp_path / "odd")
    tensors = weights(llama(1, near=0))
    tensors["model.norm.weight"][:3] = torch.tensor([float("inf"), float("nan"), 3e38])
    save_file(tensors, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(llama(0), tmp_path / "odd")
    with pytest.raises(DeraError, match="--allow-nonfinite"):
        pair.merge(tmp_path / "no", [1.5])
    (out,) = pair.merge(tmp_path / "out", [1.001], allow_nonfinite=True, dtype="float16")
    found = verify(out)["statistics"]
    assert (found["saturated"], found["nonfinite"]) == (1, 2)
    assert found["per_kind"]["norm"]["nonfinite"] == 2
    stored = weights(out)["model.norm.weight"]
    assert stored[0] == float("inf")
    assert stored[1].isnan()
    assert stored[2] == torch.finfo(torch.float16).max
