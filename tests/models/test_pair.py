"""What belongs together, and what is refused: with the first mismatch by name and both values."""

import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders import tokenizer, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, DeraForCausalLM, DeraWarning, ModelPair

pytestmark = pytest.mark.core


def edit(folder, file, change):
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))


def edit_tensors(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.fixture
def copied(llama, tmp_path):
    """(reference, a copy of the aligned model to spoil)."""
    shutil.copytree(llama(1), tmp_path / "aligned")
    return llama(0), tmp_path / "aligned"


@pytest.fixture
def adapted(llama, lora, tmp_path):
    """(base, a copy of a LoRA to spoil)."""
    shutil.copytree(lora(llama(0)), tmp_path / "adapter")
    return llama(0), tmp_path / "adapter"


def refusal(ref, aligned, **options):
    with pytest.raises(DeraError) as error:
        _ = ModelPair.from_pretrained(ref, aligned, **options).tensors
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shapes_that_differ(llama):
    message = refusal(llama(0), llama(0, intermediate_size=40))
    assert "mlp" in message
    assert "48" in message
    assert "40" in message


def test_heads_that_differ(llama):
    assert "num_attention_heads is 4" in refusal(llama(0), llama(0, num_attention_heads=8, num_key_value_heads=8))


def test_architectures_that_differ(copied):
    ref, aligned = copied
    edit(aligned, "config.json", lambda c: c.update(architectures=["MistralForCausalLM"]))
    message = refusal(ref, aligned)
    assert "LlamaForCausalLM" in message
    assert "MistralForCausalLM" in message


def test_missing_and_extra_tensors(copied):
    ref, aligned = copied
    edit_tensors(aligned, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "no tensor model.layers.1.mlp.up_proj.weight" in refusal(ref, aligned)
    assert "no tensor model.layers.1.mlp.up_proj.weight" in refusal(aligned, ref)


def test_token_ids_that_disagree(copied):
    ref, aligned = copied
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, 64)}}
    words["w5"], words["w6"] = 6, 5
    tokenizer(words).save_pretrained(aligned)
    assert "'w5' is 5 in REF and 6 in ALIGNED" in refusal(ref, aligned)


def test_a_quantised_checkpoint(copied):
    ref, aligned = copied
    edit(aligned, "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    edit_tensors(aligned, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 8, dtype=torch.int32)}))
    assert "quantised (gptq)" in refusal(ref, aligned)


def test_a_changed_chat_template_warns_and_aligned_wins(copied):
    ref, aligned = copied
    (aligned / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.warns(DeraWarning, match="chat templates differ"):
        pair = ModelPair.from_pretrained(ref, aligned)
    assert pair.tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_another_rope_warns_however_it_is_spelled(copied):
    ref, aligned = copied
    edit(aligned, "config.json", lambda c: (c.pop("rope_parameters", None), c.update(rope_theta=10000.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeraWarning)
        ModelPair.from_pretrained(ref, aligned)  # the same value in transformers 4's spelling
    edit(aligned, "config.json", lambda c: c.update(rope_theta=500000.0))
    with pytest.warns(DeraWarning, match="rope"):
        ModelPair.from_pretrained(ref, aligned)


def test_a_size_that_is_no_number(copied):
    ref, aligned = copied
    edit(aligned, "config.json", lambda c: c.update(vocab_size="64"))
    assert "vocab_size is '64'" in refusal(ref, aligned)
    edit(aligned, "config.json", lambda c: c.update(vocab_size=64, quantization_config=None))
    assert ModelPair.from_pretrained(ref, aligned).tensors


def test_a_base_of_another_name_warns_and_ref_is_the_base(llama, lora):
    adapter = lora(llama(0))
    with pytest.warns(DeraWarning, match="as its base"):
        pair = ModelPair.from_pretrained(llama(2), adapter)
    assert pair.shared_base
    assert pair.aligned.base.folder == llama(2)


def test_an_adapter_names_its_base_relative_to_itself(llama, lora, tmp_path):
    shutil.copytree(llama(0), tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(lora(llama(0), seed=seed), tmp_path / name)
        edit(tmp_path / name, "adapter_config.json", lambda c: c.update(base_model_name_or_path="../base"))
    pair = ModelPair.from_pretrained(tmp_path / "one", tmp_path / "two")
    assert pair.shared_base
    assert pair.ref.base.folder == tmp_path / "base"


def test_an_adapter_on_a_merged_sft_adapter(llama, lora, tmp_path):
    """The usual way of DPO after SFT with LoRA: merge the SFT adapter, train another on the result."""
    base = llama(0, dtype=torch.float32)
    (sft,) = ModelPair.from_pretrained(base, lora(base, 3)).merge(tmp_path / "sft", [1.0])
    dpo = lora(sft, 4)
    pair = ModelPair.from_pretrained(sft, dpo)
    (out,) = pair.merge(tmp_path / "out", [0.0])
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(sft).items())


def test_an_adapter_for_another_base(llama, lora):
    assert "does not fit the base" in refusal(llama(0, hidden_size=16, head_dim=8), lora(llama(0)))
    assert "which the base model does not have" in refusal(llama(0, num_hidden_layers=1), lora(llama(0)))


SPOILED = {
    "half a pair": (lambda t: t.pop(next(k for k in t if "lora_B" in k)), "no lora_B"),
    "an unknown key": (lambda t: t.update({"base_model.model.x.odd": torch.ones(1)}), "odd"),
    "NaN": (lambda t: next(iter(t.values())).fill_(float("nan")), "NaN"),
    "nothing": (lambda t: t.clear(), "no tensors"),
    "DoRA's magnitudes": (
        lambda t: t.update({next(iter(t)).replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}), "magnitude"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILED)
def test_a_broken_adapter(adapted, kind):
    change, message = SPOILED[kind]
    base, adapter = adapted
    edit_tensors(adapter, change, "adapter_model.safetensors")
    assert message in refusal(base, adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 3}, "has rank 4, but adapter_config.json says 3"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"use_dora": True}, "lora_magnitude_vector; PEFT would silently use the base there"),
        ({"peft_type": "IA3"}, "ia3_l; PEFT would silently use the base there"),
        ({"peft_type": "OSF"}, "OSF adapters are not merged"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_an_adapter_config_that_lies_or_cannot_be_merged(adapted, change, message):
    base, adapter = adapted
    edit(adapter, "adapter_config.json", lambda c: c.update(change))
    assert message in refusal(base, adapter)


def test_an_adapter_that_peft_would_load_in_part_is_refused_for_exact_decoding(adapted):
    base, adapter = adapted
    edit_tensors(adapter, lambda t: t.pop(next(k for k in t if "lora_B" in k)), "adapter_model.safetensors")
    with pytest.raises(DeraError, match="lacks .*lora_B"):
        ModelPair.from_pretrained(base, adapter).exact()


def test_pickled_checkpoints_need_permission(llama, tmp_path):
    shutil.copytree(llama(1), tmp_path / "bin")
    torch.save(load_file(tmp_path / "bin" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    assert "--allow-pickle" in refusal(llama(0), tmp_path / "bin")
    pair = ModelPair.from_pretrained(llama(0), tmp_path / "bin", allow_pickle=True)
    (out,) = pair.merge(tmp_path / "out", [1.0])
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(llama(1)).items())


def test_vocabularies_padded_differently_share_their_common_rows(llama, tmp_path):
    ref, aligned = llama(0), llama(1, vocab_size=72)
    pair = ModelPair.from_pretrained(ref, aligned)
    (out,) = pair.merge(tmp_path / "out", [0.5], dtype="float32")
    name = "model.embed_tokens.weight"
    expected = (weights(ref)[name].double() + weights(aligned)[name][:64].double()) / 2
    torch.testing.assert_close(weights(out)[name].double(), expected, rtol=1e-7, atol=0)
    assert pair.exact(0.5)(torch.tensor([[5]])).logits.shape[-1] == 64
    (wide,) = ModelPair.from_pretrained(aligned, ref).merge(tmp_path / "wide", [0.5])
    assert torch.equal(weights(wide)[name][64:], weights(aligned)[name][64:])
    assert AutoModelForCausalLM.from_pretrained(wide).config.vocab_size == 72


def test_tokens_that_only_aligned_has_are_refused_except_at_lambda_1(llama, tmp_path):
    shutil.copytree(llama(1, vocab_size=72), tmp_path / "aligned")
    tokenizer({"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, 70)}}).save_pretrained(tmp_path / "aligned")
    pair = ModelPair.from_pretrained(llama(0), tmp_path / "aligned")
    with pytest.raises(DeraError, match="only λ=1"):
        pair.merge(tmp_path / "out", [0.5, 1])
    with pytest.raises(DeraError, match="no embedding"):
        pair.exact(0.5)
    (out,) = pair.merge(tmp_path / "out", [1])
    assert all(torch.equal(tensor, weights(out)[name]) for name, tensor in weights(tmp_path / "aligned").items())


def test_a_tied_and_a_spelled_out_head_are_one_tensor_if_they_are_equal(llama, tmp_path):
    tied = llama(0, tie_word_embeddings=True)
    shutil.copytree(tied, tmp_path / "spelled")
    edit_tensors(tmp_path / "spelled", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in ModelPair.from_pretrained(tied, tmp_path / "spelled").tensors
    edit_tensors(tmp_path / "spelled", lambda t: t["lm_head.weight"].mul_(2))
    pair = ModelPair.from_pretrained(tied, tmp_path / "spelled")
    (out,) = pair.merge(tmp_path / "out", [0.5], dtype="float32")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(weights(out)["lm_head.weight"], 1.5 * weights(tied)["model.embed_tokens.weight"].float())


def test_hub_ids_that_cannot_be_had_are_one_line():
    message = refusal("someone/no-such-model", "someone/other")
    assert message.startswith("there is no directory someone/no-such-model, and as a model of the Hub it could not be had")


def test_a_slip_of_the_finger_is_told_what_is_near(tmp_path, monkeypatch):
    for name in ("reference", "aligned", ".hidden", "checkpoint-10", "checkpoint-9"):
        (tmp_path / name).mkdir()
    missing = tmp_path / "refrence"
    assert refusal(missing, missing) == f"there is no directory {missing} (near are {tmp_path / 'reference'})"
    missing = tmp_path / "zzz"
    assert refusal(missing, missing).endswith(f"({tmp_path} holds aligned, checkpoint-9, checkpoint-10, reference)")
    monkeypatch.chdir(tmp_path.parent)
    typed = f"{tmp_path.name}/refrence"  # which could be an id too
    near = f"(near are {tmp_path.name}/reference)"
    assert refusal(typed, typed) == f"there is no directory {typed} {near}, nor a model of that name that could be had from the Hub"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_paths_that_do_not_exist(name):
    assert refusal(name, name) == f"there is no directory {name}"


# Good pairs that look different: what transformers makes of two files is what counts


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c.pop("head_dim"), id="no head_dim"),
        pytest.param(lambda c: c.pop("attention_bias"), id="no attention_bias"),
        pytest.param(lambda c: c.update(rope_scaling=None, rope_theta=10000.0) or c.pop("rope_parameters"), id="rope of 4.x"),
        pytest.param(lambda c: c.update(torch_dtype=c.pop("dtype")), id="torch_dtype"),
        pytest.param(lambda c: c.update(sliding_window=None), id="a key that is null"),
    ],
)
def test_a_key_that_another_release_leaves_out_or_spells_otherwise_is_no_difference(llama, tmp_path, side, change):
    folders = [llama(0), llama(1, near=0)]
    copied = tmp_path / "copied"
    shutil.copytree(folders[side], copied)
    edit(copied, "config.json", change)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pair = ModelPair.from_pretrained(*(copied if number == side else folder for number, folder in enumerate(folders)))
    said = [str(w.message) for w in seen if issubclass(w.category, DeraWarning) and "sliding_window" not in str(w.message)]
    assert said == []
    pair.merge(tmp_path / "out", [0.5])
    plain = ModelPair.from_pretrained(*folders)
    plain.merge(tmp_path / "plain", [0.5])
    assert all((t == weights(tmp_path / "plain")[n]).all() for n, t in weights(tmp_path / "out").items())


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.weight"])
def test_a_tensor_that_no_model_uses_may_be_on_one_side_and_refs_bits_stay(llama, tmp_path, side, name):
    folders = [llama(0, torch.float32), llama(1, torch.float32, near=0)]
    copied, extra = tmp_path / "copied", torch.arange(4.0)
    shutil.copytree(folders[side], copied)
    edit_tensors(copied, lambda tensors: tensors.update({name: extra}))
    pair = ModelPair.from_pretrained(*(copied if number == side else folder for number, folder in enumerate(folders)))
    with pytest.warns(DeraWarning, match=f"only one side has {name}, which no model that transformers builds uses"):
        pair.merge(tmp_path / "out", [0.5])
    merged = weights(tmp_path / "out")
    if side == 0:
        assert torch.equal(merged.pop(name), extra)
    both = [weights(folder) for folder in folders]
    assert merged.keys() == both[0].keys()
    assert all(torch.allclose(t, (both[0][n] + both[1][n]) / 2, atol=1e-7) for n, t in merged.items())
    live = pair.merged(0.0)
    live.set_lam(0.5)
    ids = torch.tensor([[5, 9, 33]])
    file = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(live(ids).logits, file(ids).logits)


def test_pairs_can_be_opened_and_loaded_in_several_threads(llama, lora):
    """transformers' loading cannot (its heads come out untied, its tensors without memory), so ours waits its turn."""
    base = llama(0, tie_word_embeddings=True)
    adapter = lora(base, target_modules=["q_proj"])
    pair, ids = ModelPair.from_pretrained(base, adapter), torch.tensor([[5, 9, 33]])
    expected = pair.exact(0.5)(ids).logits

    def load(number: int) -> torch.Tensor:
        opened = pair if number % 2 else ModelPair.from_pretrained(base, adapter)
        return (opened.exact(0.5) if number < 6 else opened.merged(0.5))(ids).logits

    with ThreadPoolExecutor(8) as threads:
        logits = list(threads.map(load, range(8)))
    for each in logits[:6]:
        assert torch.equal(each, expected)
    assert torch.equal(*logits[6:])


def test_a_vocabulary_that_differs_is_seen_beside_an_equal_stale_file(llama, tmp_path):
    folders = []
    for number, seed in enumerate((0, 1)):
        folders.append(tmp_path / str(number))
        shutil.copytree(llama(seed), folders[-1])
        (folders[-1] / "vocab.txt").write_text("w2\nw3\n")

    def swap(data):
        vocabulary = data["model"]["vocab"]
        vocabulary["w5"], vocabulary["w6"] = vocabulary["w6"], vocabulary["w5"]

    edit(folders[1], "tokenizer.json", swap)
    assert "the tokenizers disagree" in refusal(*folders)


@pytest.mark.parametrize("lams", [[0.5, 0.5], [0, -0.0]])
def test_a_lambda_that_is_given_twice_is_refused_before_anything_is_written(llama, tmp_path, lams):
    with pytest.raises(ValueError, match="is given twice"):
        ModelPair.from_pretrained(llama(0), llama(1, near=0)).merge(tmp_path / "out", lams)
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_adapters_on_two_bases_is_opened_again_as_it_was(llama, lora, tmp_path):
    bases = llama(0, torch.float32), llama(1, torch.float32, near=0)
    adapters = [lora(base, seed) for seed, base in enumerate(bases)]
    exact = ModelPair.from_pretrained(*adapters).exact(0.5)
    exact.save_pretrained(tmp_path / "mixture")
    ids = torch.tensor([[5, 9, 33]])
    again = DeraForCausalLM.from_pretrained(tmp_path / "mixture")
    torch.testing.assert_close(again(ids).logits, exact(ids).logits, rtol=0, atol=0)
