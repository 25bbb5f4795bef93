"""Layers that lie on several devices: texts and figures are those of one device. Here a disk is one, and hooks are all."""

from __future__ import annotations

import shutil

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraForCausalLM, ModelPair, bench, compare, demo
from dera_merge.decoding import load
from dera_merge.merging import live
from dera_merge.models import spread

IDS = torch.tensor([[5, 9, 12, 33], [17, 3, 60, 22]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PROMPTS = [{"prompt": "The hotel", "completion": " was very good"}, {"prompt": "My cousin said", "completion": " so"}]


def of_layers(model: torch.nn.Module, last: str = "cpu") -> dict[str, str]:
    """A map of all modules: `last` for the last layer, else the CPU."""
    count = model.config.num_hidden_layers
    layers = {f"model.layers.{n}": "cpu" for n in range(count - 1)} | {f"model.layers.{count - 1}": last}
    return {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.fixture
def hooked(monkeypatch):
    """Every model that is loaded has the hooks of one that is spread; gives how many there were."""
    made = []

    def dispatched(model: torch.nn.Module) -> torch.nn.Module:
        made.append(model)
        return dispatch_model(model, of_layers(model), force_hooks=True)

    load_model, build = load.load_model, live._Dial.build
    monkeypatch.setattr(load, "load_model", lambda *args, **kwargs: dispatched(load_model(*args, **kwargs)))
    monkeypatch.setattr(live._Dial, "build", lambda *args: dispatched(build(*args)))
    return made


@pytest.mark.parametrize("aligned", [demo.ALIGNED_DENSE, demo.ALIGNED_LORA], ids=["dense", "lora"])
def test_hooks_between_devices_change_nothing(aligned, request):
    pair = ModelPair.from_pretrained(demo.REF, aligned)
    held = pair.exact()
    expected = held.generate(IDS, lam=[0.5, 2.0], **GREEDY)
    dialled = held.dial().generate(IDS, lam=[0.5, 2.0], **GREEDY) if held.rows is not None else None
    whole = compare(pair, [0.5, 2.0], PROMPTS, extras=())
    made = request.getfixturevalue("hooked")
    exact = pair.exact()
    assert torch.equal(exact.generate(IDS, lam=[0.5, 2.0], **GREEDY), expected)
    if dialled is not None:
        assert torch.equal(exact.dial().generate(IDS, lam=[0.5, 2.0], **GREEDY), dialled)
    made.clear()
    assert compare(pair, [0.5, 2.0], PROMPTS, extras=()).results == whole.results
    assert len(made) == (3 if aligned == demo.ALIGNED_DENSE else 2)


def test_hooks_between_devices_change_no_score(request, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(demo.FOLDER / "tasks", tmp_path / "demo" / "tasks").parents[1])
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    how = {"lams": [0.0, 0.5, 1.0], "merged": [0.5], "limit": 6, "include_path": "demo/tasks"}
    whole = bench(pair, ["praise"], **how)
    made = request.getfixturevalue("hooked")
    assert bench(pair, ["praise"], **how).to_dict() == whole.to_dict()
    assert made


def test_a_layer_on_a_disk_changes_no_token(tmp_path):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE)
    held = pair.exact(2.0)
    options = {"dtype": torch.float32, "device_map": of_layers(held.ref, "disk")}
    sides = [
        AutoModelForCausalLM.from_pretrained(folder, offload_folder=tmp_path / folder.name, **options)
        for folder in (demo.REF, demo.ALIGNED_DENSE)
    ]
    parted = DeraForCausalLM(*sides, 2.0)
    assert any(parameter.is_meta for parameter in parted.parameters())
    assert torch.equal(parted.generate(IDS, **GREEDY), held.generate(IDS, **GREEDY))


def test_on_a_machine_with_one_device_all_is_there(monkeypatch):
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    whole = compare(pair, [0.5], PROMPTS, extras=())
    with spread.over_all_devices() as main:
        assert main.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert compare(pair, [0.5], PROMPTS, extras=(), device=main).results == whole.results
        assert {parameter.device.type for parameter in pair.exact(device=main).parameters()} == {main.type}
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(DeraError, match="start one process on each"):
            spread.begin()
    assert spread.how() == {}


def test_what_does_not_fit_on_the_devices_is_refused():
    model = torch.nn.Linear(2, 2)
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    assert spread.checked(model) is model  # a map that somebody gave
    with spread.over_all_devices(), pytest.raises(DeraError, match="does not fit on all devices together"):
        spread.checked(model)
