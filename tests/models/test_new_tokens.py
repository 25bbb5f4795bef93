"""Vocabularies that grew: ALIGNED has tokens that REF has no rows for, or an adapter brings embeddings of another size."""

import json
import shutil

import pytest
import torch
from builders import VOCAB, tokenizer, weights
from commands import run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dera_merge import DeraForCausalLM, ModelPair, compare
from dera_merge.doctor.examine import examine
from dera_merge.errors import DeraError, DeraWarning

NEW = 70  # rows of ALIGNED; REF has VOCAB
IDS = torch.tensor([[3, 66, 5, 69], [64, 8, 7, 6]])  # with new tokens in the context
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_wide_tokenizer(folder):
    tokenizer({"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, NEW)}}).save_pretrained(folder)


def logits(model, **options):
    with torch.no_grad():
        return model(IDS, **options).logits.double()


@pytest.fixture(params=["dense", "trained whole", "saved beside", "tied", "dora"])
def grown(request, llama, tmp_path):
    """(REF, ALIGNED, the aligned model as transformers and PEFT load it)."""
    kind = request.param
    ref = llama(0, dtype=torch.float32, tie_word_embeddings=kind == "tied")
    folder = tmp_path / "aligned"
    if kind == "dense":
        shutil.copytree(llama(1, dtype=torch.float32, vocab_size=NEW), folder)
        save_wide_tokenizer(folder)
        return ref, folder, AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(ref)
    model.resize_token_embeddings(NEW)
    whole = {"saved beside": None, "tied": ["embed_tokens"]}.get(kind, ["embed_tokens", "lm_head"])
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "modules_to_save": whole,
                "use_dora": kind == "dora"}  # fmt: skip
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or (whole is None and ("embed_tokens" in name or "lm_head" in name)):
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=True)
    save_wide_tokenizer(folder)
    base = AutoModelForCausalLM.from_pretrained(ref)
    base.resize_token_embeddings(NEW)
    return ref, folder, PeftModel.from_pretrained(base, folder).eval()


def reference_on_new_tokens(ref, aligned):
    """The reference as exact decoding runs it: ALIGNED's input rows where it has none of its own."""
    model = AutoModelForCausalLM.from_pretrained(ref)
    model.resize_token_embeddings(NEW)
    table = aligned.get_input_embeddings()
    rows = table.modules_to_save["default"].weight if hasattr(table, "modules_to_save") else table.weight
    model.get_input_embeddings().weight.data[VOCAB:] = rows[VOCAB:]
    return model.eval()


def test_new_rows_are_aligneds_at_every_lambda_and_lambda_1_is_aligned(grown, tmp_path):
    ref, folder, aligned = grown
    pair = ModelPair.from_pretrained(ref, folder, new_tokens="aligned")
    lams = [-0.5, 0.0, 0.5, 1.0, 2.0]
    merged = dict(zip(lams, pair.merge(tmp_path / "out", lams), strict=True))
    one = weights(merged[1.0])
    for lam, out in merged.items():
        stored, start = weights(out), weights(ref)
        for name in {EMBED, HEAD} & stored.keys():
            assert stored[name].shape[0] == NEW
            assert torch.equal(stored[name][VOCAB:], one[name][VOCAB:]), (lam, name)
            begin = start.get(name, start[EMBED]).double()
            expected = begin + lam * (one[name][:VOCAB].double() - begin)
            torch.testing.assert_close(stored[name][:VOCAB].double(), expected, rtol=1e-6, atol=1e-7)
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.config.vocab_size == NEW
        assert torch.equal(logits(pair.merged(lam)), logits(model))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged[1.0])), logits(aligned), rtol=0, atol=2e-5)


def test_a_doctor_finds_nothing_wrong_with_tokens_that_the_base_lacks(llama, tmp_path):
    ref, aligned = llama(0), llama(1, vocab_size=NEW, near=None)
    shutil.copytree(aligned, tmp_path / "aligned")
    save_wide_tokenizer(tmp_path / "aligned")
    (out,) = ModelPair.from_pretrained(ref, tmp_path / "aligned", new_tokens="aligned").merge(tmp_path / "out", [0.5])
    assert not [row for row in examine(str(out), str(ref))["findings"] if "tokens" in row["what"]]
    assert not examine(str(out), str(ref))["broken"]
    with pytest.warns(DeraWarning, match="only REF has some"):
        ModelPair.from_pretrained(tmp_path / "aligned", ref, new_tokens="aligned")


def test_without_a_word_only_lambda_1_is_merged_and_the_way_out_is_named(grown, tmp_path):
    ref, folder, aligned = grown
    pair = ModelPair.from_pretrained(ref, folder)
    (one,) = pair.merge(tmp_path / "one", [1])
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(one)), logits(aligned), rtol=0, atol=2e-5)
    for work in (lambda: pair.merge(tmp_path / "two", [0.5]), lambda: pair.exact(1.0), lambda: pair.merged(0.5)):
        with pytest.raises(DeraError, match=r"(only λ=1|ALIGNED alone).*--new-tokens aligned"):
            work()
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("lam", [-0.5, 0.0, 0.5, 1.0, 2.0])
def test_exactly_log_probabilities_are_mixed_and_aligneds_stand_on_new_rows(grown, lam):
    ref, folder, aligned = grown
    exact = ModelPair.from_pretrained(ref, folder, new_tokens="aligned").exact(lam)
    log_ref = logits(reference_on_new_tokens(ref, aligned))[..., :VOCAB].log_softmax(-1)
    log_aligned = logits(aligned).log_softmax(-1)
    mixed = torch.cat([(1 - lam) * log_ref + lam * log_aligned[..., :VOCAB], log_aligned[..., VOCAB:]], -1)
    got = logits(exact).log_softmax(-1)
    assert got.shape[-1] == NEW
    torch.testing.assert_close(got, mixed.log_softmax(-1), rtol=0, atol=3e-5)
    if lam == 1.0:
        torch.testing.assert_close(got, log_aligned, rtol=0, atol=3e-5)
    text = exact.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, lam=[lam, 0.3])
    assert text.shape[0] == 2


def test_a_saved_mixture_keeps_what_becomes_of_new_tokens(grown, tmp_path):
    ref, folder, _ = grown
    exact = ModelPair.from_pretrained(ref, folder, new_tokens="aligned").exact(0.5)
    exact.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(DeraForCausalLM.from_pretrained(tmp_path / "saved")), logits(exact))


def test_compare_measures_the_merge_against_that_definition(grown, tmp_path):
    ref, folder, _ = grown
    pair = ModelPair.from_pretrained(ref, folder, new_tokens="aligned")
    text = {"prompt": "w3 w66 w5", "completion": "w69 w8 w64 w7"}
    row = compare(pair, [0.5], prompts=[text], dtype="float32").results[0]
    ids = torch.tensor([[3, 66, 5, 69, 8, 64, 7]])
    with torch.no_grad():
        log_p, log_q = (model(ids).logits[0, 2:6].double().log_softmax(-1) for model in (pair.exact(0.5), pair.merged(0.5)))
    assert row["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3, abs=1e-7)
    assert row["tokens"] == 4


def test_embeddings_with_fewer_rows_than_a_padded_base_change_the_rows_that_they_have(llama, lora, tmp_path):
    base = llama(0, dtype=torch.float32)
    adapter = shutil.copytree(lora(base, r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    torch.manual_seed(0)
    fewer = {EMBED: torch.randn(60, 32), HEAD: torch.randn(60, 32)}
    tensors = weights(adapter) | {f"base_model.model.{name}": tensor for name, tensor in fewer.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    pair = ModelPair.from_pretrained(base, adapter)
    (out,) = pair.merge(tmp_path / "out", [1])
    for name, tensor in fewer.items():
        assert torch.equal(weights(out)[name][:60], tensor)
        assert torch.equal(weights(out)[name][60:], weights(base)[name][60:])
    exact = pair.exact(1.0)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits[..., :60]
        assert torch.allclose(exact(ids).logits, merged, atol=2e-5)


def test_a_grown_adapter_below_another_lends_its_rows(llama, lora, grown, tmp_path):
    ref, folder, aligned = grown
    if not (folder / "adapter_config.json").is_file():
        pytest.skip("a dense model stands on nothing")
    dpo = shutil.copytree(lora(ref, 9, r=2, target_modules=["v_proj"]), tmp_path / "dpo")
    pair = ModelPair.from_pretrained(folder, dpo, stack=True)
    assert not pair.brings_tokens
    model = PeftModel.from_pretrained(aligned.merge_and_unload(), dpo).eval()
    (out,) = pair.merge(tmp_path / "out", [1])
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(pair.exact(1.0)), logits(model), rtol=0, atol=2e-5)


def test_a_head_whose_new_rows_were_not_saved_is_an_error(llama, tmp_path):
    ref = llama(0, dtype=torch.float32, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(ref)
    model.resize_token_embeddings(NEW)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"],
                        init_lora_weights=False)  # fmt: skip
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05
    model.save_pretrained(tmp_path / "aligned", save_embedding_layers=False)
    save_wide_tokenizer(tmp_path / "aligned")
    with pytest.raises(DeraError, match=r"only 64.*were not saved"):
        ModelPair.from_pretrained(ref, tmp_path / "aligned").merge(tmp_path / "out", [1])


def test_what_does_not_know_new_rows_says_so(grown, tmp_path):
    ref, folder, _ = grown
    pair = ModelPair.from_pretrained(ref, folder, new_tokens="aligned")
    with pytest.raises(DeraError, match="--format full"):
        pair.merge(tmp_path / "out", [0.5], format="adapter")
    with pytest.raises(DeraError, match="raw logits"):
        pair.export_exact(tmp_path / "out", 0.5)
    with pytest.raises(DeraError, match="for one aligned model"):
        ModelPair.from_pretrained(ref, [folder, folder], new_tokens="aligned")


def test_the_command_line_takes_it(llama, tmp_path):
    folder = shutil.copytree(llama(1, dtype=torch.float32, vocab_size=NEW), tmp_path / "aligned")
    save_wide_tokenizer(folder)
    done = run("merge", llama(0, dtype=torch.float32), folder, "-l", 0.5, "-o", tmp_path / "out", "--new-tokens", "aligned")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "dera_merge.json").read_text())["new_tokens"] == "aligned"
