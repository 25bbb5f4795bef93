"""What rounding leaves of λΔ is said: an error where it is nothing, a line with the figure where it is little or noisy."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from builders import weights
from commands import run
from safetensors.torch import save_file

from dera_merge import DeraError, DeraWarning, ModelPair, demo
from dera_merge.merging.tally import ENOUGH, LOUD
from dera_merge.models.damage import PREFIX


@pytest.fixture(scope="module")
def faint(llama, tmp_path_factory):
    """A pair in bfloat16 of which the aligned model, in float32, has moved by far less than an ulp."""
    ref, aligned = llama(0), tmp_path_factory.mktemp("faint") / "aligned"
    shutil.copytree(ref, aligned)
    torch.manual_seed(0)
    moved = {name: t.float() + 1e-6 * torch.randn(t.shape) for name, t in weights(ref).items()}
    save_file(moved, aligned / "model.safetensors", metadata={"format": "pt"})
    return ref, aligned


def figures(ref, aligned, out, lam):
    """⟨stored - θ_ref, λΔ⟩/‖λΔ‖² and ‖stored - θ(λ)‖/‖λΔ‖, in float64."""
    theirs = [weights(folder) for folder in (ref, aligned, out)]
    first, second, stored = (torch.cat([t[name].double().flatten() for name in sorted(t)]) for t in theirs)
    step = lam * (second - first)
    square = step.square().sum()
    return ((stored - first) @ step / square).item(), ((stored - first - step).square().sum() / square).sqrt().item()


@pytest.mark.parametrize(("rounding", "words"), [("nearest", "keeps"), ("stochastic", "the noise of")])
def test_an_output_of_which_little_or_much_else_is_stored_is_told_with_the_figure(faint, tmp_path, rounding, words):
    with pytest.warns(DeraWarning, match=f"at λ=0.5 {words}|at λ=0.5 {rounding} rounding {words}") as caught:
        (out,) = ModelPair.from_pretrained(*faint).merge(tmp_path / "out", [0.5], rounding=rounding)
    kept, error = figures(*faint, out, 0.5)
    assert kept < ENOUGH if rounding == "nearest" else error > LOUD
    said = next(str(one.message) for one in caught if "λ=0.5" in str(one.message))
    assert (f"{kept:.1%}" if rounding == "nearest" else f"{error:.3g} times") in said


def test_float32_has_no_such_line(faint, tmp_path, recwarn):
    ModelPair.from_pretrained(*faint).merge(tmp_path / "out", [0.5], dtype="float32")
    assert not [one for one in recwarn if "rounding" in str(one.message)]


def test_inspect_and_merge_say_the_same(faint, tmp_path):
    """And the line of a merge gives the noise beside what is kept on average."""
    merged = run("merge", *faint, "-l", "1", "-o", tmp_path / "out")
    inspected = run("inspect", *faint)
    line = next(line for line in merged.stderr.splitlines() if "λ=1 " in line)
    assert line in inspected.stderr
    assert "times as large as Δ" in inspected.stdout
    _, error = figures(*faint, tmp_path / "out", 1.0)
    assert f"noise {error:.2g} × ‖λΔ‖" in merged.stdout
    total = json.loads(run("inspect", *faint, "--json").stdout)["delta"]["total"]
    assert total["error"] == pytest.approx(error, rel=1e-6)


def test_a_dead_adapter_is_an_error_everywhere(tmp_path):
    dead = shutil.copytree(demo.ALIGNED_LORA, tmp_path / "dead")
    tensors = {k: v * ("lora_B" not in k) for k, v in weights(dead).items()}
    save_file(tensors, dead / "adapter_model.safetensors")
    for words in (("merge", "-l", 0.5, "-o", tmp_path / "a"), ("merge", "-l", 0.5, "-o", tmp_path / "b", "--format", "adapter"),
                  ("generate", "-l", 0.5, "--prompt", "a"), ("inspect",)):  # fmt: skip
        done = run(words[0], demo.REF, dead, *words[1:])
        assert done.returncode == 1
        assert "lora_B are zero" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "a").exists()


def test_an_adapter_that_rounds_to_nothing_is_an_error(llama, lora, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), lora(llama(0)))
    with pytest.raises(DeraError, match="nothing of λΔ survives"):
        pair.merge(tmp_path / "out", [1e-9], format="adapter", dtype="float16")
    assert not (tmp_path / "out").exists()
    (out,) = pair.merge(tmp_path / "out", [0.0], format="adapter", dtype="float16")  # the reference was asked for
    assert all(not tensor.any() for key, tensor in weights(out).items() if "lora_B" in key and key.startswith(PREFIX))
