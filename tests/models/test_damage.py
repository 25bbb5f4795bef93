"""Files that training or saving broke are refused with their cause, and never merged as if they were the base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from builders import tiny_llama
from safetensors.torch import load_file, save_file

from dera_merge import DeraError, DeraWarning, ModelPair, demo
from dera_merge.measuring.inspection import inspect_pair
from dera_merge.models import damage
from dera_merge.models.adapter import Adapter


def refusal(ref, aligned) -> str:
    with pytest.raises(DeraError) as caught:
        _ = ModelPair.from_pretrained(ref, aligned).names
    return str(caught.value)


def copy(source: Path, place: Path, change=None, **settings) -> Path:
    """A copy with its tensors changed by `change` (a dict → a dict), and settings of an adapter's config."""
    shutil.copytree(source, place)
    (file,) = place.glob("*model.safetensors")
    if change:
        save_file({k: v.contiguous().clone() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    if settings:
        config = json.loads((place / "adapter_config.json").read_text())
        (place / "adapter_config.json").write_text(json.dumps(config | settings))
    return place


def said_while_opening(ref, aligned) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeraWarning)
        _ = ModelPair.from_pretrained(ref, aligned).names
    return "\n".join(str(one.message) for one in caught if one.category is DeraWarning)


# Silently the base


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_of_which_one_factor_is_zero_everywhere_changes_nothing(tmp_path, factor):
    dead = copy(demo.ALIGNED_LORA, tmp_path / "dead", lambda t: {k: v * (factor not in k) for k, v in t.items()})
    assert f"{factor} are zero" in refusal(demo.REF, dead)
    alive = copy(demo.ALIGNED_LORA, tmp_path / "one", lambda t: {k: v * ("layers.1." in k) for k, v in t.items()})
    assert "of 21 of its 28 modules are zero" in said_while_opening(demo.REF, alive)


def test_an_adapter_of_scale_zero_changes_nothing(tmp_path):
    assert "lora_alpha is 0" in refusal(demo.REF, copy(demo.ALIGNED_LORA, tmp_path / "dead", lora_alpha=0))


@pytest.mark.parametrize(
    "config",
    [peft.LoraConfig(target_modules=["q_proj"]), peft.LoHaConfig(target_modules=["q_proj"]),
     peft.LoKrConfig(target_modules=["q_proj"]),
     peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=10),
     peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
     peft.MissConfig(target_modules=["q_proj"], r=4), peft.C3AConfig(target_modules=["q_proj"], block_size=4, init_weights=True)],
    ids=lambda config: config.peft_type.value,
)  # fmt: skip
def test_what_peft_begins_with_is_dead_and_its_forward_is_the_bases(tmp_path, config):
    ids = torch.arange(8)[None]
    before = tiny_llama(0)(ids).logits
    model = peft.get_peft_model(tiny_llama(0), config).eval()
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(model(ids).logits, before)
    new = Adapter(tmp_path / "new")
    assert damage.find_idle(new.config, new.checkpoint).all
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    model.save_pretrained(tmp_path / "trained")
    trained = Adapter(tmp_path / "trained")
    assert damage.find_idle(trained.config, trained.checkpoint) is None


def test_embeddings_that_were_trained_whole_are_a_change_beside_dead_factors(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(0), config)
    for name, parameter in model.named_parameters():
        parameter.data += 0.1 * ("modules_to_save" in name)
    model.save_pretrained(tmp_path / "new")
    adapter = Adapter(tmp_path / "new")
    idle = damage.find_idle(adapter.config, adapter.checkpoint)
    assert not idle.all
    assert "lora_B" in idle.why


def test_one_model_given_twice_is_refused_however_it_is_stored(tmp_path, llama):
    assert "Δ = 0" in refusal(demo.REF, demo.REF)
    assert "Δ = 0" in refusal(demo.REF, copy(demo.REF, tmp_path / "copy"))
    assert "Δ = 0" in refusal(demo.ALIGNED_LORA, copy(demo.ALIGNED_LORA, tmp_path / "lora", base_model_name_or_path=str(demo.REF)))
    assert "Δ = 0" in refusal(llama(0), llama(0, shard="20KB"))
    (tmp_path / "copy" / "pytorch_model.bin").touch()
    assert "pytorch_model.bin beside them is not read" in refusal(demo.REF, tmp_path / "copy")
    wide = copy(llama(0), tmp_path / "wide", lambda t: {k: v.float() for k, v in t.items()})
    pair = ModelPair.from_pretrained(llama(0), wide)  # other bytes of the same numbers: only a merge can tell
    assert inspect_pair(pair)["problem"].startswith("Δ = 0")
    with pytest.raises(DeraError, match="Δ = 0"):
        pair.merge(tmp_path / "out", [0.5])


def test_a_stale_file_beside_shards_is_refused_and_the_same_weights_twice_are_not(tmp_path, llama):
    """transformers reads the single file, so the trained weights in the shards would be left out."""
    both = shutil.copytree(llama(1, shard="20KB"), tmp_path / "both")
    shutil.copy(llama(0) / "model.safetensors", both)
    assert "two sets of weights" in refusal(llama(0), both)
    shutil.copy(llama(1) / "model.safetensors", both)
    assert ModelPair.from_pretrained(llama(0), both).names
    next(both.glob("model-00001*")).unlink()  # what is left of shards misleads nobody
    shutil.copy(llama(2) / "model.safetensors", both)
    assert ModelPair.from_pretrained(llama(0), both).names


def test_transformers_reads_the_single_file_beside_shards(tmp_path, llama):
    """What the refusal says of transformers."""
    from transformers import AutoModelForCausalLM

    both = shutil.copytree(llama(1, shard="20KB"), tmp_path / "both")
    shutil.copy(llama(0) / "model.safetensors", both)
    norm = AutoModelForCausalLM.from_pretrained(both).state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(norm, load_file(llama(0) / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])


def test_an_adapter_of_which_layers_are_missing_is_not_merged_as_the_base(tmp_path):
    half = copy(demo.ALIGNED_LORA, tmp_path / "half", lambda t: {k: v for k, v in t.items() if "layers.3." not in k})
    assert "modules that its config names (model.layers.3." in refusal(demo.REF, half)
    head = copy(demo.ALIGNED_LORA, tmp_path / "head", modules_to_save=["lm_head"])
    assert "(lm_head)" in refusal(demo.REF, head)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("model.layers", "model.language_model.layers", "the base's is model.layers.0"),
     ("lora_A.weight", "lora_A.default.weight", "state_dict()"), ("base_model.model.", "", "PEFT reads none of them"),
     ("base_model.model.", "base_model.model.base_model.model.", "begin twice"),
     ("model.layers", "model._orig_mod.layers", "inside of a wrapper")],
)  # fmt: skip
def test_an_adapter_whose_names_peft_would_not_read_is_refused(tmp_path, old, new, words):
    odd = copy(demo.ALIGNED_LORA, tmp_path / "odd", lambda t: {k.replace(old, new): v for k, v in t.items()})
    assert words in refusal(demo.REF, odd)


# Errors that name the cause


@pytest.mark.parametrize("source", [demo.ALIGNED_LORA, demo.ALIGNED_DENSE])
def test_tensors_that_were_not_gathered(tmp_path, source):
    odd = copy(source, tmp_path / "zero3", lambda t: {k: v if i else v.new_empty(0) for i, (k, v) in enumerate(t.items())})
    assert "without gathering the parameters" in refusal(demo.REF, odd)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel"), ("pretrained_model.", "value head"),
     ("base_model.model.", "merge_and_unload")],
)  # fmt: skip
def test_names_that_a_wrapper_left(tmp_path, prefix, words):
    odd = copy(demo.ALIGNED_DENSE, tmp_path / "odd", lambda t: {prefix + k: v for k, v in t.items()})
    assert words in refusal(demo.REF, odd)


def test_an_adapter_that_was_saved_unmerged_as_a_model(tmp_path):
    model = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(target_modules=["q_proj"]))
    tensors = {k.removeprefix("base_model.model."): v.contiguous() for k, v in model.state_dict().items()}
    tiny_llama(0).save_pretrained(tmp_path / "ref")
    shutil.copytree(tmp_path / "ref", tmp_path / "odd")
    save_file(tensors, tmp_path / "odd" / "model.safetensors", metadata={"format": "pt"})
    assert "not merged" in refusal(tmp_path / "ref", tmp_path / "odd")


@pytest.mark.parametrize("number", [0, 1])
def test_a_value_head_is_left_out_with_a_line(tmp_path, number):
    head = {"v_head.summary.weight": torch.zeros(1, 128), "v_head.summary.bias": torch.zeros(1)}
    sides = [demo.REF, demo.ALIGNED_DENSE]
    sides[number] = copy(sides[number], tmp_path / "ppo", lambda t: t | head)
    assert "value head (v_head, 2 tensors)" in said_while_opening(*sides)
    assert not any("v_head" in name for name in ModelPair.from_pretrained(*sides).tensors)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"peft_type": ["LORA"]}, "names no peft_type"), ({"rank_pattern": [1]}, "rank_pattern is"),
     ({"modules_to_save": "lm_head"}, "modules_to_save is"), ({"target_modules": 3}, "target_modules is")],
)  # fmt: skip
def test_settings_of_the_wrong_kind(tmp_path, settings, words):
    assert words in refusal(demo.REF, copy(demo.ALIGNED_LORA, tmp_path / "odd", **settings))


def test_the_adapter_of_a_reward_model(tmp_path):
    head = {"base_model.model.score.weight": torch.ones(1, 128)}
    reward = copy(demo.ALIGNED_LORA, tmp_path / "reward", lambda t: t | head, task_type="SEQ_CLS", modules_to_save=["score"])
    assert "a reward model or classifier" in refusal(demo.REF, reward)


def test_an_adapter_of_rank_0(tmp_path):
    def cut(tensors):
        return {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in tensors.items()}

    assert "holds nothing" in refusal(demo.REF, copy(demo.ALIGNED_LORA, tmp_path / "odd", cut, r=0))


def test_a_setting_that_peft_does_not_know_is_told_where_it_is_on(tmp_path):
    odd = copy(demo.ALIGNED_LORA, tmp_path / "on", use_marvels=True, peft_version="9.9")
    assert "sets use_marvels=True" in (said := said_while_opening(demo.REF, odd))
    assert "9.9" in said
    assert "marvels" not in said_while_opening(demo.REF, copy(demo.ALIGNED_LORA, tmp_path / "off", use_marvels=False))


def test_settings_that_are_known_are_those_of_peft():
    from dataclasses import fields

    assert {field.name for field in fields(peft.LoraConfig)} <= damage._KNOWN


def test_a_config_without_vocab_size_is_one_line(tmp_path):
    ref = copy(demo.REF, tmp_path / "ref")
    config = json.loads((ref / "config.json").read_text())
    del config["vocab_size"]
    (ref / "config.json").write_text(json.dumps(config))
    with pytest.raises(DeraError, match="states no vocab_size"):
        _ = ModelPair.from_pretrained(ref, demo.ALIGNED_LORA).vocab_size


def test_an_adapter_beside_a_full_model_is_told(tmp_path):
    both = shutil.copytree(demo.REF, tmp_path / "both")
    for file in demo.ALIGNED_LORA.glob("adapter*"):
        shutil.copy(file, both)
    assert "the adapter is read" in said_while_opening(demo.REF, both)
