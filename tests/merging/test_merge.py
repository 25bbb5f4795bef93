"""Merging from file to file, against float64 recomputation and PEFT."""

import hashlib
import json
import shutil

import pytest
import torch
from builders import LAMS, weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_merge import DeraError, ModelPair
from dera_merge.merging.recipe import PARTIAL, verify

pytestmark = pytest.mark.core


def assert_between_neighbours(stored, ref, aligned, lam):
    """Every element lies between the output dtype's neighbours of v ± 2⁻²²(|1-λ||θ_ref| + |λ||θ_aligned|)."""
    ref, aligned = ref.double(), aligned.double()
    value = ref + lam * (aligned - ref)
    slack = 2.0**-22 * (abs(1 - lam) * ref.abs() + abs(lam) * aligned.abs())
    for bound, side in ((value - slack, -1.0), (value + slack, 1.0)):
        near = bound.to(stored.dtype)
        out = torch.nextafter(near, torch.full_like(near, side * float("inf")))
        limit = torch.where((near.double() - bound) * side >= 0, near, out).double()
        assert ((limit - stored.double()) * side >= 0).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_dense_merge_lies_between_the_neighbours_of_the_float64_value(llama, tmp_path, dtype, rounding):
    ref, aligned = llama(0), llama(1, near=0)
    pair = ModelPair.from_pretrained(ref, aligned)
    folders = pair.merge(tmp_path / "out", LAMS, dtype=dtype, rounding=rounding)
    for lam, folder in zip(LAMS, folders, strict=True):
        merged = weights(folder)
        assert merged.keys() == weights(ref).keys()
        for name, tensor in merged.items():
            assert tensor.dtype == (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
            assert_between_neighbours(tensor, weights(ref)[name], weights(aligned)[name], lam)


def test_the_oracle_catches_a_merge_at_another_lambda(llama, tmp_path):
    ref, aligned = llama(0), llama(1, near=0)
    (folder,) = ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [0.31])
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(AssertionError):
        assert_between_neighbours(weights(folder)[name], weights(ref)[name], weights(aligned)[name], 0.3)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lambda_0_and_1_return_the_checkpoints_bit_for_bit(llama, tmp_path, rounding):
    ref, aligned = llama(0), llama(1)
    zero, one = ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [0, 1], rounding=rounding)
    for folder, source in ((zero, ref), (one, aligned)):
        for name, tensor in weights(source).items():
            assert torch.equal(weights(folder)[name].view(torch.int16), tensor.view(torch.int16))


def test_where_delta_is_zero_the_stored_bits_stay_at_every_lambda(llama, tmp_path):
    ref, aligned = llama(0), llama(1, near=0)
    (folder,) = ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [1.7])
    for name, tensor in weights(ref).items():
        same = tensor == weights(aligned)[name]
        assert torch.equal(weights(folder)[name][same].view(torch.int16), tensor[same].view(torch.int16))


def test_special_values_survive_both_ends(tmp_path, llama):
    from safetensors.torch import save_file

    source = llama(0)
    for name, value in (("ref", -0.0), ("aligned", 0.0)):
        shutil.copytree(source, tmp_path / name)
        tensors = weights(source)
        tensors["model.norm.weight"][:3] = torch.tensor([value, float("inf"), 1 + value if name == "ref" else 2])
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(tmp_path / "ref", tmp_path / "aligned")
    zero, half = pair.merge(tmp_path / "out", [0, 0.5])
    for folder in (zero, half):
        norm = weights(folder)["model.norm.weight"]
        assert torch.signbit(norm[0])
        assert norm[1] == float("inf")


def test_a_value_that_becomes_nan_is_an_error_and_leaves_nothing(tmp_path, llama):
    from safetensors.torch import save_file

    shutil.copytree(llama(0), tmp_path / "broken")
    tensors = weights(llama(0))
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeraError, match=r"model\.norm\.weight: 1 merged values are NaN"):
        ModelPair.from_pretrained(llama(0), tmp_path / "broken").merge(tmp_path / "out", [0.5])
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeraError):
        ModelPair.from_pretrained(llama(0), tmp_path / "broken").merge(tmp_path / "a" / "b", [0.5, 0.75])
    assert not (tmp_path / "a").exists()


ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 3, "down_proj": 5}},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_merge_equals_peft_at_lambda_1(llama, lora, tmp_path, kind):
    base = llama(0, dtype=torch.float32)
    adapter = lora(base, **ADAPTERS[kind])
    (folder,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    ours = weights(folder)
    assert ours.keys() == weights(base).keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, peft[name], rtol=0, atol=2e-6)
    assert any((tensor != weights(base)[name]).any() for name, tensor in ours.items())


@pytest.mark.parametrize("lam", [0.3, 2.0])
def test_lora_merge_equals_peft_with_the_scale_times_lambda(llama, lora, tmp_path, lam):
    base = llama(0, dtype=torch.float32)
    adapter = lora(base)
    (folder,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [lam])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(lam)
    peft = model.merge_and_unload().state_dict()
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, peft[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_a_tied_embedding_is_untied_and_equals_pefts_unmerged_forward(llama, lora, tmp_path, target):
    base = llama(0, dtype=torch.float32, tie_word_embeddings=True)
    adapter = lora(base, target_modules=[target, "q_proj"])
    (folder,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.randint(2, 64, (2, 9))
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, unmerged(ids).logits, rtol=1e-4, atol=1e-4)
    live = ModelPair.from_pretrained(base, adapter).merged(1.0)
    with torch.no_grad():
        torch.testing.assert_close(live(ids).logits, unmerged(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapter_and_adapter_mix_on_one_base(llama, lora, tmp_path):
    base = llama(0, dtype=torch.float32)
    one, two = lora(base, 7), lora(base, 8)
    (folder,) = ModelPair.from_pretrained(one, two, base=base).merge(tmp_path / "out", [0.3])
    merged = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), x).merge_and_unload().state_dict()
        for x in (one, two)
    ]
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, 0.7 * merged[0][name] + 0.3 * merged[1][name], rtol=0, atol=2e-6)


def test_adapter_and_full_mix(llama, lora, tmp_path):
    base, full = llama(0, dtype=torch.float32), llama(1, dtype=torch.float32, near=0)
    adapter = lora(base)
    (folder,) = ModelPair.from_pretrained(adapter, full, base=base).merge(tmp_path / "out", [0.25])
    ref = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().state_dict()
    for name, tensor in weights(folder).items():
        torch.testing.assert_close(tensor, 0.75 * ref[name] + 0.25 * weights(full)[name], rtol=0, atol=2e-6)


def test_shards_do_not_change_a_bit(llama, tmp_path):
    ref, aligned = llama(0), llama(1, near=0)
    pair = ModelPair.from_pretrained(ref, aligned)
    (whole,) = pair.merge(tmp_path / "whole", [0.4])
    sharded = ModelPair.from_pretrained(llama(0, shard="10KB"), llama(1, near=0, shard="7KB"))
    one, two = sharded.merge(tmp_path / "parts", [0.4, 0.9], max_shard_size="9KB")
    assert len(list(one.glob("*.safetensors"))) > 2
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(one)[name])
    index = json.loads((one / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(whole).keys()
    assert AutoModelForCausalLM.from_pretrained(two, dtype="auto").dtype == torch.bfloat16


def test_slices_do_not_change_a_bit(llama, tmp_path, monkeypatch):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    (one,) = pair.merge(tmp_path / "one", [0.4])
    monkeypatch.setattr("dera_merge.files.checkpoint.slices.__defaults__", (1000, 0, None))
    monkeypatch.setattr("dera_merge.merging.theta.SLICE", 100)
    (two,) = pair.merge(tmp_path / "two", [0.4])
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())


def test_the_same_call_gives_the_same_bytes(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    digests = []
    for name in ("a", "b"):
        (folder,) = pair.merge(tmp_path / name, [0.4], seed=3)
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()})
    assert digests[0] == digests[1]


def test_everything_that_makes_a_model_comes_along(llama, tmp_path):
    (folder,) = ModelPair.from_pretrained(llama(0), llama(1)).merge(tmp_path / "out", [0.5])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(llama(1)).chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.generation_config.eos_token_id == 1
    recipe = verify(folder)
    assert recipe["lambda"] == 0.5
    assert recipe["statistics"]["kept"] == pytest.approx(1, abs=0.02)
    assert not (folder / PARTIAL).exists()


def test_statistics_are_those_of_the_stored_weights(llama, tmp_path):
    ref, aligned = llama(0), llama(1, near=0)
    (folder,) = ModelPair.from_pretrained(ref, aligned).merge(tmp_path / "out", [0.5], rounding="nearest")
    dot = square = error = 0.0
    for name, tensor in weights(folder).items():
        start, end = weights(ref)[name].double(), weights(aligned)[name].double()
        step, moved = 0.5 * (end - start), tensor.double() - start
        dot, square, error = dot + (moved * step).sum(), square + (step**2).sum(), error + ((moved - step) ** 2).sum()
    found = verify(folder)["statistics"]
    assert found["kept"] == pytest.approx((dot / square).item(), rel=1e-5)
    assert found["error"] == pytest.approx((error / square).sqrt().item(), rel=1e-5)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 3, 8, 11])
def test_an_interrupted_merge_is_no_model_and_resumes_to_the_same_bytes(llama, tmp_path, after):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    (whole,) = pair.merge(tmp_path / "whole", [0.4], max_shard_size="9KB")
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pair.merge(tmp_path / "out", [0.4], max_shard_size="9KB", progress=interrupt)
    assert (tmp_path / "out" / PARTIAL).exists()
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(DeraError, match="--resume"):
        pair.merge(tmp_path / "out", [0.4], max_shard_size="9KB")
    with pytest.raises(DeraError, match="another call"):
        pair.merge(tmp_path / "out", [0.5], max_shard_size="9KB", resume=True)
    pair.merge(tmp_path / "out", [0.4], max_shard_size="9KB", resume=True)
    files = [{f.name: f.read_bytes() for f in folder.iterdir()} for folder in (whole, tmp_path / "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize("damage", ["truncated", "gone", "input changed", "other shards"])
def test_resume_does_not_call_a_damaged_or_outdated_output_complete(llama, tmp_path, damage):
    shutil.copytree(llama(0), tmp_path / "ref")
    out = tmp_path / "out"
    ModelPair.from_pretrained(tmp_path / "ref", llama(1)).merge(out, [0.4])
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    pair = ModelPair.from_pretrained(tmp_path / "ref", llama(1))
    assert pair.merge(out, [0.4], resume=True) == [out]  # intact: nothing to do
    options = {"max_shard_size": "9KB"} if damage == "other shards" else {}
    if damage == "truncated":
        (out / "model.safetensors").write_bytes(before["model.safetensors"][:1000])
    elif damage == "gone":
        (out / "model.safetensors").unlink()
    elif damage == "input changed":
        (tmp_path / "ref" / "model.safetensors").touch()
    with pytest.raises(DeraError, match="missing or has changed|an input has changed|--overwrite"):
        ModelPair.from_pretrained(tmp_path / "ref", llama(1)).merge(out, [0.4], resume=True, **options)


def test_resume_writes_a_damaged_shard_again(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1, near=0))
    (whole,) = pair.merge(tmp_path / "whole", [0.4], max_shard_size="9KB")

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pair.merge(out, [0.4], max_shard_size="9KB", progress=interrupt)
    shard = min(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    pair.merge(out, [0.4], max_shard_size="9KB", resume=True)
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in out.iterdir()}


def test_several_lambdas_do_not_go_into_a_model_directory(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1))
    pair.merge(tmp_path / "out", [0.5])
    with pytest.raises(DeraError, match="is a model itself"):
        pair.merge(tmp_path / "out", [0.25, 0.5])


def test_a_tied_reference_that_spells_its_head_out_is_untied_by_an_untied_one(llama, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(llama(0, tie_word_embeddings=True), tmp_path / "tied")
    tensors = weights(tmp_path / "tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    (out,) = ModelPair.from_pretrained(tmp_path / "tied", llama(1)).merge(tmp_path / "out", [1.0])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.tensor([[5, 6, 7]])
    expected = AutoModelForCausalLM.from_pretrained(llama(1), dtype="auto")(ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype="auto")(ids).logits, expected)
    (back,) = ModelPair.from_pretrained(llama(1), llama(0, tie_word_embeddings=True)).merge(tmp_path / "back", [1.0])
    assert torch.equal(weights(back)["lm_head.weight"], weights(tmp_path / "tied")["lm_head.weight"])


def test_overwrite_replaces_only_what_dera_merge_wrote(llama, tmp_path):
    pair = ModelPair.from_pretrained(llama(0), llama(1))
    out = tmp_path / "out"
    pair.merge(out, [0.4])
    with pytest.raises(DeraError, match="--overwrite"):
        pair.merge(out, [0.5])
    pair.merge(out, [0.5], overwrite=True)
    assert verify(out)["lambda"] == 0.5
    (tmp_path / "link").symlink_to(out)
    pair.merge(tmp_path / "link", [0.3], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert verify(out)["lambda"] == 0.3
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DeraError, match="notes.txt"):
        pair.merge(out, [0.6], overwrite=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "a").write_text("mine")
    with pytest.raises(DeraError, match="not written by dera-merge"):
        pair.merge(foreign, [0.6], overwrite=True)


def test_an_output_that_touches_an_input_is_refused(llama, tmp_path):
    shutil.copytree(llama(0), tmp_path / "models" / "ref")
    pair = ModelPair.from_pretrained(tmp_path / "models" / "ref", llama(1))
    for out in (tmp_path / "models" / "ref", tmp_path / "models", tmp_path / "models" / "ref" / "sub"):
        with pytest.raises(DeraError, match="is, holds or lies in"):
            pair.merge(out, [0.5], overwrite=True)


@pytest.mark.parametrize("lams", [[0.5], [0.5, 1.0]])
def test_an_output_that_is_a_file_is_refused(llama, tmp_path, lams):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DeraError, match="is a file"):
        ModelPair.from_pretrained(llama(0), llama(1)).merge(tmp_path / "out", lams, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_huge_lambda_stays_finite_on_disk(llama, tmp_path):
    (folder,) = ModelPair.from_pretrained(llama(0), llama(1)).merge(tmp_path / "out", [1e38], dtype="float32")
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_verify_notices_a_changed_file(llama, tmp_path):
    (folder,) = ModelPair.from_pretrained(llama(0), llama(1)).merge(tmp_path / "out", [0.5])
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(DeraError, match="has changed"):
        verify(folder)


@pytest.mark.parametrize("dtype", [None, "auto", "float16"])
def test_the_live_dial_equals_a_fresh_merge_bit_for_bit_after_many_turns(llama, lora, tmp_path, dtype):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, lora(base))
    model = pair.merged(0.1, dtype=dtype)
    for lam in [*(0.1 * n for n in range(20)), 0.4]:
        model.set_lam(lam)
    (folder,) = pair.merge(tmp_path / "out", [0.4], dtype=dtype or "float32")
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(model) is type(fresh)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
