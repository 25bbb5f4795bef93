"""Scoring layer by layer, every λ in step, gives the figures of models that are held whole; it holds one unit's weights,
and reads each byte of the files once."""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers as tf
from builders import random_path, save_tokenizer, tiny_llama

from dera_merge import DeraError, ModelPair, compare
from dera_merge.measuring import in_step
from dera_merge.merging.hollow import hollow
from dera_merge.merging.parameters import Parameters
from dera_merge.merging.storage import Storage

GIVEN = [{"prompt": f"w{n} w{n + 1} w{n + 2}", "completion": "w7 w8 w9 w10"[: 3 * (n % 4) + 2]} for n in range(3, 12)]
LAMS = [0.5, 1.0, 2.0]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "a tied head, a soft cap, two kinds of layers": lambda: tf.Gemma2Config(
        **SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=4
    ),
    "gpt2, with transposed weights and learned positions": lambda: tf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "experts": lambda: tf.MixtralConfig(**SMALL, num_local_experts=4),
    "experts and a corrected router": lambda: tf.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1, n_group=1,
        topk_group=1, num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, moe_intermediate_size=16,
    ),
    "a decoder within the base model": lambda: tf.OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, ffn_dim=48,
        word_embed_proj_dim=16, init_std=0.3,
    ),
}  # fmt: skip


@contextmanager
def asked_for():
    """Bytes that the system gave of each file, counted where it is asked."""
    count, read = Counter(), os.preadv

    def counted(file, into, position):
        size = read(file, into, position)
        count[os.readlink(f"/proc/self/fd/{file}")] += size
        return size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counted)
        yield count


def both(pair, prompts=GIVEN, lams=LAMS, **how):
    """Per-token figures held whole, and layer by layer, which reads each byte of each tensor once and keeps none."""
    whole = compare(pair, lams, prompts, extras=(), **how).per_token
    with asked_for() as count:
        layered = compare(pair, lams, prompts, extras=(), max_memory=1, **how).per_token
    checkpoints = {checkpoint for side in pair.sides for checkpoint in side.checkpoints}
    assert sum(count.values()) == sum(info.nbytes for each in checkpoints for info in each.tensors.values())
    assert not any(each._held for each in checkpoints)
    return whole, layered


def equal(whole, layered, rel=None):
    for lam, row in whole.items():
        assert row.keys() == layered[lam].keys()
        for key, values in row.items():
            if rel is None:
                assert np.array_equal(values, layered[lam][key]), (lam, key)
            else:
                assert layered[lam][key] == pytest.approx(values, rel=rel, abs=1e-6), (lam, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_bit_for_bit_those_of_models_held_whole(family, tmp_path):
    for number, name in enumerate(("ref", "aligned")):
        torch.manual_seed(number)
        model = tf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
        with torch.no_grad():
            for buffer_name, buffer in model.named_buffers():
                if "correction" in buffer_name:
                    buffer.add_(0.3 * torch.randn_like(buffer))
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    pair = ModelPair.from_pretrained(tmp_path / "ref", tmp_path / "aligned")
    equal(*both(pair))


def test_so_are_those_of_an_adapter_beside_its_base(llama, lora):
    base = llama(0)
    equal(*both(ModelPair.from_pretrained(base, lora(base))))


@pytest.mark.parametrize("kind", ["on another adapter's base", "on experts"])
def test_other_adapters_kl_agrees_within_a_millionth(kind, llama, lora, tmp_path):
    base = llama(0)
    if kind == "on experts":
        torch.manual_seed(0)
        tf.MixtralForCausalLM(FAMILIES["experts"]()).to(torch.bfloat16).save_pretrained(tmp_path)
        save_tokenizer(tmp_path)
        pair = ModelPair.from_pretrained(tmp_path, lora(tmp_path, target_modules=["q_proj", "o_proj"]))
    else:
        pair = ModelPair.from_pretrained(lora(base, 1), lora(base, 2), base=base)
    whole, layered = both(pair)
    for lam in (0.5, 2.0):
        assert layered[lam]["kl"].mean() == pytest.approx(whole[lam]["kl"].mean(), rel=1e-6)


def test_a_small_change_of_the_head_alone_is_measured(llama, lora):
    base = llama(0)
    for figures in both(ModelPair.from_pretrained(base, lora(base, target_modules=["lm_head"], lora_alpha=0.004)), lams=[1.0]):
        assert figures[1.0]["kl_ref"].mean() > 0


def test_a_learned_path_and_another_batch_size(llama):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    path = random_path(pair, size=0.01)
    equal(*both(pair, lams=[0.5], path=path, batch_size=2))


def test_no_more_than_one_unit_has_weights_at_a_time(llama, monkeypatch):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    most = []
    going = in_step.InStep._go_on

    def watched(self, reader):
        most.append(sum(p.numel() for p in self.model.parameters() if not p.is_meta))
        going(self, reader)

    monkeypatch.setattr(in_step.InStep, "_go_on", watched)
    compare(pair, LAMS, GIVEN, extras=(), max_memory=1)
    layer = sum(p.numel() for p in tiny_llama(0).model.layers[0].parameters())
    assert 0 < max(most) <= layer


def test_parameters_are_those_of_a_live_model_bit_for_bit(llama, lora):
    base = llama(0)
    for aligned in (llama(1, near=0), lora(base)):
        pair = ModelPair.from_pretrained(base, aligned)
        made = Parameters(pair, 0.3, Storage.of(pair.names, "auto", None, 5))
        model = pair.merged(0.3, dtype="auto", seed=5)
        assert set(made) >= {name for name, _ in model.named_parameters()}
        assert all(torch.equal(made[name], p) for name, p in model.named_parameters())
        assert all(p.is_meta for p in hollow(pair, torch.float32).parameters())


def test_an_error_within_a_reader_comes_out_and_ends_the_others(llama):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    weights = [Parameters(pair, lam, Storage.of(pair.names, torch.float32, None, 0)) for lam in (0.0, 1.0)]
    model = hollow(pair, torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    with in_step.InStep(model, weights) as step:
        with pytest.raises(ZeroDivisionError):
            step.run([(0, lambda: model(ids).logits), (1, lambda: model(ids).logits.sum() / (1 // 0))])
        a, b = step.run([(0, lambda: model(ids).logits), (1, lambda: model(ids).logits)])
        for logits, side in zip((a, b), pair.exact().sides, strict=True):
            assert torch.equal(logits, side(ids).logits)
        with pytest.raises(DeraError, match="without passing through"):
            step.run([(0, lambda: model.lm_head.weight.sum().item())])


def test_a_file_that_breaks_off_is_said_and_no_thread_stays(llama, tmp_path):
    aligned = shutil.copytree(llama(1, near=0), tmp_path / "aligned")
    pair = ModelPair.from_pretrained(llama(0), aligned)
    running = set(threading.enumerate())
    model = pair.merged(0.3, offload=True)
    os.truncate(aligned / "model.safetensors", (aligned / "model.safetensors").stat().st_size - 8)
    for work in (lambda: compare(pair, LAMS, GIVEN, extras=(), max_memory=1), lambda: model(torch.tensor([[3, 4]]))):
        with pytest.raises(DeraError, match="the file is truncated"):
            work()
    assert set(threading.enumerate()) <= running


def test_what_takes_whole_models_is_refused_or_left_out(llama, caplog):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    caplog.set_level("INFO", logger="dera_merge")
    report = compare(pair, [0.5], GIVEN, extras=("floor", "predict"), max_memory="1KB")
    assert [record.getMessage() for record in caplog.records if "layer" in record.getMessage()]
    assert "noise_floor" not in report.results[0]
    assert report.prediction
    with pytest.raises(DeraError, match="--with coupled"):
        compare(pair, [0.5], GIVEN, extras=("coupled",), max_memory=1)
    with pytest.raises(DeraError, match="no size such as 8GB"):
        compare(pair, [0.5], GIVEN, extras=(), max_memory="much")
