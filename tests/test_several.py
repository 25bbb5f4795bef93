"""Several aligned models: h_ref + Σ λ_k·(h_k - h_ref), and θ_ref + Σ λ_k·Δ_k, with λ a vector.

Oracles: PEFT's unmerged forward of each adapter, mixed in float64 here; merges of one aligned model; transformers' generate.
"""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from builders import VOCAB, weights
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraForCausalLM, DeraWarning, ModelPair, Reward, compare, sweep
from dera_merge.files.checkpoint import Checkpoint
from dera_merge.lambdas import Vector, folder_name, is_end, parse_lambdas
from dera_merge.statistics.summary import log_ratio

VECTORS = [(0.5, 0.25), (-0.5, 2.0), (1.0, 1.0), (0.0, 0.7)]


@pytest.fixture(scope="module")
def three(llama, lora):
    """A base, two adapters on it (one with a norm trained whole), and a full fine-tune of it; all as directories."""
    base = llama(0, torch.float32)
    adapters = lora(base, 7, target_modules=["q_proj", "down_proj"]), lora(base, 8, r=2, modules_to_save=["norm"])
    return base, *adapters, llama(3, torch.float32, near=0)


def logits_of(base, other, ids):
    model = AutoModelForCausalLM.from_pretrained(base if (other / "adapter_config.json").exists() else other)
    model = PeftModel.from_pretrained(model, other) if (other / "adapter_config.json").exists() else model
    with torch.no_grad():
        return model.eval()(ids).logits.double()


def mixed(base, others, lam, ids):
    """h_ref + Σ λ_k·(h_k - h_ref), float64, from models that transformers and PEFT load."""
    ref = logits_of(base, base, ids)
    return ref + sum(each * (logits_of(base, other, ids) - ref) for each, other in zip(lam, others, strict=True))


@pytest.mark.parametrize("kinds", [(1,), (1, 2), (1, 3), (1, 2, 3)])
def test_the_reference_is_read_once_for_all_aligned_models(three, kinds, tmp_path, monkeypatch):
    """Counted at the file: a merge of several aligned models reads each tensor of REF as often as a merge of one does."""
    base, others = three[0], [three[kind] for kind in kinds]
    pair = ModelPair.from_pretrained(base, others if len(others) > 1 else others[0])
    assert pair.tensors  # binding an adapter looks at what it brings
    reads: dict[str, int] = {}
    original = Checkpoint.read

    def read(self, name, *args, **kwargs):
        if self.folder == base:
            reads[name] = reads.get(name, 0) + 1
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", read)
    pair.merge(tmp_path / "out", [0.5 if len(others) == 1 else [0.5] * len(others)], dtype="float32")
    assert set(reads.values()) == {1}
    assert reads.keys() == pair.tensors.keys()


@pytest.mark.parametrize("kinds", [(1, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("lam", VECTORS)
def test_exact_logits_are_the_reference_and_each_shift_times_its_lambda(three, kinds, lam):
    base, others = three[0], [three[kind] for kind in kinds]
    ids = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    exact = ModelPair.from_pretrained(base, others).exact(lam)
    assert (exact.rows is not None) == (kinds == (1, 2))
    torch.testing.assert_close(exact(ids).logits.double(), mixed(base, others, lam, ids), rtol=0, atol=2e-4)


def test_two_adapters_and_the_base_are_three_rows_of_one_pass(three):
    base, one, other, _ = three
    exact = ModelPair.from_pretrained(base, [one, other]).exact((0.5, 0.5))
    seen = []
    hook = exact.rows.base_model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"].shape), with_kwargs=True)
    exact.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    hook.remove()
    assert seen == [(6, 3), (6, 1), (6, 1), (6, 1)]
    bytes_of = {p.data_ptr() for model in exact.sides for p in model.parameters() if p.numel() == VOCAB * 32}
    assert len(bytes_of) <= 2, "embedding and head are held once for all sides"


@pytest.mark.core
@pytest.mark.parametrize("kinds", [(1, 2), (1, 3)])
def test_every_sequence_of_a_batch_decodes_at_its_own_vector(three, kinds):
    base, others = three[0], [three[kind] for kind in kinds]
    exact = ModelPair.from_pretrained(base, others).exact()
    assert exact.lam == [0.5, 0.5]
    prompt = torch.tensor([[5, 6, 7]])
    how = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    together = exact.generate(prompt.expand(4, 3), lam=VECTORS, **how)
    for row, lam in zip(together, VECTORS, strict=True):
        ids = prompt
        for _ in range(6):  # by hand, without a cache
            ids = torch.cat([ids, mixed(base, others, lam, ids)[:, -1:].argmax(-1)], 1)
        assert row.tolist() == ids[0].tolist()
        beams = exact.generate(prompt, lam=lam, num_beams=3, **how)
        longhand = exact.generate(prompt, lam=lam, num_beams=3, use_cache=False, **how)
        assert beams.tolist() == longhand.tolist()


def test_what_is_no_vector_for_these_models_is_refused(three):
    base, one, other, _ = three
    pair = ModelPair.from_pretrained(base, [one, other])
    exact = pair.exact()
    for wrong in (0.5, [0.5], [0.1, 0.2, 0.3], [[0.1, 0.2]] * 3, [0.5, math.nan]):
        with pytest.raises(ValueError, match=r"λ|lam"):
            exact.generate(torch.tensor([[5, 6]]), lam=wrong, max_new_tokens=1)
    for wrong in ([0.5], [(0.5, 0.1, 0.2)]):
        with pytest.raises(ValueError, match="2 aligned models"):
            pair.merge("/nonexistent/out", wrong)
    for call in (lambda: pair.merge("/nonexistent/out", [(0.5, 0.5)], path="p"), lambda: pair.export_exact("/nonexistent/out"),
                 lambda: compare(pair, [(0.5, 0.5)], extras=("layers",)), lambda: ModelPair.from_pretrained(base, [])):  # fmt: skip
        with pytest.raises(DeraError, match=r"one aligned model|no aligned model"):
            call()


@pytest.mark.parametrize("kinds", [(1, 2), (1, 3)])
def test_a_merge_is_the_reference_and_each_delta_times_its_lambda(three, kinds, tmp_path):
    base, others = three[0], [three[kind] for kind in kinds]
    ModelPair.from_pretrained(base, others).merge(tmp_path / "out", VECTORS)
    ends = []
    for other in others:
        ModelPair.from_pretrained(base, other).merge(tmp_path / f"end{len(ends)}", [1.0])
        ends.append(weights(tmp_path / f"end{len(ends)}"))
    ref = weights(base)
    for lam in VECTORS:
        merged = weights(tmp_path / "out" / folder_name(Vector(lam)))
        assert merged.keys() == ref.keys()
        for name, tensor in merged.items():
            r = ref[name].double()
            expected = r + sum(each * (end[name].double() - r) for each, end in zip(lam, ends, strict=True))
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_one_model_alone_gives_the_bits_of_its_own_merge(llama, lora, rounding, tmp_path):
    base = llama(0)
    others = lora(base, 7), llama(3, near=0)
    vectors = [(1.0, 0.0), (0.0, 1.0), (0.3, 0.0), (0.0, 1.7), (0.0, 0.0)]
    ModelPair.from_pretrained(base, others).merge(tmp_path / "out", vectors, rounding=rounding)
    for vector in vectors:
        which = int(vector[1] != 0)
        (lam,) = [each for each in vector if each] or [0.0]
        own = tmp_path / f"own{which}{lam}"
        ModelPair.from_pretrained(base, others[which]).merge(own, [lam], rounding=rounding)
        ours, theirs = weights(tmp_path / "out" / folder_name(Vector(vector))), weights(own)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_live_models_dials_and_adapters_agree_with_the_merge(three, tmp_path):
    base, one, other, _ = three
    pair = ModelPair.from_pretrained(base, [one, other])
    ids = torch.tensor([[5, 6, 7, 8]])
    pair.merge(tmp_path / "out", [(0.5, 0.25)])
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    live = pair.merged((1.0, 1.0))
    live.set_lam((0.5, 0.25))
    torch.testing.assert_close(live(ids).logits, expected, rtol=0, atol=1e-5)
    dial = pair.dial()
    both = dial(ids.expand(2, 4), lam=[(0.5, 0.25), (0.0, 0.0)]).logits
    torch.testing.assert_close(both[:1], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1:].double(), logits_of(base, base, ids), rtol=0, atol=1e-5)
    pair.merge(tmp_path / "adapter", [(0.5, 0.25)], format="adapter")
    torch.testing.assert_close(logits_of(base, tmp_path / "adapter", ids), expected.double(), rtol=0, atol=1e-4)


def test_drafts_of_the_merged_model_leave_the_tokens_as_they_are(three):
    base, one, other, _ = three
    exact = ModelPair.from_pretrained(base, [one, other]).exact((0.5, 0.4))
    how = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    from dera_merge import Speculation

    speculation = Speculation()
    drafted = exact.generate(torch.tensor([[5, 6, 7]]), assistant_model=exact.dial(), speculation=speculation, **how)
    assert drafted.tolist() == exact.generate(torch.tensor([[5, 6, 7]]), **how).tolist()
    assert speculation.drafted > 0


def test_a_saved_mixture_of_several_loads_again(three, tmp_path):
    base, one, other, _ = three
    exact = ModelPair.from_pretrained(base, [one, other]).exact((0.5, -0.25))
    exact.save_pretrained(tmp_path / "mixture")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(DeraForCausalLM.from_pretrained(tmp_path / "mixture")(ids).logits, exact(ids).logits)


@pytest.mark.core
def test_compare_measures_what_a_recomputation_in_float64_finds(three):
    base, one, _, full = three
    others, lam = [one, full], (0.6, 0.5)
    prompts = [{"prompt": f"w{n} w{n + 3}", "completion": "w9 w10 w11 w30"} for n in range(5, 9)]
    pair = ModelPair.from_pretrained(base, others)
    report = compare(pair, [lam, (1.0, 0.0)], prompts, dtype="float32", extras=("floor", "ladder"))
    row, end = report.results
    kls, refs, aligned, grams = [], [], [[], []], []
    for prompt in prompts:
        ids = torch.tensor([pair.tokenizer(prompt["prompt"] + " " + prompt["completion"])["input_ids"]])
        log_p = torch.log_softmax(mixed(base, others, lam, ids), -1)[0, 1:5]
        log_q = torch.log_softmax(pair.merged(lam)(ids).logits.double(), -1)[0, 1:5]
        sides = [torch.log_softmax(logits_of(base, side, ids), -1)[0, 1:5] for side in (base, *others)]
        kls.append((log_p.exp() * (log_p - log_q)).sum(-1))
        refs.append((log_p.exp() * (log_p - sides[0])).sum(-1))
        for found, side in zip(aligned, sides[1:], strict=True):
            found.append((log_p.exp() * (log_p - side)).sum(-1))
        ratios = torch.stack([side - sides[0] for side in sides[1:]])
        p = sides[0].exp()
        centred = ratios - (ratios * p).sum(-1, keepdim=True)
        grams.append(torch.stack([torch.stack([(a * b * p).sum(-1) for b in centred]) for a in centred]))
    assert row["kl"] == pytest.approx(float(torch.cat(kls).detach().mean()), rel=1e-2)
    assert row["kl_ref"] == pytest.approx(float(torch.cat(refs).mean()), rel=1e-3)
    each = [float(torch.cat(found).mean()) for found in aligned]
    assert row["kl_each_aligned"] == pytest.approx(each, rel=1e-3)
    assert row["kl_aligned"] == min(row["kl_each_aligned"])
    assert end["kl"] == pytest.approx(0, abs=1e-5)
    assert end["kl_each_aligned"][0] == pytest.approx(0, abs=1e-6)
    g, v = torch.cat(grams, -1).mean(-1).numpy(), np.array(lam)
    assert row["log_ratio"]["sizes"] == pytest.approx(np.sqrt(np.diag(g)).tolist(), rel=1e-3)
    assert row["log_ratio"]["mixed"] == pytest.approx(math.sqrt(v @ g @ v), rel=1e-3)
    assert row["log_ratio"]["scale"] == pytest.approx(math.sqrt(v @ np.diag(g) / (v @ g @ v)), rel=1e-3)
    assert json.loads(json.dumps(report.to_dict()))["results"][0]["lambda"] == [0.6, 0.5]


def test_the_restored_lambda_has_the_mean_size_of_its_parts():
    @given(st.integers(0, 10_000), st.integers(2, 4))
    def check(seed: int, models: int) -> None:
        rng = np.random.default_rng(seed)
        factor, shares = rng.normal(size=(models, 5)), rng.dirichlet(np.ones(models))
        g = factor @ factor.T
        found = log_ratio(g, Vector(shares))
        restored = found["scale"] * shares
        assert restored @ g @ restored == pytest.approx(shares @ np.diag(g))
        assert found["scale"] >= 1 - 1e-9, "averaging never makes a log-ratio larger than its parts"

    check()
    assert log_ratio(np.eye(2), Vector((0.0, 0.0)))["restored"] is None


def test_names_of_vectors_are_read_back():
    number = st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: float(f"{x:g}") + 0.0)

    @given(st.lists(number, min_size=2, max_size=4))
    def check(numbers: list[float]) -> None:
        vector = Vector(numbers)
        assert parse_lambdas([f"{vector:g}"], len(numbers)) == [vector]

    check()
    assert parse_lambdas(["0:1:0.5+0:1:1"], 2) == [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 1.0)]
    for text, models, why in (("0.5", 2, "join as many"), ("0.5+0.25", 1, "one aligned model"), ("1+2+3", 2, "for 3 models")):
        with pytest.raises(ValueError, match=why):
            parse_lambdas([text], models)


def _worth(texts):
    return [float(sum(word in ("w5", "w6", "w7", "w8") for word in text.split())) for _, text in texts]


@pytest.mark.parametrize("reweight", [True, False])
def test_a_sweep_over_vectors_agrees_with_texts_sampled_at_each(three, reweight, tmp_path):
    base, one, other, _ = three
    pair = ModelPair.from_pretrained(base, [one, other])
    prompts = [f"w{n} w{n + 9}" for n in range(5, 25)]
    how = dict(max_new_tokens=4, samples=8, merged=False, check=False)
    grid = parse_lambdas(["0:1:0.5+0:1:0.5"], 2)
    found = sweep(pair, prompts, [Reward("worth", _worth)], grid, reweight=reweight, out=tmp_path, **how)
    assert found.best["lambda"] in grid
    assert len(found.best["interval"]) == 2
    assert found.best["gain_over"] in [(1.0, 0.0), (0.0, 1.0)]
    direct = sweep(pair, prompts, [Reward("worth", _worth)], grid, reweight=False, seed=5, **how)
    means = {point["lambda"]: point for point in direct.points}
    inside = 0
    for row in found.curve:
        low, high = row["reward_ci"]
        a, b = means[row["lambda"]]["reward_ci"]
        inside += low <= b and a <= high
    assert inside >= 8 or not reweight, "of 9 λ"
    again = sweep(pair, prompts, [Reward("worth", _worth)], grid, reweight=reweight, out=tmp_path, resume=True, **how)
    assert again.to_dict() == found.to_dict()
    assert found.save(tmp_path).joinpath("sweep.html").stat().st_size > 10_000


def test_one_revision_for_several_models_is_refused(three):
    base, one, other, _ = three
    with pytest.raises(DeraError, match="id@revision"):
        ModelPair.from_pretrained(base, [one, other], aligned_revision="main")


@pytest.mark.filterwarnings("error:All-NaN")
def test_a_budget_without_weights_is_spent_near_the_best(three):
    """One aligned model: half-way to the neighbours. Several: where optuna proposes, within the box."""
    base, one, other, _ = three
    prompts, worth = [f"w{n} w{n + 9}" for n in range(5, 9)], [Reward("worth", _worth)]
    how = dict(max_new_tokens=3, reweight=False, merged=False, check=False)
    found = sweep(ModelPair.from_pretrained(base, one), prompts, worth, [0.0, 1.0, 2.0], budget=24, **how)
    lams = [row["lambda"] for row in found.curve]
    assert len(lams) == 6
    assert all(any(2 * lam == a + b for a in lams for b in lams if a < lam < b) for lam in set(lams) - {0.0, 1.0, 2.0})
    pair = ModelPair.from_pretrained(base, [one, other])
    found = sweep(pair, prompts, worth, [(0.0, 0.0), (2.0, 1.0)], budget=24, **how)
    assert len(found.curve) == 6
    assert all(0 <= a <= 2 and 0 <= b <= 1 for a, b in (row["lambda"] for row in found.curve))


def test_the_command_line_takes_vectors(three, tmp_path):
    base, one, other, _ = three
    models = [base, one, "--aligned", other]
    done = run("merge", *models, "-l", "0:1:0.5+0.25", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert [entry["lambda"] for entry in written["outputs"]] == [[0, 0.25], [0.5, 0.25], [1, 0.25]]
    assert written["aligned"] == [str(one), str(other)]
    for name in ("lambda-0+0.25", "lambda-0.5+0.25", "lambda-1+0.25"):
        assert json.loads((tmp_path / "out" / name / "dera_merge.json").read_text())["others"][0]["name"] == str(other)
    again = run("merge", *models, "-l", "0:1:0.5+0.25", "-o", tmp_path / "out", "--resume")
    assert again.returncode == 0, again.stderr
    report = run("compare", *models, "-l", "0.5+0.25,1+0.25", "--approx", tmp_path / "out", "-o", tmp_path / "report",
                 "--max-new-tokens", 8, "--max-kl", 100)  # fmt: skip
    assert report.returncode == 0, report.stderr
    assert "0.5+0.25" in (tmp_path / "report" / "report.html").read_text()
    other_pair = run("compare", base, one, "-l", "0.5", "--approx", tmp_path / "out" / "lambda-0.5+0.25", "-o", tmp_path / "r")
    assert other_pair.returncode == 1
    assert "λ=0.5+0.25" in other_pair.stderr
    pushed = run("push", tmp_path / "out", "me/x", "--main", "0.5+0.25", "--dry-run")
    assert pushed.returncode == 0, pushed.stderr
    assert f"--aligned {other}" in pushed.stdout
    texts = [run("generate", *models, "-l", "0.5+0.25", "--prompt", "w5 w6", "--mode", mode, "--json") for mode in ("exact", "speculative")]
    assert json.loads(texts[0].stdout)["token_ids"] == json.loads(texts[1].stdout)["token_ids"]
    assert run("generate", *models, "-l", "0.5", "--prompt", "w5").returncode == 2


@given(st.lists(st.sampled_from([0.0, 1.0, 0.5, -1.0, 2.0]), min_size=1, max_size=3))
def test_an_end_is_the_reference_or_one_aligned_model_alone(numbers):
    lam = numbers[0] if len(numbers) == 1 else Vector(numbers)
    ends = [[0.0] * len(numbers), *([float(k == n) for k in range(len(numbers))] for n in range(len(numbers)))]
    assert is_end(lam) == (numbers in ends)


def test_a_report_does_not_warn_of_the_ends_of_a_vector(three, tmp_path):
    """λ=0+0 is the reference itself, and 0+1 the second aligned model: neither needs to have been measured."""
    pair = ModelPair.from_pretrained(three[0], [three[1], three[2]])
    prompts = [{"prompt": "w5 w6", "completion": " w7 w8 w9"}, {"prompt": "w9", "completion": " w4"}]
    compare(pair, [(5.0, -3.0)], prompts, extras=()).save(tmp_path / "report")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pair.merge(tmp_path / "out", [(0.0, 0.0), (0.0, 1.0), (0.5, 0.0)], report=tmp_path / "report", dtype="float32")
    said = [str(w.message) for w in seen if issubclass(w.category, DeraWarning)]
    assert [line.split(" ")[0] for line in said] == ["λ=0.5+0"]
