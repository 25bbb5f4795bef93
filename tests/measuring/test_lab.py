"""The fidelity lab: each figure beside the divergences, against an independent computation; and that it is not fooled."""

import errno
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from builders import VOCAB, random_path, tiny_llama, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraWarning, ModelPair, Report, compare
from dera_merge.measuring.attribution import attribute
from dera_merge.measuring.laboratory import Compute, Laboratory
from dera_merge.measuring.traces import Text
from dera_merge.measuring.yardstick import quantise
from dera_merge.pages.fidelity import draw_kl
from dera_merge.pages.frame import figure_of
from dera_merge.statistics.prediction import predict, scale
from dera_merge.statistics.summary import summarise
from dera_merge.statistics.verdict import bits_like, verdict
from dera_merge.texts.sampling import sample

PROMPTS = [{"prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(3, 19)]
GIVEN = [{**prompt, "completion": "w7 w8 w9 w10 w11"[: 5 * n or None].strip() or "w7"} for n, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module", params=["dense", "lora"])
def pair(request, llama, lora):
    base = llama(0)
    return ModelPair.from_pretrained(base, llama(1, near=0) if request.param == "dense" else lora(base))


@torch.no_grad()
def log_probs(model, prompt, completion):
    """float64 log-probabilities (tokens, vocabulary) of a completion's places, one text at a time."""
    ids = torch.tensor([prompt + completion])
    return torch.log_softmax(model(ids).logits[0, len(prompt) - 1 : -1].double(), -1)


def encoded(prompts):
    words = tokenizer()
    return [(words(p["prompt"])["input_ids"], words(p["completion"])["input_ids"]) for p in prompts]


# Figures


def test_quantiles_perplexities_and_sequence_figures_are_those_of_an_independent_computation(pair):
    lam = 1.5
    report = compare(pair, [lam], GIVEN, dtype="float32", extras=())
    (result,) = report.results
    ref, aligned, merged = pair.exact().ref, pair.exact().aligned, pair.merged(lam)
    kl, change, chosen, sequences, normalisers = [], [], {"exact": [], "merged": [], "ref": [], "aligned": []}, [], []
    for prompt, completion in encoded(GIVEN):
        log_ref, log_aligned, log_q = (log_probs(model, prompt, completion) for model in (ref, aligned, merged))
        mixed = (1 - lam) * log_ref + lam * log_aligned
        log_p = torch.log_softmax(mixed, -1)
        here = (log_p.exp() * (log_p - log_q)).sum(-1)
        kl += here.tolist()
        sequences.append(float(here.sum()))
        normalisers.append(float(torch.logsumexp(mixed, -1).sum()))
        own = torch.tensor(completion)[:, None]
        for name, log in (("exact", log_p), ("merged", log_q), ("ref", log_ref), ("aligned", log_aligned)):
            chosen[name] += log.gather(1, own)[:, 0].tolist()
        change += (log_q.exp() - log_p.exp()).gather(1, own)[:, 0].tolist()
    quantiles = np.quantile(kl, [0.5, 0.9, 0.99, 0.999])
    assert [result[key] for key in ("kl_median", "kl_p90", "kl_p99", "kl_p999")] == pytest.approx(quantiles, rel=1e-3, abs=1e-7)
    assert result["rms_dp"] == pytest.approx(np.sqrt(np.mean(np.square(change))), rel=1e-3)
    for name, values in chosen.items():
        assert result["perplexity"][name] == pytest.approx(math.exp(-np.mean(values)), rel=1e-4)
    assert result["sequence"]["kl"] == pytest.approx(np.mean(sequences), rel=1e-3)
    assert result["sequence"]["log_normaliser"] == pytest.approx(np.mean(normalisers), rel=1e-4, abs=1e-5)
    weights = np.exp(np.array(normalisers) - max(normalisers))
    share = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    text_of = np.repeat(range(len(GIVEN)), [len(completion) for _, completion in encoded(GIVEN)])
    figures = summarise(report.per_token[lam], report.prompt_of[lam], text_of, 1e-9, 0)
    assert figures["sequence"]["ess_share"] == pytest.approx(share, rel=1e-3)
    assert not figures["sequence"]["ess_within_prompts"]
    assert result["sequence"]["ess_share"] is None  # given texts are not exact DeRa's
    assert sum(row["share"] for row in result["per_class"]) == pytest.approx(1)
    assert result["worst"][0]["kl"] == pytest.approx(max(kl), rel=1e-3)
    tokens = [row["tokens"] for row in result["per_prompt"]]
    assert np.average([row["kl"] for row in result["per_prompt"]], weights=tokens) == pytest.approx(result["kl"], rel=1e-9)
    assert sum(row["tokens"] for row in result["per_position"]) == result["tokens"]


def test_the_weights_to_the_sequence_level_mixture_are_unbiased(pair):
    """E[Π Z_t] over texts of exact DeRa is the sequence-level mixture's normaliser, enumerated here for two tokens."""
    lam, prompt = 1.5, [5, 6, 7]
    with torch.no_grad():
        total = 0.0
        exact = pair.exact()
        first = [torch.log_softmax(m(torch.tensor([prompt])).logits[0, -1].double(), -1) for m in (exact.ref, exact.aligned)]
        for token in range(VOCAB):
            second = [torch.log_softmax(m(torch.tensor([[*prompt, token]])).logits[0, -1].double(), -1)
                      for m in (exact.ref, exact.aligned)]  # fmt: skip
            joint = [one[token] + other for one, other in zip(first, second, strict=True)]
            ends = 1 if token == 1 else None
            mixed = (1 - lam) * joint[0] + lam * joint[1]
            total += float(((1 - lam) * first[0][token] + lam * first[1][token]).exp() if ends else mixed.exp().sum())
    report = compare(pair, [lam], [{"prompt": "w5 w6 w7"}], dtype="float32", samples=3000, max_new_tokens=2, extras=())
    sums = np.bincount(
        np.repeat(np.arange(3000), [len(t) for t in _texts_of(pair, lam, 3000)]), report.per_token[lam]["log_z"]
    )
    estimate, error = np.exp(sums).mean(), np.exp(sums).std() / math.sqrt(3000)
    assert abs(estimate - total) < 5 * error
    assert report.results[0]["sequence"]["ess_within_prompts"]


def _texts_of(pair, lam, count):
    return sample(pair.exact(), pair.tokenizer, [[5, 6, 7]] * count, lam=lam, max_new_tokens=2, seed=0)


def test_coupled_texts_part_where_the_two_models_own_texts_do(pair):
    lam = 1.7
    report = compare(pair, [lam], PROMPTS, dtype="float32", max_new_tokens=12, extras=("coupled",), seed=3, reward=len)
    words, ids = tokenizer(), [tokenizer()(p["prompt"])["input_ids"] for p in PROMPTS]
    ours = sample(pair.exact(), words, ids, lam=lam, max_new_tokens=12, seed=3)
    theirs = sample(pair.merged(lam), words, ids, max_new_tokens=12, seed=3)
    same = [one == other for one, other in zip(ours, theirs, strict=True)]
    coupled = report.results[0]["coupled"]
    assert coupled["identical"] == pytest.approx(np.mean(same))
    places = [next(i for i in range(13) if one[i : i + 1] != other[i : i + 1]) for one, other in zip(ours, theirs, strict=True) if one != other]
    assert coupled["first_difference"] == np.median(places)
    lengths = [[len(words.decode(t, skip_special_tokens=True)) for t in side] for side in (ours, theirs)]
    assert coupled["reward_difference"] == pytest.approx(np.mean(lengths[1]) - np.mean(lengths[0]))
    on_merged = report.results[0]["on_merged_texts"]
    scored = [{**p, "completion": words.decode(t)} for p, t in zip(PROMPTS, theirs, strict=True)]
    (given_again,) = compare(pair, [lam], scored, dtype="float32", extras=()).results
    assert on_merged["kl"] == pytest.approx(given_again["kl"], rel=1e-3)


def test_at_both_ends_all_coupled_texts_are_the_same(pair):
    for result in compare(pair, [0.0, 1.0], PROMPTS, dtype="float32", max_new_tokens=10, extras=("coupled",)).results:
        assert result["coupled"]["identical"] == 1
        assert result["coupled"]["first_difference"] is None


def test_texts_of_the_merged_model_can_be_scored(pair):
    (result,) = compare(pair, [1.5], PROMPTS, dtype="float32", texts="merged", max_new_tokens=8, extras=()).results
    ids = [tokenizer()(p["prompt"])["input_ids"] for p in PROMPTS]
    texts = sample(pair.merged(1.5), tokenizer(), ids, max_new_tokens=8)
    assert result["tokens"] == sum(map(len, texts))


# The scale


@given(st.integers(2, 8), st.integers(1, 100), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_quantisation_is_absmax_in_groups_of_32(bits, columns, seed):
    torch.manual_seed(seed)
    weight = torch.randn(3, columns)
    found = quantise(weight, bits)
    for row, stored in zip(weight.double(), found, strict=True):
        for start in range(0, columns, 32):
            group = row[start : start + 32]
            step = group.abs().max() / (2 ** (bits - 1) - 1)
            assert ((stored[start : start + 32].double() - group).abs() <= step / 2 + 1e-6).all()
            whole = stored[start : start + 32].double() / step
            torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert not quantise(torch.zeros(2, 40), bits).any()


def test_the_ladder_and_the_floor_are_exact_dera_of_worse_copies_against_itself(pair):
    lam = 0.5
    (result,) = compare(pair, [lam], GIVEN, extras=("floor", "ladder"), extra_prompts=4).results
    exact = pair.exact()
    plain = [pair.merged(0.0), pair.merged(1.0)]
    worse = [pair.merged(0.0), pair.merged(1.0)]
    with torch.no_grad():
        for model in worse:
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    groups = torch.nn.functional.pad(parameter.double(), (0, -parameter.shape[1] % 32)).unflatten(1, (-1, 32))
                    step = groups.abs().amax(-1, keepdim=True) / 7
                    parameter.copy_(((groups / step).round() * step).flatten(1)[:, : parameter.shape[1]])
    narrow = pair.exact(dtype=torch.bfloat16)

    def between(ours, theirs):
        kl = []
        for prompt, completion in encoded(GIVEN[:4]):
            log = [log_probs(model, prompt, completion) for model in (*ours, *theirs)]
            p, q = (torch.log_softmax((1 - lam) * a + lam * b, -1) for a, b in (log[:2], log[2:]))
            kl += (p.exp() * (p - q)).sum(-1).tolist()
        return np.mean(kl)

    # bfloat16 weights lie midway between two steps often enough for float32 and float64 to part there.
    assert result["ladder"]["4"] == pytest.approx(between(plain, worse), rel=0.05)
    assert result["noise_floor"] == pytest.approx(between((exact.ref, exact.aligned), (narrow.ref, narrow.aligned)), rel=0.1)
    rungs = list(result["ladder"].values())
    assert rungs == sorted(rungs)


def test_bits_lie_between_the_rungs():
    rungs = {8: 1e-5, 6: 1e-4, 5: 1e-3, 4: 1e-2, 3: 1e-1}
    assert bits_like(1e-3, rungs) == pytest.approx(5)
    assert bits_like(10**-2.5, rungs) == pytest.approx(4.5)
    assert bits_like(1e-6, rungs) is None
    assert bits_like(1.0, rungs) is None


@pytest.mark.parametrize(
    ("kl", "bound", "floor", "expected"),
    [
        (1e-5, 1.0, 1e-4, "safe"),  # below the floor, whatever else
        (1e-5, 1e-9, 1e-4, "safe"),
        (0.05, 1.0, 1e-4, "safe"),  # 95 % captured
        (0.3, 1.0, 1e-4, "usable"),
        (5e-4, 6e-4, 1e-4, "usable"),  # little captured, but near the floor
        (0.6, 1.0, 1e-4, "not DeRa any more"),
        (2.0, 1.0, 1e-4, "not DeRa any more"),
        (math.inf, 1.0, 1e-4, "not DeRa any more"),
        (0.5, 1e-12, 1e-4, "not DeRa any more"),  # at an end, and not there
    ],
)
def test_the_verdict_is_about_floor_and_captured_shift(kl, bound, floor, expected):
    result = {"kl": kl, "kl_ci": [kl, kl], "kl_ref": bound, "kl_aligned": 2 * bound}
    assert verdict(result, floor, 1e-9)[0] == expected


def test_the_verdict_takes_the_upper_end_of_the_interval():
    result = {"kl": 0.05, "kl_ci": [0.01, 0.3], "kl_ref": 1.0, "kl_aligned": 1.0}
    assert verdict(result, 1e-4, 1e-9)[0] == "usable"


# Prediction


@given(st.floats(1e-4, 10), st.floats(0.02, 0.98) | st.floats(1.02, 2.0))
@settings(max_examples=60, deadline=None)
def test_where_the_leading_order_is_all_there_is_the_prediction_is_exact(size, lam):
    probes = {at: size * scale(at) for at in (0.25, 0.75, 2.0)}
    (row,) = predict(probes, [lam], 1e-12)
    assert row["kl"] == pytest.approx(size * (lam * (1 - lam)) ** 2, rel=1e-9)
    assert row["holds"] == (row["kl"] >= 1e-10)


def test_the_prediction_says_where_it_does_not_hold():
    rows = predict({0.25: 0.001, 0.75: 0.5, 2.0: 60.0}, [0.5, 1.5, 2.5, -0.5], 1e-12)
    assert [row["holds"] for row in rows] == [False, True, False, False]


def test_probes_are_measured_on_texts_of_their_own(pair):
    report = compare(pair, [0.5], PROMPTS, dtype="float32", max_new_tokens=6, extras=("predict",))
    (again,) = compare(pair, [0.25], PROMPTS, dtype="float32", max_new_tokens=6, extras=()).results
    known = {row["lambda"]: row["kl"] for row in report.prediction}
    assert known[0.25] == pytest.approx(again["kl"], rel=1e-9)
    assert report.results[0]["predicted"]["kl"] == known[0.5]


# Where it comes from


def _save(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_shares_add_up_to_the_leading_order_and_fall_on_what_changed(tmp_path):
    """Attention of layer 1 alone differs, so all of the error is there; and ½·Var[e] is what the shares sum to."""
    ref, aligned = tiny_llama(0), tiny_llama(0)
    torch.manual_seed(5)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(aligned.model.layers[1].self_attn, name).weight += 0.3 * torch.randn(())
            weight = getattr(aligned.model.layers[1].self_attn, name).weight
            weight += 0.2 * torch.randn_like(weight)
    pair = ModelPair.from_pretrained(_save(ref, tmp_path / "ref"), _save(aligned, tmp_path / "aligned"))
    texts = [Text(n, [*p, *c], len(p)) for n, (p, c) in enumerate(encoded(GIVEN))]
    for lam in (0.5, 1.5):
        shares = attribute(pair, texts, lam, "cpu", lambda done, total: None)
        assert set(shares) == {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"}
        merged, variance = pair.merged(lam), []
        for prompt, completion in encoded(GIVEN):
            log_ref, log_aligned, log_q = (log_probs(m, prompt, completion) for m in (ref, aligned, merged))
            p = torch.softmax((1 - lam) * log_ref + lam * log_aligned, -1)
            error = (1 - lam) * log_ref + lam * log_aligned - log_q
            mean = (p * error).sum(-1, keepdim=True)
            variance += (p * (error - mean) ** 2).sum(-1).tolist()
        assert sum(shares.values()) == pytest.approx(np.mean(variance) / 2, rel=0.02)


def test_features_leave_the_interpolated_ones_from_the_layer_that_changed_on(tmp_path):
    ref, aligned = tiny_llama(0), tiny_llama(0)
    with torch.no_grad():
        aligned.model.layers[1].mlp.gate_proj.weight *= -1
    pair = ModelPair.from_pretrained(_save(ref, tmp_path / "ref"), _save(aligned, tmp_path / "aligned"))
    (result,) = compare(pair, [0.5], GIVEN, extras=("layers",)).results
    gaps = result["layers"]["feature_gaps"]
    assert gaps[0] == gaps[1] == 0
    assert gaps[2] > 0.1


def twin(kind):
    """The aligned model with other weights and the same function: no average with the reference means anything."""
    model = tiny_llama(1, num_hidden_layers=4)
    with torch.no_grad():
        for p, q in zip(model.parameters(), tiny_llama(0, num_hidden_layers=4).parameters(), strict=True):
            # Padding's row stays 0: beside it, any step is a long one, for the norm that follows makes a unit of it.
            p.copy_(q + 0.003 * torch.randn_like(q) * (q != 0))
        if kind == "signs":
            for layer in (1, 2):
                for projection in ("q_proj", "k_proj"):
                    getattr(model.model.layers[layer].self_attn, projection).weight *= -1
        elif kind == "swapped":
            mlp = model.model.layers[2].mlp
            order = torch.randperm(mlp.gate_proj.out_features)
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight.copy_(weight[order].clone())
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())
    return model


@pytest.mark.parametrize(("kind", "layers"), [("signs", {1, 2}), ("swapped", {2})])
def test_a_twin_of_the_aligned_model_is_found_out_and_its_layers_named(kind, layers, tmp_path):
    ref = _save(tiny_llama(0, num_hidden_layers=4), tmp_path / "ref")
    torch.manual_seed(3)
    plain = _save(twin(None), tmp_path / "plain")
    torch.manual_seed(3)
    other = _save(twin(kind), tmp_path / "other")
    results = []
    for aligned in (plain, other):
        pair = ModelPair.from_pretrained(ref, aligned)
        results += compare(pair, [0.5], PROMPTS, max_new_tokens=12, extras=("floor", "layers")).results
    honest, fooled = results
    assert honest["kl_ref"] == pytest.approx(fooled["kl_ref"], rel=1e-3)  # the same exact DeRa
    assert honest["verdict"] in ("safe", "usable")
    assert fooled["verdict"] == "not DeRa any more"
    ranked = sorted(fooled["layers"]["layers"], key=lambda row: -abs(row["kl"]))
    assert {row["layer"] for row in ranked[: len(layers)]} == layers


def test_two_models_that_have_little_in_common_are_not_dera_any_more(llama):
    (result,) = compare(ModelPair.from_pretrained(llama(0), llama(5)), [0.5], PROMPTS, max_new_tokens=12).results
    assert result["verdict"] == "not DeRa any more"


# Long work


def _no_space(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_interrupted_comparison_goes_on_where_it_was(pair, tmp_path, monkeypatch):
    from dera_merge.measuring import report, steps

    how = {"max_new_tokens": 6, "extras": ("floor", "coupled")}
    whole = compare(pair, [0.5, 1.5], PROMPTS, **how)

    def stop(what, done, total):
        if what.startswith("sampling from the merged"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pair, [0.5, 1.5], PROMPTS, **how, unfinished=tmp_path / "out", progress=stop)
    with pytest.raises(DeraError, match="--resume goes on with them"):  # the same call again
        compare(pair, [0.5, 1.5], PROMPTS, **how, unfinished=tmp_path / "out")
    read = []
    original = steps.trace_of
    monkeypatch.setattr(steps, "trace_of", lambda *args, **how: read.append(1) or original(*args, **how))
    seen = []
    again = compare(pair, [0.5, 1.5], PROMPTS, **how, unfinished=tmp_path / "out", resume=True,
                    progress=lambda what, done, total: seen.append(what))  # fmt: skip
    assert again.to_dict() == whole.to_dict()
    assert not any("exact DeRa" in what for what in seen)  # neither sampled nor scored again
    # Where the report cannot be written, the steps stay for the next try.
    with monkeypatch.context() as full:
        full.setattr(report, "write_atomically", _no_space)
        with pytest.raises(OSError, match="No space"):
            again.save(tmp_path / "out")
    assert list((tmp_path / "out" / ".unfinished").glob("*.npz"))
    again.save(tmp_path / "out")
    assert not (tmp_path / "out" / ".unfinished").exists()
    read.clear()
    compare(pair, [0.5], PROMPTS, max_new_tokens=6, extras=(), unfinished=tmp_path / "out", resume=True)
    assert read  # nothing is left of it


def test_steps_of_other_settings_are_not_taken_over(pair, tmp_path):
    def stop(what, done, total):
        if what == "scoring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pair, [0.5], PROMPTS, max_new_tokens=6, seed=1, unfinished=tmp_path, progress=stop)
    other = {"max_new_tokens": 6, "seed": 2, "extras": (), "unfinished": tmp_path}
    for how, problem in (({"resume": True}, "begun by another call"), ({}, "other settings")):
        with pytest.raises(DeraError, match=problem):
            compare(pair, [0.5], PROMPTS, **other, **how)
    resumed = compare(pair, [0.5], PROMPTS, **other, overwrite=True)
    assert resumed.to_dict() == compare(pair, [0.5], PROMPTS, max_new_tokens=6, seed=2, extras=()).to_dict()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(llama, lora, tmp_path):
    base = llama(0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(entry) for entry in PROMPTS))
    command = ["compare", str(base), str(lora(base)), "-l", "0.5,1.5", "--prompts", str(prompts), "--max-new-tokens", "6", "--json"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "dera_merge"]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = []
    for start, out in (([sys.executable, "-m", "dera_merge"], "one"), (launch, "two")):
        done = subprocess.run([*start, *command, "-o", str(tmp_path / out)], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(json.loads(done.stdout))
    for one, two in zip(*(output["results"] for output in outputs), strict=True):
        assert one["tokens"] == two["tokens"]
        for key in ("kl", "tv", "kl_ref", "noise_floor"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-9)


# The report


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.ids = [], [], [], []
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in ("meta", "br", "use", "path", "rect", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder):
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def whole_report(llama, lora, tmp_path_factory):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    report = compare(pair, [0.0, 0.5, 1.0, 2.0], PROMPTS, max_new_tokens=8,
                     extras=("floor", "ladder", "predict", "layers", "coupled"), reward=len)  # fmt: skip
    return report.save(tmp_path_factory.mktemp("report")), report


@pytest.mark.core
def test_the_page_needs_nothing_else_and_holds_everything(whole_report):
    folder, report = whole_report
    page = page_of(folder)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for key, value in page.attributes:
        assert key not in ("src", "action", "onload", "onclick")
        if key in ("href", "xlink:href"):
            assert value.startswith("#")
    assert {"chart-kl", "chart-captured", "chart-positions", "chart-layers", "chart-features"} <= set(page.ids)
    assert {"figures", "quantiles", "ladder"} <= set(page.ids)
    text = "".join(page.text)
    assert all(result["why"] in text for result in report.results)
    content = (folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in content
    assert "@media print" in content
    assert 'name="viewport"' in content
    assert "#010203" not in content  # all ink is the page's
    assert "url(http" not in content


@pytest.mark.parametrize("extra", ["floor", "ladder", "predict", "layers", "coupled"])
def test_each_extra_alone_makes_a_whole_report(llama, lora, extra, tmp_path):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    report = compare(pair, [-0.5, 0.5], PROMPTS[:3], max_new_tokens=4, extras=(extra,))
    assert json.loads((report.save(tmp_path) / "report.json").read_text(), parse_constant=pytest.fail)


def test_one_prompt_and_one_lambda_make_a_whole_report(pair, tmp_path):
    report = compare(pair, [1.0], PROMPTS[:1], max_new_tokens=2, extras=("floor", "ladder", "coupled"))
    assert "nan" not in report.save(tmp_path).joinpath("report.md").read_text()


def test_ends_alone_say_nothing_of_what_lies_between():
    rows = [{"lambda": lam, "verdict": "safe"} for lam in (0.0, 1.0)]
    assert Report("a", "b", rows, {}).safe_stretches() == [(0.0, 0.0), (1.0, 1.0)]


def test_the_chart_draws_no_line_through_an_end_where_kl_is_nothing():
    def result(lam):
        return {"lambda": lam, "kl": 0.01, "kl_ci": [0.009, 0.011], "kl_ref": 0.1, "kl_aligned": 0.1}

    figure = figure_of([lambda axis: draw_kl(axis, [result(1.5), result(0.5), result(0.25)])], (5, 4))
    merged = next(line for line in figure.axes[0].lines if line.get_label() == "merged")
    assert list(merged.get_xdata()) == [0.25, 0.5, 1.0, 1.5]
    assert list(np.isnan(merged.get_ydata())) == [False, False, True, False]


def test_a_report_comes_back_from_its_folder(whole_report):
    folder, report = whole_report
    assert Report.load(folder).to_dict() == report.to_dict()
    with pytest.raises(DeraError):
        Report.load(folder / "report.md")


def test_names_and_texts_are_shown_as_they_are_and_run_nothing(whole_report, tmp_path):
    folder, _ = whole_report
    report = Report.load(folder)
    evil = '<script>alert(1)</script><img src=x onerror=alert(1)>"`\n# h'
    report.ref = report.command = evil
    report.texts[0]["prompt"] = evil
    report.texts[0]["scored"][0][0] = evil
    report.results[1]["worst"][0]["before"] = evil
    page = page_of(report.save(tmp_path))
    assert not {"script", "img"} & set(page.tags)
    assert "alert(1)" in "".join(page.text)
    markdown = (tmp_path / "report.md").read_text()
    assert "\n# h" not in markdown


def test_a_merge_warns_of_what_a_report_does_not_call_safe(llama, lora, tmp_path):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    report = compare(pair, [0.0, 0.5, 1.0, 2.0], PROMPTS, max_new_tokens=4, extras=())
    for result, word in zip(report.results, ("safe", "safe", "safe", "not DeRa any more"), strict=True):
        result["verdict"] = word
    folder = report.save(tmp_path / "report")
    assert report.safe_stretches() == [(0.0, 1.0)]
    with pytest.warns(DeraWarning, match=r"λ=2 lies outside .*0 to 1"):
        pair.merge(tmp_path / "out", [0.7, 2.0], report=folder)
    other = ModelPair.from_pretrained(base, lora(base, seed=9))
    with pytest.raises(DeraError, match="another pair"):
        other.merge(tmp_path / "other", [0.5], report=folder)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_page_opens_in_a_browser_without_a_complaint(whole_report, tmp_path):
    """A real headless browser, in light and dark, on a desk and on a phone: no console error, and something is drawn."""
    import shutil

    from PIL import Image

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser, "this test needs chromium"
    folder, _ = whole_report
    for name, options in {"desk": ["--window-size=1200,1600"], "phone": ["--window-size=500,1600"],
                          "dark": ["--window-size=1200,1600", "--blink-settings=preferredColorScheme=0"]}.items():  # fmt: skip
        shot = tmp_path / f"{name}.png"
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
             *options, f"--screenshot={shot}", (folder / "report.html").as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
        assert pixels.std() > 10
        assert (pixels.mean() < 100) == (name == "dark")
    wide = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,1600", "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "chart-kl" in wide.stdout


def test_summarise_survives_one_text_of_one_token():
    one = {key: np.array([0.1]) for key in ("kl", "reverse_kl", "js", "tv", "top1", "kl_ref", "kl_aligned", "logp", "logp_merged",
                                            "logp_ref", "logp_aligned", "log_z")}  # fmt: skip
    figures = summarise(one, np.array([0]), np.array([0]), 1e-9, 0)
    assert figures["kl_ci"] is None
    assert figures["sequence"]["ess_share"] is None
    assert json.dumps(figures, allow_nan=False)


def test_a_checkpoint_merged_along_a_path_is_measured_as_it_lies(llama, lora, tmp_path):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    path = random_path(pair, size=0.01)
    pair.merge(tmp_path / "out", [0.5], path=path)
    (there,) = compare(pair, [0.5], GIVEN, approx=tmp_path / "out", extras=()).results
    (here,) = compare(pair, [0.5], GIVEN, path=path, extras=()).results
    assert there["kl"] == pytest.approx(here["kl"], rel=1e-6)
    assert there["kl_rounding"] is None
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert merged.num_parameters() > 0


def test_a_model_whose_turn_broke_off_is_turned_anew(pair, monkeypatch):
    """What is half at one λ and half at another must not be taken for either."""
    laboratory = Laboratory(pair, Compute())
    before = {name: tensor.clone() for name, tensor in laboratory.merged(0.5).state_dict().items()}
    model = laboratory.merged(0.5)

    def broken(lam):
        next(model.parameters()).data.zero_()
        raise KeyboardInterrupt

    turn = model.set_lam
    monkeypatch.setattr(model, "set_lam", broken)
    with pytest.raises(KeyboardInterrupt):
        laboratory.merged(1.5)
    monkeypatch.setattr(model, "set_lam", turn)
    after = laboratory.merged(0.5)
    assert after is model
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.items())
