"""What `make test-models` says is so: a family that is right, a result that is off, and a process that dies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import check_models
import family_checks
import tiny_models

from dera_merge import ModelPair


def cells(family: str, sizes: tiny_models.Sizes) -> dict[str, dict[str, str]]:
    lines: list[dict] = []
    family_checks.check(family, sizes, 1, lines.append)
    return {line["cell"]: line for line in lines if "cell" in line}


def test_a_family_is_checked_in_all_of_its_cells_and_an_encoder_decoder_has_to_be_refused():
    found = cells("qwen3", tiny_models.Sizes(hidden=48, layers=3))
    assert list(found) == family_checks.NAMES
    assert {name for name, cell in found.items() if cell["state"] != "ok"} == {
        "layouts mixed", "layouts old names", *(f"experts {what}" for what in family_checks.CELLS["experts"])
    }  # fmt: skip
    (refused,) = cells("t5gemma2", tiny_models.Sizes()).values()
    assert refused["state"] == "refused"
    assert "encoder-decoder" in refused["why"]


def test_what_is_off_is_wrong_and_what_raises_is_a_crash(monkeypatch):
    exact = ModelPair.exact
    monkeypatch.setattr(ModelPair, "exact", lambda pair, lam, **kwargs: exact(pair, lam + 0.05, **kwargs))
    monkeypatch.setattr(ModelPair, "merged", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(family_checks, "ADAPTERS", ())
    found = cells("llama", tiny_models.Sizes())
    assert found["dense exact"]["state"] == "wrong"
    assert found["dense live"]["state"] == "crash"
    assert "ZeroDivisionError" in found["dense live"]["why"]
    assert found["dense merge"]["state"] == "ok"


def test_a_process_that_dies_is_a_crash_of_its_family_alone_and_the_page_says_so(monkeypatch):
    def dies(family, sizes, seed, say):
        if family != "mamba":
            say({"class": "SomeForCausalLM"})
            say({"cell": "dense merge", "state": "ok", "why": ""})
            say({"cell": "dense live", "state": "refused", "why": "it has no live form"})
        if family != "llama":
            os._exit(3)

    monkeypatch.setattr(check_models, "check", dies)
    records: list[dict] = []
    check_models.run(["llama", "qwen3", "mamba"], tiny_models.Sizes(), 0, 2, 60.0, records.append)
    llama, mamba, qwen3 = sorted(records, key=lambda record: record["family"])
    assert {name: cell["state"] for name, cell in llama["cells"].items()} == {"dense merge": "ok", "dense live": "refused"}
    assert qwen3["cells"]["dense merge"]["state"] == "ok"
    assert qwen3["cells"]["DoRA merge"] == {"state": "crash", "why": "ended with 3"}
    assert mamba["unbuilt"] == "ended with 3"
    page = check_models.written(records, {"seed": 0, "sizes": {}, "versions": {}})
    assert "| llama (SomeForCausalLM) | ● | refused[^1] |" in page
    assert "[^1]: it has no live form" in page
    assert "- mamba: ended with 3" in page


@pytest.mark.parametrize("family", ["jamba", "deepseek_v3", "qwen2_vl"])
def test_a_tiny_model_has_a_layer_of_each_kind_and_depends_on_its_seed(family):
    sizes = tiny_models.Sizes(hidden=64, vocab=100)
    one, same, other = (tiny_models.tiny_model(family, sizes, seed) for seed in (0, 0, 1))
    assert one.config.get_text_config().hidden_size == 64
    assert sum(parameter.numel() for parameter in one.parameters()) < 1e6
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
