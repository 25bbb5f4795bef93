"""λ chosen by a target: a KL, a length, or the least cost at nearly the reward of λ=1."""

import json

import numpy as np
import pytest
import torch
from commands import run
from hypothesis import given
from hypothesis import strategies as st

from dera_merge import DeraError, ModelPair, Reward, demo, sweep
from dera_merge.choosing.targets import Estimates, Hit, Keep, crossing, goal

PROMPTS = [f"w{n} w{n + 1} w{n + 2}" for n in range(5, 13)]
HOW = {"max_new_tokens": 6, "samples": 2, "check": False, "merged": False}


@pytest.fixture(scope="module")
def pair(llama, lora):
    base = llama(0, dtype=torch.float32)
    return ModelPair.from_pretrained(base, lora(base))


# The rules, on figures that are made up


FIGURES = st.floats(-5, 5).map(lambda value: round(value, 9))  # as figures are, far from the smallest numbers there are


@given(st.lists(FIGURES, min_size=2, max_size=9), FIGURES)
def test_a_curve_is_followed_to_where_it_has_a_value_or_comes_nearest(values, wanted):
    lams, values = np.linspace(0, 2, len(values)), np.array(values)
    lam, met = crossing(lams, values, wanted)
    assert met == (values.min() <= wanted <= values.max())
    reached = np.interp(lam, lams, values)
    dense = np.interp(np.linspace(0, 2, 4001), lams, values)
    assert abs(reached - wanted) <= np.abs(dense - wanted).min() + 1e-6
    if met:  # no other place that has it is much nearer to 1
        there = np.linspace(0, 2, 4001)[:-1][np.diff(np.sign(dense - wanted)) != 0]
        assert abs(lam - 1) <= np.abs(there - 1).min(initial=1.0) + 1e-3


def made(rewards: np.ndarray, lengths: np.ndarray, seed: int = 0, ess: float = 1.0) -> Estimates:
    """Estimates of prompts' rewards and lengths, (prompts, 5), at λ = 0, 0.5, …, 2, every prompt resampled for all at once."""
    dice = np.random.default_rng(seed)
    draws = dice.integers(len(rewards), size=(800, len(rewards)))
    columns = {"reward": (rewards.mean(0), rewards[draws].mean(1)), "length": (lengths.mean(0), lengths[draws].mean(1))}
    one = 2
    columns["kept"] = tuple(values / values[..., [one]] for values in columns["reward"])
    return Estimates([0.0, 0.5, 1.0, 1.5, 2.0], np.full(5, ess), columns)


def test_a_share_is_kept_only_where_its_lower_bound_says_so():
    """Of two λ that keep 98 % on average the shorter one is taken where that is sure, prompt by prompt, and not else."""
    dice = np.random.default_rng(1)
    ability = dice.normal(5, 2, (200, 1))  # prompts differ far more than λ do
    lengths = np.array([10.0, 20.0, 40.0, 30.0, 5.0]) + dice.normal(0, 1, (200, 5))
    sure = ability * np.array([0.5, 0.995, 1.0, 1.0, 0.3]) + dice.normal(0, 0.05, (200, 5))
    picked = Keep(0.98).pick(made(sure, lengths))
    assert picked.lam == 0.5
    assert picked.met
    assert picked.target["keeping"] == [0.5, 1.0, 1.5]
    assert picked.target["saved"] == pytest.approx(0.5, abs=0.02)
    noisy = sure + np.array([0, 1, 0, 0, 0]) * dice.normal(0, 4, (200, 5))
    assert made(noisy, lengths).columns["kept"][0][1] > 0.93
    assert Keep(0.98).pick(made(noisy, lengths)).lam == 1.5
    alone = ability * np.array([0.5, 0.9, 1.0, 0.9, 0.3])
    left = Keep(0.98).pick(made(alone, lengths))
    assert (left.lam, left.met) == (1.0, False)


def test_a_share_of_nothing_is_not_kept():
    dice = np.random.default_rng(1)
    found = Keep(0.98).pick(made(dice.normal(0, 1, (50, 5)), np.ones((50, 5))))
    assert (found.lam, found.met) == (1.0, False)
    assert found.target["of_ci"][0] < 0
    with pytest.raises(DeraError, match="too few texts"):
        Keep(0.98).pick(made(np.ones((50, 5)), np.ones((50, 5)), ess=0.1))


def test_anchors_go_where_the_choice_is_made():
    lengths = np.tile([10.0, 20.0, 40.0, 30.0, 5.0], (50, 1))
    few = made(np.ones((50, 5)), lengths, ess=0.5)
    assert Hit("length", 25.0).next(few) == 0.5, "the nearest of the grid to 0.625, where the texts are read already"
    assert Keep(0.9).next(few) == 2.0, "it takes the fewest tokens, and may keep its share"
    assert Hit("length", 25.0).next(made(np.ones((50, 5)), lengths)) is None
    assert Keep(0.9).next(made(np.ones((50, 5)), lengths)) is None


@pytest.mark.parametrize(
    ("asked", "why"),
    [((0.1, 20.0, None), "give one of"), ((None, None, 0.98), "nothing to choose by"), ((None, None, None), "nothing to choose by"),
     ((-1.0, None, None), "above 0"), ((None, float("nan"), None), "above 0")],
)  # fmt: skip
def test_targets_that_make_no_sense_are_refused(asked, why):
    with pytest.raises(DeraError, match=why):
        goal(*asked, "tokens", 0, [0.0, 2.0])
    with pytest.raises(DeraError, match="at most 1"):
        goal(None, None, 1.5, "tokens", 1, [0.0, 2.0])
    with pytest.raises(DeraError, match="span 1"):
        goal(None, None, 0.9, "tokens", 1, [0.0, 0.5])


# Sweeps


@pytest.mark.core
def test_a_kl_is_hit_without_a_reward(pair, tmp_path):
    """The λ that is found has that KL when texts are sampled there; nothing else is needed to choose by."""
    how = {**HOW, "samples": 16}
    found = sweep(pair, PROMPTS, lams=[0.0, 1.5], target_kl=0.3, **how, out=tmp_path)
    target, lam = found.best["target"], found.best["lambda"]
    assert target["met"]
    assert target["reached"] == pytest.approx(0.3, rel=0.02)
    assert found.best["kl"] == pytest.approx(target["reached"] * found.best["length"])
    assert 0 < found.best["interval"][0] <= lam <= found.best["interval"][1]
    assert found.commands
    assert not {"reward", "wins_ref", "gain", "kept"} & found.curve[0].keys()
    (direct,) = sweep(pair, PROMPTS, lams=[lam], target_kl=0.3, **{**how, "reweight": False}, seed=5).curve
    assert direct["kl_token"] == pytest.approx(0.3, abs=0.06)
    # The same texts answer another question, and a target beyond the range is told of.
    far = sweep(pair, PROMPTS, lams=[0.0, 1.5], target_kl=9.0, **how, out=tmp_path, resume=True, budget=1)
    assert far.best["target"] | {"reached": 0, "reached_ci": 0, "known_to": 0} == {
        "by": "kl", "column": "kl_token", "value": 9.0, "met": False, "known_from": 0.0, "known_to": 0, "reached": 0, "reached_ci": 0}  # fmt: skip
    assert far.best["lambda"] == 1.5
    assert far.commands == []


def test_a_lambda_between_those_of_the_grid_has_no_text_read_again(pair, monkeypatch):
    """What both models made of a text is kept: another λ costs sums over the vocabulary alone, and says the same."""
    from dera_merge.choosing import sampler

    read, reading, summing = [], sampler.trace_of, sampler.densities
    summed = []
    monkeypatch.setattr(sampler, "trace_of", lambda model, texts, **how: read.append(len(texts)) or reading(model, texts, **how))
    monkeypatch.setattr(sampler, "densities", lambda *args: summed.append(len(args[2])) or summing(*args))
    found = sweep(pair, PROMPTS, lams=[0.0, 1.5], target_kl=0.3, **HOW)
    texts = sum(point["texts"] for point in found.points)
    assert sum(read) == 2 * texts, "each model reads each text once"
    assert summed[-1] == 1, "and at the λ that was found, nothing but that λ"
    monkeypatch.setattr(sampler, "KEPT", 0)
    forgetful = sweep(pair, PROMPTS, lams=[0.0, 1.5], target_kl=0.3, **HOW)
    assert sum(read) > 4 * texts
    assert forgetful.best["lambda"] == found.best["lambda"]
    assert forgetful.best["target"]["reached"] == pytest.approx(found.best["target"]["reached"], rel=1e-6)


def test_the_fewest_tokens_at_nearly_the_reward_of_the_aligned_model(pair):
    """A reward of 1 for every text: every λ keeps it, and the shortest texts win; nothing is kept of a reward that is cut."""
    same = [Reward("same", lambda texts: [1.0 for _ in texts])]
    found = sweep(pair, PROMPTS, same, [0.0, 2.0], keep=0.98, **HOW)
    known = [row for row in found.curve if row["known"]]
    assert found.best["length"] == min(row["length"] for row in known)
    assert found.best["target"]["keeping"] == [row["lambda"] for row in known]
    assert found.commands or found.best["lambda"] == 1.0, "rewards that are all one leave the choice to the tokens"
    tokens = [Reward("tokens", lambda texts: [float(len(text.ids)) for text in texts])]
    kept = sweep(pair, PROMPTS, tokens, [0.0, 2.0], keep=1.0, **HOW)
    assert kept.best["lambda"] == 1.0 or kept.best["target"]["reached_ci"][0] >= 1


def test_the_command_line_hits_a_length_and_says_where_it_cannot(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in demo.prompts("validation")[:4]))
    words = ["sweep", demo.REF, demo.ALIGNED_LORA, "--prompts", prompts, "--max-new-tokens", 24, "--no-merged", "--budget", 1]
    done = run(*words, "--target-length", 1000, "-o", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "No λ has 1000 tokens on average" in done.stdout
    assert "reach the limit of 24 tokens" in done.stdout
    assert "To ship it" not in done.stdout
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert page.count("<svg") == 3
    assert "asked for" in page
    for wrong in ([], ["--keep", 0.9], ["--target-kl", 1, "--target-length", 9], ["--target-kl", 1, "--minimise", "kl"]):
        assert run(*words, *wrong, "-o", tmp_path / "wrong").returncode == 2
    assert not (tmp_path / "wrong").exists()


def test_a_reward_that_is_always_0_ends_in_a_report_that_says_so(pair, tmp_path):
    zero = [Reward("zero", lambda texts: [0.0 for _ in texts])]
    found = sweep(pair, PROMPTS, zero, [0.0, 1.0], keep=0.98, **HOW)
    found.save(tmp_path)
    assert not found.best["target"]["met"]
    assert "λ = 1 does not surely earn more than 0" in (tmp_path / "sweep.md").read_text()
