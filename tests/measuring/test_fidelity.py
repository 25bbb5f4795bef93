"""compare, against an independent computation of every figure."""

import json
import math

import numpy as np
import pytest
import torch
from builders import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraWarning, ModelPair, compare
from dera_merge.pages.fidelity import draw_captured
from dera_merge.statistics.intervals import bootstrap
from dera_merge.statistics.summary import MEASURES
from dera_merge.texts import prompts as prompt_files
from dera_merge.texts.sampling import sample

pytestmark = pytest.mark.core

PROMPTS = [
    {"prompt": "w5 w9 w12", "completion": "w7 w8 w9 w10 w11"},
    {"messages": [{"role": "user", "content": "w41 w42"}], "completion": "w20 w21"},
    {"prompt": "w33", "completion": "w2 w3 w4 w5 w6 w7 w8 w9 <end>"},
]
IDS = [([5, 9, 12], [7, 8, 9, 10, 11]), ([3, 41, 42, 4], [20, 21]), ([33], [2, 3, 4, 5, 6, 7, 8, 9, 1])]


@torch.no_grad()
def expected(ref, aligned, merged, lam):
    """The figures of design: one text at a time, whole logits, float64."""
    rows = []
    for prompt, completion in IDS:
        ids = torch.tensor([prompt + completion])
        kept = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        logits = [model(ids).logits[0, kept].double() for model in (ref, aligned, merged)]
        log_p = torch.log_softmax((1 - lam) * logits[0] + lam * logits[1], -1)
        log_ref, log_aligned, log_q = (torch.log_softmax(x, -1) for x in logits)
        log_m = torch.log((log_p.exp() + log_q.exp()) / 2)

        def kl(a, b):
            return (a.exp() * (a - b)).sum(-1)

        rows.append(torch.stack([
            kl(log_p, log_q), kl(log_q, log_p), (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
            (log_p.exp() - log_q.exp()).abs().sum(-1) / 2, (log_p.argmax(-1) == log_q.argmax(-1)).double(),
            kl(log_p, log_ref), kl(log_p, log_aligned),
        ]))  # fmt: skip
    return dict(zip(MEASURES, torch.cat(rows, 1).mean(1).tolist(), strict=True))


@pytest.fixture(scope="module", params=["dense", "lora"])
def pair(request, llama, lora):
    base = llama(0)
    return ModelPair.from_pretrained(base, llama(1, near=0) if request.param == "dense" else lora(base))


def test_given_completions_give_the_figures_of_an_independent_computation(pair, tmp_path):
    lams = [0.3, 0.5, 1.5]
    report = compare(pair, lams, PROMPTS)
    ref, aligned = (pair.exact().ref, pair.exact().aligned)
    folders = pair.merge(tmp_path / "out", lams)
    smooth = pair.merge(tmp_path / "float32", lams, dtype="float32")
    for result, folder, twin in zip(report.results, folders, smooth, strict=True):
        lam = result["lambda"]
        figures = expected(ref, aligned, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lam)
        assert result["tokens"] == sum(len(completion) for _, completion in IDS)
        for measure, value in figures.items():
            assert result[measure] == pytest.approx(value, rel=1e-3, abs=1e-8), measure
        kl32 = expected(ref, aligned, AutoModelForCausalLM.from_pretrained(twin), lam)["kl"]
        assert result["kl_nonlinearity"] == pytest.approx(kl32, rel=1e-3)
        assert result["kl_rounding"] == pytest.approx(figures["kl"] - kl32, rel=1e-2, abs=1e-6)
        assert result["captured"] == pytest.approx(1 - figures["kl"] / min(figures["kl_ref"], figures["kl_aligned"]), rel=1e-3)


def test_a_merged_directory_is_measured_as_it_lies(pair, tmp_path):
    lams = [0.3, 0.5]
    pair.merge(tmp_path / "out", lams, rounding="nearest")
    there = compare(pair, lams, PROMPTS, approx=tmp_path / "out").results
    here = compare(pair, lams, PROMPTS, rounding="nearest").results
    for one, other in zip(there, here, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-6)
    with pytest.raises(DeraError, match=r"merged at λ=0\.3"):
        compare(pair, [0.5], PROMPTS, approx=tmp_path / "out" / "lambda-0.3")


def test_a_directory_merged_from_another_pair_warns_and_is_described_as_it_lies(pair, llama, tmp_path):
    ModelPair.from_pretrained(llama(2), llama(3)).merge(tmp_path / "out", [0.5], rounding="nearest", dtype="bfloat16")
    with pytest.warns(DeraWarning, match="was merged from"):
        report = compare(pair, [0.5], PROMPTS, approx=tmp_path / "out")
    assert (report.settings["dtype"], report.settings["rounding"]) == ("bfloat16", "nearest")


def test_reference_and_aligned_model_read_given_texts_once_for_all_lambdas(pair, monkeypatch):
    from dera_merge.measuring import steps

    read = []
    original = steps.trace_of
    monkeypatch.setattr(steps, "trace_of", lambda *args, **how: read.append(1) or original(*args, **how))
    compare(pair, [0.2, 0.4, 0.6], PROMPTS, dtype="float32")
    probes = min(4, len(PROMPTS))  # one text at a time, for the resolution
    assert len(read) == 3 + 2 + probes


def test_sampled_texts_end_at_the_end_token_and_padding_does_not_count(pair):
    prompts = [{"prompt": f"w{n} w{n + 1}"} for n in range(2, 30)]
    report = compare(pair, [0.5], prompts, max_new_tokens=20)
    words = tokenizer()
    exact = pair.exact(0.5)
    texts = sample(exact, words, [words(p["prompt"])["input_ids"] for p in prompts], lam=0.5, max_new_tokens=20)
    assert any(text[-1] == 1 and len(text) < 20 for text in texts)
    assert all(1 not in text[:-1] for text in texts)
    assert report.results[0]["tokens"] == sum(map(len, texts))


def test_texts_do_not_depend_on_the_batch(pair):
    words = tokenizer()
    exact = pair.exact(0.5)
    prompts = [[n] * (1 + n % 5) for n in range(2, 22)]
    together = sample(exact, words, prompts, max_new_tokens=10, lam=0.5, seed=4)
    first = sample(exact, words, prompts[:1], max_new_tokens=10, lam=0.5, seed=4)
    assert together[:1] == first


def test_samples_ignore_the_warpers_of_the_checkpoint(pair):
    words = tokenizer()
    exact = pair.exact(0.5)
    plain = sample(exact, words, [[5, 6]] * 4, max_new_tokens=10, lam=0.5)
    exact.generation_config.update(repetition_penalty=5.0, top_k=1, do_sample=True, temperature=0.1)
    assert sample(exact, words, [[5, 6]] * 4, max_new_tokens=10, lam=0.5) == plain


def test_gumbel_samples_follow_the_models_distribution(pair):
    words = tokenizer()
    exact = pair.exact(0.3)
    with torch.no_grad():
        truth = torch.softmax(exact(torch.tensor([[5, 6]])).logits[0, -1].double(), -1)
    tokens = torch.tensor([text[0] for text in sample(exact, words, [[5, 6]] * 4000, max_new_tokens=1, lam=0.3)])
    counts = torch.bincount(tokens, minlength=64).double()
    common = truth > 5 / 4000
    chi = ((counts - 4000 * truth) ** 2 / (4000 * truth))[common].sum().item()
    assert chi < 130  # far beyond the 99.999 % quantile with at most 63 degrees of freedom


def test_both_ends_have_nothing_to_measure_and_say_so(pair):
    for result in compare(pair, [0.0], PROMPTS).results:
        assert result["kl"] < 1e-9
        assert result["captured"] is None
    assert json.dumps(compare(pair, [0.0, 1.0], PROMPTS).to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"prompt": "w5", "completion": "w6"}, {"prompt": "w7"}], "prompt 2 has no completion"),
        ([{"prompt": "w5", "completion": ""}], "empty completion"),
        ([""], "no tokens"),
        ([{"prompt": "w5 " * 100, "completion": "w6 " * 100}], "the model takes 128"),
    ],
)
def test_unusable_prompts_are_refused(pair, prompts, message):
    with pytest.raises(DeraError, match=message):
        compare(pair, [0.5], prompts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=5), min_size=2, max_size=8))
def test_bootstrap_intervals_hold_the_pooled_mean_between_the_extreme_prompts(clusters):
    values = np.concatenate(clusters)
    prompt_of = np.repeat(range(len(clusters)), [len(c) for c in clusters])
    low, high = bootstrap(values, prompt_of)
    means = [np.mean(c) for c in clusters]
    assert min(means) - 1e-9 <= low <= high <= max(means) + 1e-9


def test_bootstrap_resamples_prompts_not_tokens():
    """Tokens of one prompt that are all alike say no more than one: the interval is that of 20 numbers, not of 2000."""
    rng = np.random.default_rng(0)
    levels = rng.normal(size=20)
    low, high = bootstrap(np.repeat(levels, 100), np.repeat(range(20), 100))
    assert high - low == pytest.approx(2 * 1.96 * levels.std() / math.sqrt(20), rel=0.25)
    assert bootstrap(np.ones(5), np.zeros(5)) is None


def test_prompt_files_with_a_byte_order_mark_or_odd_line_separators(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + '{"prompt": "a\u2028b"}\r\nplain\x85text\r\n\r\n'.encode())
    assert prompt_files.read(tmp_path / "a.txt") == [{"prompt": "a\u2028b"}, {"prompt": "plain\x85text"}]


def test_a_report_on_disk_is_json_markdown_and_a_plot(pair, tmp_path):
    report = compare(pair, [0.0, 0.5, 1.0], PROMPTS)
    folder = report.save(tmp_path / "report")
    assert json.loads((folder / "report.json").read_text())["results"] == report.results
    assert (folder / "report.md").read_text().count("\n| ") == 5
    assert (folder / "fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_the_captured_share_has_no_line_through_an_end_where_it_is_undefined():
    axis = Figure().subplots()
    draw_captured(axis, [{"lambda": lam, "captured": 0.5} for lam in (0.5, 0.75, 1.25, 1.5)])
    at, shares = axis.lines[0].get_data()
    assert [lam for lam, share in zip(at, shares, strict=True) if math.isnan(share)] == [1]
