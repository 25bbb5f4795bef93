"""The claim behind λ: decoding at λ is training at β/λ. In closed form, float64, over every answer there is."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import demo
from dera_merge.lambdas import Vector
from dera_merge.measuring.divergence import mixture
from dera_merge.measuring.retraining import optimum, per_token, regret

BETA = st.floats(0.2, 5)
LAM = st.floats(-2, 4)
SEED = st.integers(0, 10_000)


def some(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(log_p: torch.Tensor) -> torch.Tensor:
    return log_p - log_p.logsumexp(tuple(range(log_p.ndim)))


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum())


@given(SEED, BETA, st.floats(0.01, 2))
def test_no_policy_earns_more_than_the_optimum(seed, beta, step):
    ref, reward = normal(some(seed, (3, 3, 3))), some(seed + 1, (3, 3, 3))
    best = optimum(ref, reward, beta)

    def earns(log_p: torch.Tensor) -> float:
        return float((log_p.exp() * reward).sum()) - beta * kl(log_p, ref)

    assert earns(best) == pytest.approx(beta * float((ref + reward / beta).logsumexp((0, 1, 2))), abs=1e-10)
    assert earns(normal(best + some(seed + 2, (3, 3, 3), step))) < earns(best)


@given(SEED, BETA, LAM)
def test_for_answers_of_one_token_lambda_is_retraining_exactly(seed, beta, lam):
    ref, reward = normal(some(seed, (7,))), some(seed + 1, (7,))
    aligned = optimum(ref, reward, beta)
    decoded, _, _ = mixture(ref[None], [aligned[None]], lam)  # what the library decodes with
    retrained = ref if lam == 0 else optimum(ref, lam * reward, beta)  # β/λ, whatever its sign
    torch.testing.assert_close(decoded[0], retrained, rtol=0, atol=1e-10)
    torch.testing.assert_close(per_token(ref, [aligned], lam), retrained, rtol=0, atol=1e-10)


@given(SEED, BETA, LAM)
def test_for_whole_answers_the_mixture_is_retraining_exactly(seed, beta, lam):
    ref, reward = normal(some(seed, (3, 3, 3))), some(seed + 1, (3, 3, 3))
    decoded, _, _ = mixture(ref.reshape(1, -1), [optimum(ref, reward, beta).reshape(1, -1)], lam)
    torch.testing.assert_close(decoded.reshape(3, 3, 3), optimum(ref, lam * reward, beta), rtol=0, atol=1e-10)


@given(SEED, st.tuples(BETA, BETA), st.tuples(LAM, LAM))
def test_with_two_rewards_lambda_weighs_them_exactly(seed, betas, lams):
    """h_ref + Σ λ_k·(h_k - h_ref) over whole answers is the optimum of Σ λ_k·r_k/β_k, at any λ."""
    ref, (one, two) = normal(some(seed, (3, 3))), (some(seed + k, (3, 3)) for k in (1, 2))
    aligned = [optimum(ref, reward, beta).reshape(1, -1) for reward, beta in zip((one, two), betas, strict=True)]
    both, _, _ = mixture(ref.reshape(1, -1), aligned, Vector(lams))
    expected = normal(ref + lams[0] * one / betas[0] + lams[1] * two / betas[1])
    torch.testing.assert_close(both.reshape(3, 3), expected, rtol=0, atol=1e-9)


def test_token_by_token_two_rewards_are_apart_by_the_fourth_power_of_beta_too():
    ref, (one, two) = normal(some(4, (3, 3, 3))), (some(k, (3, 3, 3)) for k in (5, 6))
    lam = Vector((0.5, 0.75))

    def apart(beta: float) -> float:
        retrained = normal(ref + (lam[0] * one + lam[1] * two) / beta)
        return kl(retrained, per_token(ref, [optimum(ref, one, beta), optimum(ref, two, beta)], lam))

    assert apart(1.0) > 1e-5
    for beta in (32.0, 64.0):
        assert apart(beta) / apart(2 * beta) == pytest.approx(16, rel=0.15)


@given(SEED, BETA, LAM)
@settings(max_examples=25)
def test_exact_dera_is_its_definition_token_by_token(seed, beta, lam):
    ref = normal(some(seed, (3, 3, 3)))
    aligned = optimum(ref, some(seed + 1, (3, 3, 3)), beta)
    found = per_token(ref, [aligned], lam)
    p, q = ref.exp().numpy(), aligned.exp().numpy()
    for answer in itertools.product(range(3), repeat=3):
        total = 0.0
        for step in range(3):
            ours, theirs = (each[answer[:step]].reshape(3, -1).sum(1) for each in (p, q))
            ours, theirs = ours / ours.sum(), theirs / theirs.sum()
            weights = ours ** (1 - lam) * theirs**lam
            total += math.log(weights[answer[step]] / weights.sum())
        assert float(found[answer]) == pytest.approx(total, abs=1e-9)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_the_two_agree_where_no_token_depends_on_another_and_at_the_ends():
    alone, worth = normal(some(0, (4,))), some(1, (4,))
    ref = alone[:, None, None] + alone[None, :, None] + alone[None, None, :]
    reward = worth[:, None, None] + worth[None, :, None] + worth[None, None, :]
    aligned = optimum(ref, reward, 0.5)
    for lam in (-1.0, 0.0, 0.3, 1.0, 3.0):
        torch.testing.assert_close(per_token(ref, [aligned], lam), optimum(ref, lam * reward, 0.5), rtol=0, atol=1e-10)
    ref, reward = normal(some(2, (3, 3, 3))), some(3, (3, 3, 3))
    aligned = optimum(ref, reward, 0.5)
    torch.testing.assert_close(per_token(ref, [aligned], 0.0), ref, rtol=0, atol=1e-12)
    torch.testing.assert_close(per_token(ref, [aligned], 1.0), aligned, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lam", [0.25, 0.5, 2.0])
def test_the_distance_falls_with_the_fourth_power_of_beta(lam):
    """It is second order in r/β, and KL is second order in it. So weak alignment is safe, strong is not."""
    ref, reward = normal(some(4, (3, 3, 3))), some(5, (3, 3, 3))

    def apart(beta: float) -> float:
        return kl(optimum(ref, lam * reward, beta), per_token(ref, [optimum(ref, reward, beta)], lam))

    assert apart(1.0) > 1e-5
    for beta in (32.0, 64.0):
        assert apart(beta) / apart(2 * beta) == pytest.approx(16, rel=0.15)


def test_regret_is_paired_by_prompt():
    rng = np.random.default_rng(0)
    prompts = np.tile(np.arange(30), 2)
    hard = rng.normal(0, 10, 30)[prompts]  # what prompts have in common says nothing about the two
    one = {"prompts": prompts.tolist(), "rewards": (hard + 1).tolist()}
    two = {"prompts": prompts.tolist(), "rewards": (hard + rng.normal(0, 0.1, 60)).tolist()}
    mean, (low, high) = regret(one, two)
    assert low < 1 < high
    assert low < mean < high
    assert high - low < 0.2


def test_a_model_that_was_retrained_into_the_mixture_is_no_distance_from_it():
    """At λ=1 the retrained model is the pair's own, so exact and merged must be it, and the second seed must not."""
    from transformers import AutoModelForCausalLM

    from dera_merge import ModelPair
    from dera_merge.measuring.retraining import agreement

    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    same, other = pair.merged(1.0), AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32)
    (row,) = agreement(pair, {1.0: same}, demo.prompts()[:16], demo.reward, second=other, max_new_tokens=16)
    apart = {name: each["kl"] for name, each in row["from_retrained"].items()}
    assert max(apart["exact"], apart["aligned"], apart["merged"]) < 1e-6 < 0.03 < apart["second"]
    assert apart["ref"] == pytest.approx(apart["second"], rel=1e-6)
    kinds = row["kinds"]
    assert kinds["retrained"]["rewards"] == kinds["exact"]["rewards"] == kinds["merged"]["rewards"]
    assert abs(kinds["second"]["kl"]) < 1e-6 < 0.1 < kinds["exact"]["kl"]


SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str, *arguments: object) -> str:
    command = [sys.executable, SCRIPTS / name, *arguments]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.slow
def test_the_authors_demonstration_runs_on_the_demo_pair():
    said = script("zephyr_demo.py", demo.REF, demo.ALIGNED_LORA, "--full-precision", "--new-tokens", 16)
    answers = said.split("λ = ")[1:]
    assert [answer.split("\n")[0] for answer in answers] == ["0", "0.167", "0.667", "1", "3", "10"]
    assert all(answer.split("\n")[1].strip() for answer in answers)
    assert len({answer.split("\n")[1] for answer in answers}) > 2


@pytest.mark.slow
def test_the_study_trains_compares_and_goes_on_where_it_broke_off(tmp_path):
    said = script("study_retraining.py", "demo", "--preset", "tiny", "--objectives", "length", "-o", tmp_path)
    (result,) = json.loads((tmp_path / "agreement.json").read_text())
    assert [row["lambda"] for row in result["rows"]] == [0.25, 0.5, 1, 2, 4]
    assert all({"retrained", "exact", "merged", "calibrated"} <= row["kinds"].keys() for row in result["rows"])
    assert "second" in result["rows"][2]["from_retrained"]
    assert "Two trainings at β₀ are" in said
    assert (tmp_path / "agreement.png").is_file()
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
    again = script("study_retraining.py", "demo", "--preset", "tiny", "--objectives", "length", "-o", tmp_path)
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("adapter_model.safetensors")}
    assert again.rsplit("\n", 2)[0] == said[said.index("**length**") :].rsplit("\n", 2)[0]


@pytest.mark.slow
def test_models_that_somebody_trained_are_compared_by_their_directories(tmp_path):
    said = script(
        "study_retraining.py", "pair", demo.REF, demo.ALIGNED_LORA, "--beta", 0.1, "--retrained", f"0.2={demo.ALIGNED_DENSE}",
        "--second", demo.ALIGNED_LORA, "--prompts", demo.FOLDER / "prompts.jsonl", "--reward", "lexicon", "--tokens", 16,
        "-o", tmp_path,
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "agreement.json").read_text())
    assert [row["lambda"] for row in result["rows"]] == [0.5, 1]
    assert result["rows"][1]["from_retrained"]["second"]["kl"] < 1e-6
    assert "| 0.5 | 2 |" in said
