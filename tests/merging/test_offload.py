"""Weights on demand: a model that holds no more than a layer computes what a live one does, bit for bit."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from builders import save_tokenizer

from dera_merge import ModelPair
from dera_merge.files.checkpoint import Checkpoint

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module", params=["dense", "lora", "tied", "experts"])
def pair(request, llama, lora, tmp_path_factory):
    if request.param == "experts":
        folder = tmp_path_factory.mktemp("experts")
        for number in range(2):
            torch.manual_seed(number)
            model = tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, num_local_experts=4))
            model.to(torch.bfloat16).save_pretrained(folder / str(number))
            save_tokenizer(folder / str(number))
        return ModelPair.from_pretrained(folder / "0", folder / "1")
    base = llama(0, tie_word_embeddings=request.param == "tied")
    near = llama(1, near=0, tie_word_embeddings=request.param == "tied")
    return ModelPair.from_pretrained(base, lora(base) if request.param == "lora" else near)


@torch.no_grad()
def test_logits_are_those_of_a_live_model_at_any_lambda_and_nothing_stays(pair):
    model = pair.merged(0.3, offload=True, dtype="auto", seed=3, compute_dtype=torch.float32)
    for lam in (0.3, 2.0, 0.0):
        model.set_lam(lam)
        live = pair.merged(lam, dtype="auto", seed=3, compute_dtype=torch.float32)
        assert torch.equal(model(IDS).logits, live(IDS).logits)
        held = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if not parameter.is_meta}
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        assert held.keys() == {"model.embed_tokens.weight", *tied}
        assert len(set(held.values())) == 1


@torch.no_grad()
def test_exact_dera_of_it_generates_what_exact_dera_generates(pair):
    exact, other = pair.exact(offload=True), pair.exact()
    for lam in (0.5, 2.0):
        torch.testing.assert_close(exact(IDS, lam=lam).logits, other(IDS, lam=lam).logits, rtol=1e-4, atol=1e-4)
        texts = [model.generate(IDS, lam=lam, max_new_tokens=6, do_sample=False, pad_token_id=0) for model in (exact, other)]
        assert torch.equal(*texts)


@torch.no_grad()
def test_one_side_alone_is_read_from_its_own_files(llama, monkeypatch):
    pair, read = ModelPair.from_pretrained(llama(0), llama(1, near=0)), []
    exact = pair.exact(offload=True)
    hold = Checkpoint.hold
    monkeypatch.setattr(Checkpoint, "hold", lambda self, name: read.append((self.folder, name)) or hold(self, name))
    exact.ref(IDS)
    assert {folder for folder, _ in read} == {pair.ref.base.folder}
    read.clear()
    exact.aligned(IDS)
    assert {folder for folder, _ in read} == {pair.aligned.base.folder}
    assert len(set(read)) == len(read)


@torch.no_grad()
def test_a_side_that_is_wider_than_the_reference_is_not_rounded_to_it(llama):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0, dtype=torch.float32))
    assert torch.equal(pair.merged(1.0, offload=True)(IDS).logits, pair.merged(1.0)(IDS).logits)
