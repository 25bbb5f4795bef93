"""A directory that holds no model says what it holds instead, and what to do."""

from __future__ import annotations

import shutil

import pytest

from dera_merge import DeraError, ModelPair, demo
from dera_merge.files.places import inner_models, instead


def refusal(ref, aligned) -> str:
    with pytest.raises(DeraError) as caught:
        ModelPair.from_pretrained(ref, aligned)
    return str(caught.value)


@pytest.mark.parametrize(
    "folders",
    [("train", "reference"), ("checkpoint-500", "checkpoint-1000"), ("snapshots/abc",), ("models--a--b/snapshots/0f",)],
)
def test_models_inside_are_named(tmp_path, folders):
    for name in folders:
        shutil.copytree(demo.ALIGNED_LORA, tmp_path / name)
    said = refusal(demo.REF, tmp_path)
    assert all(name in said for name in folders)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1500, 500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "config.json").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "config.json").touch()
    assert inner_models(tmp_path) == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    assert instead(tmp_path).endswith("checkpoint-1500")  # the last step is the one that is proposed


def test_a_config_without_weights_leads_to_the_checkpoints_inside(tmp_path):
    shutil.copy(demo.REF / "config.json", tmp_path)
    shutil.copytree(demo.REF, tmp_path / "checkpoint-7")
    assert "checkpoint-7" in refusal(tmp_path, demo.ALIGNED_LORA)


@pytest.mark.parametrize(
    ("name", "words"),
    [("optimizer.pt", "training state"), ("trainer_state.json", "training state"), ("global_step40", "zero_to_fp32"),
     ("__0_0.distcp", "accelerate merge-weights"), ("pytorch_model_fsdp_0", "accelerate merge-weights"),
     ("model.Q4_K_M.gguf", "llama.cpp"), ("consolidated.00.pth", "convert"), ("model.fp16.safetensors", "model.safetensors")],
)  # fmt: skip
def test_a_training_state_and_other_formats_are_named(tmp_path, name, words):
    shutil.copy(demo.REF / "config.json", tmp_path)
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).touch()
    said = refusal(tmp_path, demo.ALIGNED_LORA)
    assert words in said
    assert name in said


def test_an_adapter_config_that_was_left_beside_a_merged_model(tmp_path):
    shutil.copytree(demo.ALIGNED_DENSE, tmp_path / "merged")
    shutil.copy(demo.ALIGNED_LORA / "adapter_config.json", tmp_path / "merged")
    assert "remove adapter_config.json" in refusal(demo.REF, tmp_path / "merged")


def test_an_adapter_of_mlx_and_a_web_address(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    (tmp_path / "adapters.safetensors").touch()
    assert "names no peft_type; it holds an adapter of MLX" in refusal(demo.REF, tmp_path)
    assert "give the Hub id" in refusal(demo.REF, "https://huggingface.co/me/model")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
     (b"<!DOCTYPE html><html></html>", "a web page"), (b"PK\x03\x04" + bytes(90), "--allow-pickle")],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_named(tmp_path, content, words):
    shutil.copytree(demo.REF, tmp_path / "ref")
    (tmp_path / "ref" / "model.safetensors").write_bytes(content)
    assert words in refusal(tmp_path / "ref", demo.ALIGNED_LORA)
