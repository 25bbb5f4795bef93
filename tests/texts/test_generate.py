"""Exact means no warper that nobody asked for, whatever a checkpoint's generation_config.json says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from commands import run
from transformers import set_seed

from dera_merge import DeraForCausalLM, ModelPair, demo
from dera_merge.texts.generate import decode

PROMPT, NEW, LAM = "The hotel is", 12, 0.5
QWEN = {"do_sample": True, "temperature": 0.7, "top_k": 1, "top_p": 0.8, "repetition_penalty": 1.05}
CONFIGS = [
    (1.0, QWEN), (0.0, QWEN), (0.5, {"min_p": 0.5, "no_repeat_ngram_size": 1}), (0.0, {"repetition_penalty": 5.0}),
    (1.0, {"suppress_tokens": list(range(2, 1000))}), (0.0, {"bad_words_ids": [[5], [6]], "num_beams": 3}),
    (1.0, {"sequence_bias": [[[7], 50.0]], "min_new_tokens": 11}), (1.0, {}),
]  # fmt: skip


@pytest.fixture
def configured(tmp_path):
    """The demo's dense pair, with a generation config of one's own."""

    def pair(config) -> ModelPair:
        aligned = shutil.copytree(demo.ALIGNED_DENSE, tmp_path / "aligned", dirs_exist_ok=True)
        (aligned / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **config}))
        return ModelPair.from_pretrained(demo.REF, aligned)

    return pair


@torch.no_grad()
def by_hand(pair: ModelPair, temperature: float, seed: int) -> list[int]:
    """Token by token, from the two models' logits: nothing of `generate`."""
    exact = pair.exact(LAM)
    ids = pair.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    set_seed(seed)
    while ids.shape[1] - start < NEW and (ids.shape[1] == start or int(ids[0, -1]) != 1):
        ref, aligned = (side(ids).logits[:, -1].float() for side in exact.sides)
        scores = (1 - LAM) * ref + LAM * aligned
        if temperature:
            token = torch.multinomial(torch.softmax(scores / temperature, -1), 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], -1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize(("temperature", "config"), CONFIGS, ids=[f"{t:g}-{'+'.join(c) or 'none'}" for t, c in CONFIGS])
def test_a_checkpoints_settings_do_not_reach_exact_texts(configured, temperature, config):
    pair = configured(config)
    text = decode(pair, LAM, PROMPT, temperature=temperature, max_new_tokens=NEW, seed=3)
    assert text["token_ids"] == by_hand(pair, temperature, 3)
    assert text["exact"] is True
    assert text["applied"] == ({"temperature": 0.5} if temperature == 0.5 else {})
    unheard = {"do_sample", "temperature"} | ({"top_k", "top_p"} if temperature == 0 else set())  # idle, or asked for
    assert text["left_out"] == {name: value for name, value in config.items() if name not in unheard}


def test_nobody_samples_of_the_fifty_likeliest_tokens_unasked(configured):
    """transformers takes top_k=50 where neither call nor checkpoint says anything."""
    exact = configured({}).exact(0.0)
    ids = torch.tensor([[5]]).repeat(400, 1)
    set_seed(0)
    drawn = exact.generate(ids, do_sample=True, max_new_tokens=1)[:, -1]
    likeliest = exact(ids[:1]).logits[0, -1].topk(50).indices
    assert not torch.isin(drawn, likeliest).all()
    set_seed(0)
    asked = exact.generate(ids, do_sample=True, top_k=50, max_new_tokens=1)[:, -1]
    assert torch.isin(asked, likeliest).all(), "who asks gets it"


def test_as_configured_is_what_transformers_does_with_the_config_and_is_not_called_exact(configured):
    pair = configured(QWEN | {"top_k": 5})
    text = decode(pair, LAM, PROMPT, as_configured=True, max_new_tokens=NEW, seed=3)
    exact = pair.exact(LAM, as_configured=True)
    ids = pair.tokenizer(PROMPT, return_tensors="pt")
    set_seed(3)
    expected = exact.generate(
        **{key: ids[key] for key in ("input_ids", "attention_mask")}, max_new_tokens=NEW, do_sample=True,
        temperature=0.7, top_k=5, top_p=0.8, repetition_penalty=1.05,
    )  # fmt: skip
    assert text["token_ids"] == expected[0, ids["input_ids"].shape[1] :].tolist()
    assert text["exact"] is False
    assert text["left_out"] == {}
    assert text["applied"] == {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.05}
    assert decode(pair, LAM, PROMPT, as_configured=True, temperature=2.0, max_new_tokens=1)["applied"]["temperature"] == 2.0
    assert decode(configured({"do_sample": True}), LAM, PROMPT, as_configured=True, max_new_tokens=1)["applied"] == {"top_k": 50}


def test_from_python_the_mixture_names_what_it_leaves_out(configured, tmp_path):
    pair = configured(QWEN)
    exact = pair.exact(LAM)
    assert exact.left_out == {name: value for name, value in QWEN.items() if name != "do_sample"}
    assert exact.generation_config.eos_token_id == 1, "where texts end is no warper"
    ids = pair.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    set_seed(3)
    new = exact.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)[0, ids.shape[1] :]
    assert new.tolist() == by_hand(pair, 1.0, 3)
    assert pair.exact(LAM, as_configured=True).generation_config.top_k == 1
    assert DeraForCausalLM(exact.ref, exact.aligned).left_out == exact.left_out
    for config in (QWEN, {"repetition_penalty": 5.0}):
        configured(config).exact(LAM).save_pretrained(tmp_path / "mixture")
        assert DeraForCausalLM.from_pretrained(tmp_path / "mixture").left_out


def test_the_command_line_names_what_applies(tmp_path):
    aligned = shutil.copytree(demo.ALIGNED_DENSE, tmp_path / "aligned")
    (aligned / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "pad_token_id": 0, **QWEN}))
    words = ["generate", demo.REF, aligned, "-l", 0.5, "--prompt", PROMPT, "--max-new-tokens", 4]
    done = run(*words, "--temperature", 1)
    assert "not applied: top_k=1, top_p=0.8, repetition_penalty=1.05" in done.stderr, done.stderr
    done = run(*words, "--as-configured", "--json")
    text = json.loads(done.stdout)
    assert text["exact"] is False
    assert text["applied"]["top_k"] == 1
