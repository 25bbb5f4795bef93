"""Choosing λ: what is estimated from texts of a few λ, and what a sweep makes of it."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import VOCAB, tiny_llama
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st

from dera_merge import DeraError, ModelPair, Reward, demo, load_reward, sweep
from dera_merge.choosing.answers import read_scored
from dera_merge.measuring.divergence import densities
from dera_merge.measuring.traces import Text, trace_of
from dera_merge.statistics.reweighting import Pool, interval

PROMPTS = [f"w{n} w{n + 1} w{n + 2}" for n in range(5, 13)]


def evens(text: str) -> float:
    """How many words have an even number."""
    return float(sum(int(word[1:]) % 2 == 0 for word in text.split() if word[1:].isdigit()))


@pytest.fixture(scope="module")
def pair(llama, lora):
    base = llama(0, dtype=torch.float32)
    return ModelPair.from_pretrained(base, lora(base))


# The estimator, where every text can be written down


class Enumerated:
    """Two conditional distributions over texts of two tokens out of three, and exact DeRa of them, for some prompts."""

    def __init__(self, seed: int, prompts: int) -> None:
        dice = np.random.default_rng(seed)
        first, then = dice.normal(size=(2, prompts, 3)), dice.normal(size=(2, prompts, 3, 3))
        self.log = [(_log_softmax(first[m]), _log_softmax(then[m])) for m in range(2)]
        self.values = dice.normal(size=(prompts, 9))
        self.dice = dice

    def logp(self, lam: float) -> np.ndarray:
        """log π_λ of each of the nine texts, (prompts, 9): each token from a mixture normalised by itself."""
        parts = [_log_softmax((1 - lam) * a + lam * b) for a, b in zip(*self.log, strict=True)]
        return (parts[0][:, :, None] + parts[1]).reshape(len(self.values), 9)

    def truth(self, lam: float) -> float:
        return float((np.exp(self.logp(lam)) * self.values).sum(1).mean())

    def pool(self, grid, anchors, samples) -> tuple[Pool, np.ndarray]:
        logs = {lam: self.logp(lam) for lam in grid}
        rows, drawn, prompts, values = [], [], [], []
        for anchor, prompt in itertools.product(anchors, range(len(self.values))):
            p = np.exp(logs[anchor][prompt])
            for text in self.dice.choice(9, size=samples, p=p / p.sum()):
                rows.append([logs[lam][prompt, text] for lam in grid])
                drawn.append(grid.index(anchor))
                prompts.append(prompt)
                values.append(self.values[prompt, text])
        return Pool(np.array(grid), np.array(rows), np.array(drawn), np.array(prompts)), np.array(values)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, -1)[..., None]


def test_intervals_hold_what_is_true_of_the_prompts_at_hand():
    """Over many draws: the estimate's error is inside its interval nearly always, at anchors, between and beyond them."""
    grid, hits, errors = [0.0, 0.3, 0.5, 0.8, 1.0, 1.4], [], []
    for seed in range(60):
        world = Enumerated(seed, prompts=30)
        pool, values = world.pool(grid, [0.0, 0.5, 1.0], samples=4)
        mean, draws = pool.mean(values)
        low, high = interval(draws)
        truth = np.array([world.truth(lam) for lam in grid])
        hits.append((low <= truth) & (truth <= high))
        errors.append(mean - truth)
    assert np.mean(hits, axis=0).min() > 0.9
    assert np.abs(np.mean(errors, axis=0)).max() < 0.02, "no λ is off on average"


@given(st.integers(0, 2**31), st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=4, unique=True))
@settings(max_examples=40, deadline=None)
def test_weights_are_those_of_the_balance_heuristic(seed, anchors):
    grid = [0.0, 0.25, 0.5, 1.0, 2.0]
    world = Enumerated(seed, prompts=3)
    pool, _ = world.pool(grid, anchors, samples=2)
    for text in range(len(pool.drawn)):
        mixture = np.mean([np.exp(pool.logp[text, grid.index(a)]) for a in anchors])
        assert pool.weights[text] == pytest.approx(np.exp(pool.logp[text]) / mixture)
    assert pool.ess.max() <= len(anchors) * 2 + 1e-9


def test_wins_are_counted_over_pairs_of_independent_texts():
    grid = [0.0, 1.0]
    world = Enumerated(3, prompts=400)
    pool, values = world.pool(grid, grid, samples=4)
    p, q = np.exp(world.logp(1.0)), np.exp(world.logp(0.0))
    beats = (world.values[:, :, None] > world.values[:, None, :]) + 0.5 * (world.values[:, :, None] == world.values[:, None, :])
    truth = np.einsum("ni,nij,nj->n", p, beats, q).mean()
    wins, draws = pool.wins(values, 0)
    low, high = interval(draws)[:, 1]
    assert low <= truth <= high
    assert wins[0] == pytest.approx(0.5, abs=0.03)


@torch.no_grad()
def test_densities_are_those_of_the_mixed_logits():
    ref, aligned = (tiny_llama(seed) for seed in (0, 1))
    texts = [Text(n, torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(n)).tolist(), 5) for n in range(3)]
    tokens = torch.tensor([token for text in texts for token in text.completion])
    lams = [-0.5, 0.0, 0.4, 1.0, 3.0]
    logp, kl = densities([trace_of(ref, texts), trace_of(aligned, texts)], tokens, lams, VOCAB)
    row = 0
    for text in texts:
        ids = torch.tensor([text.ids])
        a, b = (model(ids).logits[0].double() for model in (ref, aligned))
        for place in range(text.start, len(text.ids)):
            for column, lam in enumerate(lams):
                p = torch.log_softmax((1 - lam) * a[place - 1] + lam * b[place - 1], -1)
                assert logp[row, column] == pytest.approx(float(p[text.ids[place]]), abs=1e-4)
                expected = float((p.exp() * (p - torch.log_softmax(a[place - 1], -1))).sum())
                assert kl[row, column] == pytest.approx(expected, abs=1e-4)
            row += 1


# Sweeps


HOW = {"max_new_tokens": 6, "samples": 2, "check": False, "anchors": [0.0, 1.0, 2.0]}


@pytest.mark.core
def test_a_sweep_finds_the_lambda_that_direct_sampling_finds(pair):
    """The reward of the curve at λ that were not sampled, against texts sampled there."""
    reward = [Reward("evens", lambda texts: [evens(text) for _, text in texts])]
    curve = sweep(pair, PROMPTS, reward, [0.0, 2.0], **{**HOW, "samples": 24}, merged=False, budget=1)
    direct = sweep(pair, PROMPTS, reward, [0.25, 0.75, 1.5], **{**HOW, "samples": 24, "anchors": None}, reweight=False, merged=False)
    inside = 0
    for point in direct.points:
        row = next(row for row in curve.curve if row["lambda"] == point["lambda"])
        inside += row["known"] and row["reward_ci"][0] - 0.15 <= point["reward"] <= row["reward_ci"][1] + 0.15
    assert inside == 3
    assert [row["lambda"] for row in direct.curve] == [0.25, 0.75, 1.5]
    assert curve.best["reward"] == max(row["reward"] for row in curve.curve if row["known"])
    low, high = curve.best["interval"]
    assert low <= curve.best["lambda"] <= high


def test_an_anchor_goes_where_the_answer_needs_it(pair):
    """With anchors at the ends of a wide range alone, the middle is not known; a budget puts an anchor where it may be best."""
    reward = [load_reward("length")]
    how = {**HOW, "anchors": [0.0, 4.0], "max_new_tokens": 16, "merged": False}
    few = sweep(pair, PROMPTS, reward, [0.0, 4.0], **how, budget=2 * 2 * len(PROMPTS))
    more = sweep(pair, PROMPTS, reward, [0.0, 4.0], **how, budget=4 * 2 * len(PROMPTS))
    assert few.settings["anchors"] == [0.0, 4.0]
    assert 2 < len(more.settings["anchors"]) <= 4
    assert {0.0, 4.0} < set(more.settings["anchors"])
    assert len(more.answers) <= 4 * 2 * len(PROMPTS)


def test_an_interrupted_sweep_goes_on_where_it_was(pair, tmp_path):
    reward = [Reward("evens", lambda texts: [evens(text) for _, text in texts])]
    whole = sweep(pair, PROMPTS, reward, [0.0, 2.0], **HOW, out=tmp_path / "whole")
    lines = (tmp_path / "whole" / "texts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "texts.jsonl").write_text("".join(lines[:20]) + lines[20][:30])
    scored = []
    counting = [Reward("evens", lambda texts: [scored.append(text) or evens(text) for _, text in texts])]
    again = sweep(pair, PROMPTS, counting, [0.0, 2.0], **HOW, out=tmp_path / "half", resume=True)
    assert again.to_dict() == whole.to_dict()
    assert len(scored) == len(lines) - 20
    with pytest.raises(DeraError, match="another call"):
        sweep(pair, PROMPTS[:4], reward, [0.0, 2.0], **HOW, out=tmp_path / "half", resume=True)


def test_texts_that_were_scored_before_give_the_same_curve(pair, tmp_path):
    reward = [Reward("evens", lambda texts: [evens(text) for _, text in texts])]
    whole = sweep(pair, PROMPTS, reward, [0.0, 2.0], **HOW, out=tmp_path, merged=False, budget=1)
    scored = read_scored(tmp_path / "texts.jsonl")

    def never(texts):
        raise AssertionError("nothing is scored again")

    again = sweep(pair, PROMPTS, [Reward("evens", never)], [0.0, 2.0], **HOW, scored=scored)
    for one, other in zip(whole.curve, again.curve, strict=True):
        assert one["reward"] == pytest.approx(other["reward"])
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": PROMPTS[n % 8], "completion": "w4 w6 w8", "from": ("ref", "aligned")[n % 2], "reward": n} for n in range(16)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mine = sweep(pair, PROMPTS, [load_reward("length")], [0.0, 1.0], **HOW, scored=read_scored(file))
    assert {point["lambda"] for point in mine.points} == {0.0, 1.0}
    for bad in ('{"prompt": "w5", "completion": "w4", "reward": 1}', '{"prompt": "w5", "lambda": 1}', "[]", "{", ""):
        file.write_text(bad + "\n")
        with pytest.raises(DeraError, match="mine.jsonl"):
            read_scored(file)


def test_a_reward_that_fails_is_tried_again_and_counted(pair):
    tries = []

    def fragile(text: str) -> float:
        tries.append(text)
        if text.startswith("w4") or len(text) % 3 == 0:
            raise RuntimeError("no")
        return evens(text)

    with pytest.warns(UserWarning, match="failed on"):
        result = sweep(pair, PROMPTS, [Reward("fragile", lambda texts: [fragile(text) for _, text in texts])], [0.0, 2.0], **HOW)
    failed = sum(point["failed"] for point in result.points if point["mode"] == "exact")
    assert result.settings["failed"] == failed > 0
    assert max(map(tries.count, set(tries))) >= 2
    with pytest.raises(DeraError, match="broken fails on every text: ZeroDivisionError"):
        sweep(pair, PROMPTS, [Reward("broken", lambda texts: [1 / 0 for _ in texts])], [0.0, 2.0], **HOW)


def test_several_rewards_give_a_weighted_choice_and_a_front(pair):
    from dera_merge.pages.frame import read
    from dera_merge.pages.sweep import pareto

    rewards = [Reward("evens", lambda texts: [evens(text) for _, text in texts]), load_reward("length")]
    result = sweep(pair, PROMPTS, rewards, [0.0, 2.0], **HOW, weights=[1.0, -0.5], merged=False)
    for row in result.curve:
        assert row["reward"] == pytest.approx(row["evens"] - 0.5 * row["length_reward"])
        assert row["length"] != row["length_reward"], "tokens, and words"
    front, known = pareto(read(result.to_dict())), [row for row in result.curve if row["known"]]
    assert front
    for lam in front:
        row = next(row for row in known if row["lambda"] == lam)
        assert not any(o["evens"] > row["evens"] and o["length_reward"] < row["length_reward"] for o in known), "its weight is negative"


def test_the_merged_model_has_a_curve_of_its_own(pair):
    result = sweep(pair, PROMPTS, [load_reward("length")], [0.0, 2.0], **HOW)
    merged = [point for point in result.points if point["mode"] == "merged"]
    assert merged
    assert all(point["kl"] > 0 for point in merged)
    assert {point["lambda"] for point in merged}.isdisjoint({0.0, 1.0})


def test_the_merged_model_alone_earns_what_it_earns_beside_exact_dera(pair):
    """Under the same noise its texts are the same, whoever asks."""
    lams, how = [0.0, 0.5, 2.0], {**HOW, "anchors": None}
    alone = sweep(pair, PROMPTS, [load_reward("length")], lams, **how, mode="merged")
    beside = sweep(pair, PROMPTS, [load_reward("length")], lams, **how, reweight=False)
    ours, theirs = ({p["lambda"]: p for p in found.points if p["mode"] == "merged"} for found in (alone, beside))
    assert ours.keys() == {0.0, 0.5, 2.0}
    for lam in (0.5, 2.0):
        assert ours[lam] == theirs[lam]
    for row in alone.curve:
        assert row["reward"] == pytest.approx(ours[row["lambda"]]["reward"])
        assert row["kl"] == pytest.approx(ours[row["lambda"]]["kl"])
    with pytest.raises(DeraError, match="leave out --mode merged"):
        sweep(pair, PROMPTS, [load_reward("length")], lams, **how, mode="merged", scored=[{}])


def test_texts_that_were_drafted_stand_for_exact_dera(pair):
    """Their mean agrees with batches of exact DeRa's within the noise of both, at an λ where the draft's own does not."""
    how = {**HOW, "samples": 24, "max_new_tokens": 4, "anchors": [2.0], "reweight": False}
    found = {
        mode: sweep(pair, PROMPTS[:8], [Reward("evens", lambda texts: [evens(text) for _, text in texts])], [2.0], **how, mode=mode)
        for mode in ("exact", "speculative")
    }
    earned = {mode: np.array([a.rewards["evens"] for a in result.answers if a.mode == "exact"]) for mode, result in found.items()}
    assert len(earned["speculative"]) == len(earned["exact"])
    error = np.sqrt(sum(each.var() / len(each) for each in earned.values()))
    assert abs(earned["exact"].mean() - earned["speculative"].mean()) < 3.5 * error
    assert [a.ids for a in found["exact"].answers] != [a.ids for a in found["speculative"].answers]


def test_a_coefficient_of_training_is_divided_by_lambda(llama, tmp_path):
    import shutil

    shutil.copytree(llama(1), tmp_path / "aligned")
    (tmp_path / "aligned" / "dpo_config.json").write_text('{"beta": 0.1, "learning_rate": 1e-6}')
    opened = ModelPair.from_pretrained(llama(0), tmp_path / "aligned")
    result = sweep(opened, PROMPTS, [load_reward("length")], [0.5, 1.5], **{**HOW, "anchors": None})
    assert result.best["beta"] == 0.1
    assert result.best["equivalent_beta"] == pytest.approx(0.1 / result.best["lambda"])


# Rewards


@pytest.mark.core
def test_commands_and_functions_and_models_are_rewards(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    texts = [("ask", "good good"), ("ask more", "bad")]
    (tmp_path / "mine.py").write_text("def one(text): return len(text)\ndef two(prompt, text): return len(prompt) * 100 + len(text)\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("mine:one").score(texts) == [9.0, 3.0]
    assert load_reward("mine:two").score(texts) == [309.0, 803.0]
    assert load_reward("length").score(texts) == [2.0, 1.0]
    program = "import sys, json\nfor line in sys.stdin: print(len(json.loads(line)['completion']))"
    (tmp_path / "program.py").write_text(program)
    assert load_reward(f"command:{sys.executable} program.py").score(texts) == [9.0, 3.0]
    words = {"[PAD]": 0, "[UNK]": 1, "ask": 2, "more": 3, "good": 4, "bad": 5}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = load_reward("model:./model#POSITIVE").score(texts)
    for (prompt, text), value in zip(texts, found, strict=True):
        logits = model(**tokenizer(f"{prompt}\n{text}", return_tensors="pt")).logits
        assert value == pytest.approx(float(logits.log_softmax(-1)[0, 1].detach()), abs=1e-4)
    with pytest.raises(DeraError, match="2 labels"):
        load_reward("model:./model")


@pytest.mark.parametrize("spec", ["nothing", "no.such:thing", "json:nothing", "json:__name__", "model:./none", ""])
def test_a_reward_that_is_none_is_refused(spec):
    with pytest.raises(DeraError):
        load_reward(spec)


# The command line


@pytest.mark.core
def test_the_command_line_sweeps_the_demo_pair_and_writes_a_page(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in demo.prompts("validation")[:4]))
    words = ["sweep", demo.REF, demo.ALIGNED_LORA, "--prompts", prompts, "--reward", "lexicon", "--max-new-tokens", 32]
    done = run(*words, "-o", tmp_path / "out", "--beta", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == result
    lam = result["best"]["lambda"]
    assert result["best"]["equivalent_beta"] == (pytest.approx(0.1 / lam) if lam else None)
    assert result["faithful"] is None or result["faithful"]["verdict"]
    shipping = " ".join(result["commands"])
    assert f"--approx {tmp_path}/out-merged --prompts {prompts} -o {tmp_path}/out-report" in shipping
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert not any(word in page for word in ("<script", "<link", "src=", 'href="http', "@import", "url(http"))
    assert page.count("<svg") == 5
    assert "nan" not in (tmp_path / "out" / "sweep.md").read_text().lower()
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    said = run(*words, "-o", tmp_path / "again", "--from-scored", tmp_path / "out" / "texts.jsonl")
    assert said.returncode == 0, said.stderr
    assert "earns most" in said.stdout
    nothing = run(*words[:-1], 4, "-o", tmp_path / "nothing")  # four tokens hold no word of praise
    assert "tell no λ apart" in nothing.stdout
    assert "To ship it" not in nothing.stdout
    for wrong in (["--weights", "x"], ["--weights", "1,2"], ["--beta", "0"], ["--anchors", "x"]):
        assert run(*words, "-o", tmp_path / "wrong", *wrong).returncode == 2
    refused = run(*words[:4], "--prompts", prompts, "--reward", "nothing", "-o", tmp_path / "wrong")
    assert refused.returncode == 2 or "no reward" in refused.stderr
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(tmp_path):
    """The same texts, rewards and curve, whoever sampled and read what; one file of texts."""
    prompts = tmp_path / "validation.jsonl"
    prompts.write_text("\n".join((demo.FOLDER / "validation.jsonl").read_text().splitlines()[:9]))
    command = ["sweep", demo.REF, demo.ALIGNED_LORA, "--prompts", prompts, "--reward", "length", "--max-new-tokens", 8, "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "dera_merge"]  # fmt: skip
    found = []
    for start, out in (([sys.executable, "-m", "dera_merge"], "one"), (launch, "two")):
        words = [*start, *command, "-o", tmp_path / out]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / out / "texts.jsonl").read_text().splitlines()[1:]
        found.append((json.loads(done.stdout), sorted(lines)))
    (one, texts), (two, others) = found
    assert texts == others
    for ours, theirs in zip(one["curve"], two["curve"], strict=True):
        for key in ("lambda", "reward", "kl", "ess"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-8)
