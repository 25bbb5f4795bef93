"""What `inspect` says of a full model: how its files are laid out, and what will work on it."""

import json

import pytest
import torch
import transformers as tf
from builders import save_tokenizer
from safetensors.torch import load_file, save_file
from wrapped import tiny

from dera_merge.cli.inspection import _model_line
from dera_merge.measuring.inspection import describe

pytestmark = pytest.mark.core


def made(folder, model):
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_text_decoder_has_no_towers_and_all_works_but_images(llama):
    told = describe(str(llama(0)))
    assert told["layout"] == {"prefix": "model", "experts": None, "towers": {}, "mtp": 0, "head": True}
    assert told["works"] == {"merge": True, "exact": True, "generate": True, "images": "it reads text only", "one_pass": True}
    assert "no " not in _model_line(told)


def test_a_wrapped_class_has_its_prefix_its_tower_and_asks_for_a_processor(tmp_path):
    model = tiny("Qwen2_5_VL", 0)
    told = describe(str(made(tmp_path / "qwen", model)))
    assert told["architecture"] == "Qwen2_5_VLForConditionalGeneration"
    stored = load_file(tmp_path / "qwen" / "model.safetensors")
    (tower,) = told["layout"]["towers"].items()
    assert tower == ("visual", sum(t.numel() for n, t in stored.items() if n.startswith("visual.")))
    assert all(n.startswith(("visual.", told["layout"]["prefix"], "lm_head")) for n in stored)
    assert told["works"]["merge"] is told["works"]["generate"] is True
    assert told["works"]["images"] == "no processor lies beside it"
    assert "no images: no processor lies beside it" in _model_line(told)
    (tmp_path / "qwen" / "preprocessor_config.json").write_text("{}")
    assert describe(str(tmp_path / "qwen"))["works"]["images"] is True


def test_experts_and_layers_that_predict_further_tokens_are_named(tmp_path):
    torch.manual_seed(0)
    config = tf.MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                              num_key_value_heads=2, num_local_experts=4)  # fmt: skip
    folder = made(tmp_path / "mixtral", tf.MixtralForCausalLM(config))
    told = describe(str(folder))
    assert told["layout"]["experts"] == "one by one"
    assert "experts regroup" in told["works"]["one_pass"]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    more = {"mtp.fc.weight": torch.zeros(4, 4), "model.layers.2.input_layernorm.weight": torch.zeros(32)}
    save_file(tensors | more, file, metadata={"format": "pt"})
    assert describe(str(folder))["layout"]["mtp"] == 2
    fused = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 8, 4), "model.layers.0.mlp.experts.down_proj": torch.zeros(4, 4, 4)}
    save_file(fused, file, metadata={"format": "pt"})
    assert describe(str(folder))["layout"]["experts"] == "fused"


def test_what_is_refused_says_why_in_each_place_and_once_in_the_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}))
    save_file({"shared.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    told = describe(str(tmp_path))
    assert set(told["works"].values()) == {
        "T5ForConditionalGeneration, an encoder-decoder model; dera-merge takes decoders that write text, with or without "
        "images as input"
    }
    assert _model_line(told).count("encoder-decoder") == 1


def test_a_class_with_a_generate_of_its_own_merges_and_does_not_generate(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Kosmos2ForConditionalGeneration"], "model_type": "kosmos-2"}))
    save_file({"vision_model.a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    works = describe(str(tmp_path))["works"]
    assert works["merge"] is works["exact"] is True
    assert "generate of its own" in works["generate"]
