"""In what models run: float32 where it fits, bfloat16 where only that does, and what 16 bits do not resolve is not told."""

from __future__ import annotations

import logging

import pytest
import torch
from builders import tiny_llama

from dera_merge import ModelPair, compare
from dera_merge.measuring import precision
from dera_merge.measuring.traces import Text, head_of, trace_of
from dera_merge.pages.fidelity import COLUMNS, cells, sentences

GIVEN = [{"prompt": f"w{n} w{n + 1}", "completion": "w7 w8 w9 w10"} for n in range(3, 9)]


@pytest.fixture(scope="module")
def near(llama):
    """A pair of which the merge is much nearer to exact DeRa than bfloat16 computes."""
    return ModelPair.from_pretrained(llama(0), llama(1, near=0))


@pytest.fixture(scope="module")
def narrow(near):
    return compare(near, [0.5, 1.0], GIVEN, extras=(), compute_dtype="bfloat16")


def test_auto_is_float32_where_it_fits_and_says_why_where_it_is_not(near, monkeypatch, caplog):
    weights = sum(info.numel for info in near.tensors.values())
    needed = int(precision.ROOM * 2 * 4 * weights)
    caplog.set_level(logging.INFO, logger="dera_merge")
    for free, dtype in ((None, torch.float32), (needed, torch.float32), (needed - 1, torch.bfloat16)):
        monkeypatch.setattr(precision, "available", lambda device, free=free: free)
        assert precision.chosen(near, "auto", "cpu") == dtype
        assert precision.chosen(near, "float32", "cpu") == precision.chosen(near, torch.float32, "cpu") == torch.float32
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("compute dtype bfloat16: in float32 2 models would take")
    assert compare(near, [0.5], GIVEN, extras=(), compute_dtype="auto").settings["compute_dtype"] == "bfloat16"


def test_tf32_is_off_while_figures_are_made_and_as_before_afterwards(near, monkeypatch):
    seen = []

    def reads(*args, **how):
        seen.append(torch.get_float32_matmul_precision())
        return trace_of(*args, **how)

    monkeypatch.setattr("dera_merge.measuring.steps.trace_of", reads)
    torch.set_float32_matmul_precision("high")
    try:
        compare(near, [0.5], GIVEN, extras=())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_heads_of_16_bit_models_compute_in_float32():
    model = tiny_llama(0).bfloat16()
    hidden = torch.randn(5, 32).bfloat16()
    assert torch.equal(head_of(model)(hidden), hidden.float() @ model.lm_head.weight.float().T)
    assert torch.equal(head_of(model, wide_head=False)(hidden), model.lm_head(hidden).float())
    heads: list[torch.nn.ModuleDict] = []
    for _ in range(2):  # one that equals it is used again
        trace_of(model, [Text(0, [3, 4, 5], 1)], heads)
    assert len(heads) == 1


def test_what_16_bits_do_not_resolve_is_told_as_no_more_than_that(near, narrow):
    wide = compare(near, [0.5], GIVEN, extras=()).results[0]
    result, end = narrow.results
    assert wide["kl"] > wide["resolution"]
    assert result["resolution"] == narrow.settings["resolution"] > 100 * wide["resolution"]
    assert result["kl_nonlinearity"] is None  # no model is held without rounding
    if result["kl"] < result["resolution"]:
        assert cells(result)[COLUMNS.index("kl")].startswith("≤ ")
        assert any("below what this measurement resolves" in text for text in sentences(result))
    below = {**result, "kl": result["resolution"] / 2}
    assert cells(below)[COLUMNS.index("kl")].startswith("≤ ")
    assert not cells(end)[COLUMNS.index("kl")].startswith("≤")  # nothing by construction
    noise = cells({**end, "kl": 3.5e-18, "kl_ci": [-3.1e-17, 4e-17], "kl_ref": -2e-17, "resolution": 1e-12})
    assert [noise[COLUMNS.index(name)] for name in ("kl", "kl_ci", "kl_ref")] == ["0", "0–0", "0"]


def test_a_gate_below_the_resolution_is_not_met_by_noise(narrow):
    resolution = narrow.settings["resolution"]
    assert narrow.gate(resolution / 2, None)["failed"] == [0.5]
    largest = max(row["kl"] for row in narrow.results)
    assert narrow.gate(max(resolution, largest), None)["passed"]
