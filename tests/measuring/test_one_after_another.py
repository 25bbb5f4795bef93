"""compare holds one model after another, or two, and its figures are those of models that are all held at once."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch

from dera_merge import ModelPair, compare
from dera_merge.decoding import load
from dera_merge.measuring import steps
from dera_merge.measuring.divergence import divergences
from dera_merge.measuring.traces import Text, tokens_of, trace_of
from dera_merge.merging import live
from dera_merge.texts.prompts import encode

PROMPTS = [{"prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(3, 11)]
GIVEN = [{**prompt, "completion": "w7 w8 w9 w10"[: 3 * n + 2]} for n, prompt in enumerate(PROMPTS)]
LAMS = [0.25, 0.5, 2.0]


@pytest.fixture(scope="module", params=["dense", "lora"])
def pair(request, llama, lora):
    base = llama(0)
    return ModelPair.from_pretrained(base, llama(1, near=0) if request.param == "dense" else lora(base))


@pytest.fixture
def held(monkeypatch):
    """How many models with weights of their own there are, each time that one reads texts."""
    models: list[weakref.ref] = []
    counts: list[int] = []

    def made(function):
        def wrapped(*args, **kwargs):
            model = function(*args, **kwargs)
            models.append(weakref.ref(model))
            return model

        return wrapped

    def reads(*args, **how):
        if sum(model() is not None for model in models) > 1:
            gc.collect()
        counts.append(sum(model() is not None for model in models))
        return trace_of(*args, **how)

    monkeypatch.setattr(load, "load_model", made(load.load_model))
    monkeypatch.setattr(live._Dial, "build", made(live._Dial.build))
    monkeypatch.setattr(steps, "trace_of", reads)
    return counts


def test_given_texts_are_read_with_one_model_held_at_a_time(pair, held):
    compare(pair, LAMS, GIVEN, extras=("predict",))
    assert len(held) >= 2 + 2 * len(LAMS)
    assert set(held) == {1}


def test_no_step_of_a_comparison_holds_more_than_two_models(pair, held):
    compare(pair, LAMS[:2], PROMPTS, max_new_tokens=3, extras=("floor", "ladder", "predict", "layers", "coupled"))
    assert 1 <= max(held) <= 2


def test_figures_are_bit_for_bit_those_of_models_that_are_all_held(pair, monkeypatch):
    report = compare(pair, LAMS, GIVEN, extras=())
    encoded = encode(GIVEN, pair.tokenizer)
    texts = [Text(i, [*p.ids, *p.completion], len(p.ids)) for i, p in enumerate(encoded)]
    exact = pair.exact()
    merged = {lam: {"kl": pair.merged(lam, dtype="auto", compute_dtype=torch.float32), "kl_nonlinearity": pair.merged(lam)}
              for lam in LAMS}  # fmt: skip
    sides = [trace_of(side, texts) for side in exact.sides]
    traces = [(lam, {name: trace_of(model, texts) for name, model in row.items()}) for lam, row in merged.items()]
    expected = divergences(sides, traces, tokens_of(texts), exact.config.vocab_size)
    monkeypatch.setattr(steps.ComparisonLab, "most_heads", 0)  # each λ by itself, as where heads are large
    alone = compare(pair, LAMS, GIVEN, extras=())
    for lam in LAMS:
        assert expected[lam].keys() == report.per_token[lam].keys()
        for key, values in expected[lam].items():
            assert np.array_equal(values, report.per_token[lam][key])
            assert np.array_equal(values, alone.per_token[lam][key])


def test_kl_is_that_of_a_computation_in_float64(pair):
    report = compare(pair, [0.5], GIVEN, dtype="float32", extras=())
    ref, aligned, merged = (model.double() for model in (*pair.exact().sides, pair.merged(0.5)))
    kl = []
    with torch.no_grad():
        for p in encode(GIVEN, pair.tokenizer):
            ids = torch.tensor([[*p.ids, *p.completion]])
            h_ref, h_aligned, h = (m(ids).logits[0, len(p.ids) - 1 : -1] for m in (ref, aligned, merged))
            log_p, log_q = torch.log_softmax((h_ref + h_aligned) / 2, -1), torch.log_softmax(h, -1)
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    assert report.per_token[0.5]["kl"] == pytest.approx(np.array(kl), rel=1e-3, abs=1e-7)


def test_one_live_model_becomes_another_kind_of_merge_bit_for_bit(pair):
    model = pair.merged(0.5)
    for how in ({"dtype": "auto", "seed": 3}, {"dtype": "bfloat16", "rounding": "nearest"}, {}):
        for lam in (1.5, 0.25):
            live.live(pair, lam, onto=model, **how)
            fresh = pair.merged(lam, compute_dtype=torch.float32, **how)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)), how


def test_what_is_measured_before_an_interruption_is_kept_by_lambda(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(steps.ComparisonLab, "most_heads", 0)
    divided = steps.divergences
    monkeypatch.setattr(steps, "divergences", lambda *args: divided(*args) if args[1][0][0] != 2.0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(pair, LAMS, GIVEN, extras=(), unfinished=tmp_path)
    kept = {file.stem for file in tmp_path.rglob("*.npz")}
    assert kept == {"tokens-0.25", "tokens-0.5"}
    monkeypatch.setattr(steps, "divergences", divided)
    report = compare(pair, LAMS, GIVEN, extras=(), unfinished=tmp_path, resume=True)
    whole = compare(pair, LAMS, GIVEN, extras=())
    assert json.dumps(report.results) == json.dumps(whole.results)
