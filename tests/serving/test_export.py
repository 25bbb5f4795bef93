"""export-exact: both models of a pair in one directory, without copying them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import families
import pytest
import torch
import wrapped
from builders import VOCAB, save_tokenizer, weights
from commands import run
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraForCausalLM, ModelPair, demo

IDS = torch.tensor([[5, 9, 33, 7], [8, 2, 61, 60]])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def mixed(ref, aligned, lam: float) -> torch.Tensor:
    return (1 - lam) * logits(ref) + lam * logits(aligned)


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_an_exported_pair_decodes_exactly_and_shares_its_bytes_with_the_sources(llama, tmp_path):
    ref, aligned = llama(0, torch.float32, shard="20KB"), llama(1, torch.float32, near=0)
    made = ModelPair.from_pretrained(ref, aligned).export_exact(tmp_path / "out", 0.3)
    assert made["copied"] == 0
    assert made["linked"] == sum(file.stat().st_size for side in (ref, aligned) for file in side.glob("*.safetensors"))
    for name, side in (("ref", ref), ("aligned", aligned)):
        for file in side.glob("*.safetensors"):
            assert (tmp_path / "out" / name / file.name).samefile(file)
    model = DeraForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), mixed(plain(ref), plain(aligned), 0.3))


def test_an_exported_directory_can_be_moved(llama, lora, tmp_path):
    base = llama(0, torch.float32)
    adapter = lora(base)
    ModelPair.from_pretrained(base, adapter).export_exact(tmp_path / "out", 0.5)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text().partition('"exported"')[0]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "exact")
    model = DeraForCausalLM.from_pretrained(tmp_path / "elsewhere" / "exact")
    torch.testing.assert_close(logits(model), mixed(plain(base), PeftModel.from_pretrained(plain(base), adapter), 0.5))


def test_an_engine_is_told_of_no_warper(tmp_path):
    aligned = shutil.copytree(demo.ALIGNED_DENSE, tmp_path / "aligned")
    said = {"eos_token_id": 1, "pad_token_id": 0, "do_sample": True}
    (aligned / "generation_config.json").write_text(json.dumps(said | {"top_k": 20, "repetition_penalty": 1.05}))
    ModelPair.from_pretrained(demo.REF, aligned).export_exact(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == said


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("other_base", [False, True])
def test_a_requantised_base_is_exported_as_exact_decoding_has_it(other_base, looked, tmp_path):
    """QLoRA's base, REF itself or a copy of it elsewhere: the export computes what `pair.exact` computes, whatever was
    looked at before. The demo pair, for 4 bits change its weights by far more than rounding does.
    """
    pytest.importorskip("bitsandbytes")
    base = demo.REF
    if other_base:
        base = tmp_path / "copy"
        shutil.copytree(demo.REF, base)
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA, base=base, base_quantization="nf4")
    if looked:
        assert pair.tensors
    made = pair.export_exact(tmp_path / "out", 0.5)
    assert made["linked"] == 0
    model, exact = DeraForCausalLM.from_pretrained(tmp_path / "out"), pair.exact()
    full = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA, base_quantization="none").exact()
    for lam in (0.0, 1.0):
        ours, theirs, dense = (each(IDS, lam=lam).logits for each in (model, exact, full))
        assert (ours - theirs).abs().max() < 0.2  # its weights are stored in bfloat16
        assert (ours - theirs).abs().max() < 0.2 * (dense - theirs).abs().max()


def test_a_copy_does_not_change_with_its_source(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1))
    made = pair.export_exact(tmp_path / "out", copy=True)
    assert made["linked"] == 0
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "out").rglob("*.safetensors"))


def test_where_links_are_not_allowed_files_are_copied(llama, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    made = ModelPair.from_pretrained(llama(0), llama(1)).export_exact(tmp_path / "out")
    assert made["linked"] == 0
    assert weights(tmp_path / "out" / "aligned").keys() == weights(llama(1)).keys()


@pytest.mark.parametrize("both", [False, True])
def test_adapters_stay_adapters_over_one_base(llama, lora, tmp_path, both):
    base = llama(0, torch.float32)
    ref, aligned = (lora(base, 1) if both else base), lora(base, 2)
    made = ModelPair.from_pretrained(ref, aligned).export_exact(tmp_path / "out", 2)
    assert made["held_once"]
    models = {file.parent.name for file in (tmp_path / "out").rglob("model.safetensors")}
    assert models == ({"base"} if both else {"ref"})
    model = DeraForCausalLM.from_pretrained(tmp_path / "out")
    reference = PeftModel.from_pretrained(plain(base), ref) if both else plain(base)
    expected = mixed(reference, PeftModel.from_pretrained(plain(base), aligned), 2)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


WIDER = [{"use_dora": True}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}]


@pytest.mark.parametrize("options", WIDER)
def test_an_adapter_that_is_more_than_ba_on_linear_layers_is_stored_whole(llama, lora, tmp_path, options):
    base = llama(0, torch.float32)
    adapter = lora(base, **options)
    made = ModelPair.from_pretrained(base, adapter).export_exact(tmp_path / "out", 0.5)
    assert not made["held_once"]
    assert not list((tmp_path / "out").rglob("adapter_config.json"))
    model = DeraForCausalLM.from_pretrained(tmp_path / "out")
    expected = mixed(plain(base), PeftModel.from_pretrained(plain(base), adapter), 0.5)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_merge_adapter_stores_any_adapter_whole(llama, lora, tmp_path):
    base = llama(0, torch.float32)
    made = ModelPair.from_pretrained(base, lora(base)).export_exact(tmp_path / "out", merge_adapter=True)
    assert not made["held_once"]
    assert (tmp_path / "out" / "aligned" / "model.safetensors").is_file()


def test_the_config_is_what_an_engine_looks_for(llama, tmp_path):
    ModelPair.from_pretrained(llama(0), llama(1)).export_exact(tmp_path / "out", 0.25)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["lam"]) == ("dera", ["DeraForCausalLM"], 0.25)
    assert (config["dtype"], config["text_config"]["vocab_size"], config["eos_token_id"]) == ("bfloat16", VOCAB, 1)
    assert config["pair"] == {"ref": "ref", "aligned": "aligned"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_only_what_it_wrote_itself_is_replaced(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1))
    pair.export_exact(tmp_path / "out", 0.25)
    with pytest.raises(DeraError, match="--overwrite replaces it"):
        pair.export_exact(tmp_path / "out", 0.5)
    pair.export_exact(tmp_path / "out", 0.5, overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lam"] == 0.5
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").write_text("mine")
    with pytest.raises(DeraError, match="not written by export-exact"):
        pair.export_exact(other, overwrite=True)
    pair.exact(0.5).save_pretrained(tmp_path / "saved")
    with pytest.raises(DeraError, match="not written by export-exact"):
        pair.export_exact(tmp_path / "saved", overwrite=True)
    with pytest.raises(DeraError, match="lies in the input"):
        pair.export_exact(llama(0) / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "saved"]


@pytest.mark.parametrize("kind", ["Qwen3_5", "lfm2"])
def test_models_that_keep_more_than_keys_and_values_are_refused_before_anything_is_written(kind, tmp_path):
    for seed, name in enumerate(("ref", "aligned")):
        layers = {"layer_types": ["conv", "full_attention"]}
        model = wrapped.tiny(kind, seed) if kind in wrapped.WRAPPED else families.build(kind, seed, **layers)
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    with pytest.raises(DeraError, match="keeps more than keys and values") as refusal:
        ModelPair.from_pretrained(tmp_path / "ref", tmp_path / "aligned").export_exact(tmp_path / "out" / "exact")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_of_a_class_that_wraps_a_text_decoder_the_config_shows_an_engine_the_decoder(tmp_path):
    for seed, name in enumerate(("ref", "aligned")):
        wrapped.tiny("Gemma3", seed).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    ModelPair.from_pretrained(tmp_path / "ref", tmp_path / "aligned").export_exact(tmp_path / "out", 0.3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["text_config"]["model_type"], config["text_config"]["num_attention_heads"]) == ("gemma3_text", 4)
    ref, aligned = (wrapped.class_of("Gemma3").from_pretrained(tmp_path / name).eval() for name in ("ref", "aligned"))
    model = DeraForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), mixed(ref, aligned, 0.3))


@pytest.mark.parametrize(("kind", "targets", "once"), [
    ("Gemma3", r".*language_model.*q_proj", True), ("Gemma3", r".*q_proj", False), ("qwen3_moe", r".*q_proj", False),
])  # fmt: skip
def test_an_adapter_is_held_once_where_an_engine_can(kind, targets, once, tmp_path):
    """Not where it changes a tower, which is not made for text, nor beside experts, whose weights an engine turns."""
    model = wrapped.tiny(kind, 0) if kind in wrapped.WRAPPED else families.build(kind, 0)
    model.save_pretrained(tmp_path / "ref")
    save_tokenizer(tmp_path / "ref")
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).save_pretrained(tmp_path / "lora")
    made = ModelPair.from_pretrained(tmp_path / "ref", tmp_path / "lora").export_exact(tmp_path / "out", 0.5)
    assert made["held_once"] == once


def test_a_failure_leaves_nothing(llama, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(DeraError, match="No space left"):
        ModelPair.from_pretrained(llama(0), llama(1)).export_exact(tmp_path / "out", copy=True)
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_to_serve_what_it_wrote(llama, lora, tmp_path):
    base = llama(0)
    out = tmp_path / "an exact pair"
    made = run("export-exact", base, lora(base), "-l", 0.5, "-o", out)
    assert made.returncode == 0, made.stderr
    assert f"vllm serve '{out}'" in made.stdout
    again = run("export-exact", base, lora(base), "-l", 0.5, "-o", out, "--json")
    assert (again.returncode, again.stdout) == (1, "")
    assert "--overwrite" in again.stderr
    final = run("export-exact", base, lora(base), "-l", "0.5", "-o", out, "--overwrite", "--json")
    assert json.loads(final.stdout).keys() == {"ref", "aligned", "path", "lambda", "held_once", "linked", "copied"}
