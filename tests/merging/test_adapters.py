"""Every kind of adapter that PEFT merges, against PEFT's own forward and its merge."""

import json

import peft
import pytest
import torch
from builders import save_tokenizer, tiny_llama, weights
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dera_merge import DeraError, DeraWarning, ModelPair
from dera_merge.measuring.inspection import inspect_pair

pytestmark = pytest.mark.core

IDS = torch.arange(3, 21)[None]
SOME = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
SQUARE = {"target_modules": ["q_proj", "up_proj"]}
RANDOM = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}

KINDS = {
    "DoRA": ("LoraConfig", {**RANDOM, **SOME, "use_dora": True}),
    "DoRA on embeddings": ("LoraConfig", {**RANDOM, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "trained tokens": ("LoraConfig", {**RANDOM, **SOME, "trainable_token_indices": [3, 5]}),
    "target parameters": (
        "LoraConfig",
        {**RANDOM, "target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight", "mlp.down_proj.weight"]},
    ),
    "AdaLoRA": ("AdaLoraConfig", {**SOME, "total_step": 10, "init_r": 4, "target_r": 4}),
    "LoHa": ("LoHaConfig", {**SOME, "r": 4}),
    "LoKr": ("LoKrConfig", {**SOME, "r": 4}),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "OFT": ("OFTConfig", {**SOME, "oft_block_size": 8}),
    "BOFT": ("BOFTConfig", {**SOME, "boft_block_size": 4}),
    "VeRA": ("VeraConfig", {**SQUARE, "r": 4}),
    "VeRA, projections not saved": ("VeraConfig", {**SQUARE, "r": 4, "save_projection": False}),
    "PVeRA": ("PveraConfig", {**SOME, "r": 4}),
    "RandLoRA": ("RandLoraConfig", {**SOME, "r": 4}),
    "HRA": ("HRAConfig", {**SOME, "r": 4}),
    "FourierFT": ("FourierFTConfig", {**SOME, "n_frequency": 50}),
    "WaveFT": ("WaveFTConfig", {**SOME, "n_frequency": 50}),
    "MiSS": ("MissConfig", {**SOME, "r": 4}),
    "VBLoRA": ("VBLoRAConfig", {**SQUARE, "r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2}),
    "SHiRA": ("ShiraConfig", {**SOME, "r": 4}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "C3A": ("C3AConfig", {**SQUARE, "block_size": 16}),
    "DeLoRA": ("DeloraConfig", {**SOME, "r": 4}),
    "GraLoRA": ("GraloraConfig", {**SOME, "r": 4, "gralora_k": 2}),
    "HiRA": ("HiraConfig", {**SOME, "r": 4}),
    "GLoRA": ("GloraConfig", {**SOME, "r": 4}),
    "UniLoRA": ("UniLoraConfig", {**SOME, "r": 4}),
    "TinyLoRA": ("TinyLoraConfig", {**SOME, "r": 2}),
    "RoAd": ("RoadConfig", {**SQUARE, "group_size": 16}),
    "DEFT": ("DeftConfig", {**SOME, "r": 4}),
    "PEANuT": ("PeanutConfig", {**SOME, "r": 4}),
    "trained tokens alone": ("TrainableTokensConfig", {"token_indices": [3, 5], "target_modules": ["embed_tokens"]}),
}


def make(folder, base, config, seed=1, **saving):
    """An adapter on `base` (a directory) with random weights."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter.data)
    model.save_pretrained(folder, **{"save_embedding_layers": False, **saving})
    return folder


def unmerged(base, adapter):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_merged_at_lambda_1_computes_what_peft_computes_unmerged(llama, tmp_path, kind):
    name, settings = KINDS[kind]
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    base = llama(0, dtype=torch.float32)
    adapter = make(tmp_path / "adapter", base, getattr(peft, name)(**settings))
    (out,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0])
    expected = logits(unmerged(base, adapter))
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-3  # it changes something
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)
    oracle = unmerged(base, adapter).merge_and_unload().state_dict()
    for key, tensor in weights(out).items():
        torch.testing.assert_close(tensor, oracle[key], rtol=0, atol=2e-6)


def test_an_effective_delta_that_is_not_linear_is_still_a_straight_line_in_lambda(llama, tmp_path):
    base = llama(0, dtype=torch.float32)
    adapter = make(tmp_path / "adapter", base, peft.LoraConfig(**RANDOM, **SOME, use_dora=True))
    (out,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [0.3])
    merged = unmerged(base, adapter).merge_and_unload().state_dict()
    for key, tensor in weights(out).items():
        torch.testing.assert_close(tensor, 0.7 * weights(base)[key] + 0.3 * merged[key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["lora_bias", "BEFT"])
def test_trained_biases_need_a_base_that_has_them(llama, tmp_path, kind):
    base = llama(0, dtype=torch.float32, attention_bias=True, mlp_bias=True)
    config = peft.LoraConfig(**RANDOM, target_modules=["q_proj"], lora_bias=True)
    if kind == "BEFT":
        config = peft.BeftConfig(**SOME)
    adapter = make(tmp_path / "adapter", base, config)
    (out,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0])
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(unmerged(base, adapter)), rtol=0, atol=5e-5
    )
    if kind == "lora_bias":
        bare = llama(0, dtype=torch.float32)
        adapter = make(tmp_path / "second", bare, config)
        with pytest.raises(DeraError, match="base layer has no bias"):
            ModelPair.from_pretrained(bare, adapter).merge(tmp_path / "none", [1.0])
        assert not (tmp_path / "none").exists()


def test_tokens_trained_on_tied_embeddings_change_both_ends_and_keep_the_tie(llama, tmp_path):
    base = llama(0, dtype=torch.float32, tie_word_embeddings=True)
    adapter = make(tmp_path / "adapter", base, peft.LoraConfig(**RANDOM, **SOME, trainable_token_indices=[3, 5]))
    (out,) = ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in weights(out)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(unmerged(base, adapter)), rtol=0, atol=5e-5
    )


def test_embeddings_saved_beside_an_adapter_are_taken_from_it(llama, tmp_path):
    """`save_embedding_layers` stores the base's embeddings; an adapter may bring others than the base at hand has."""
    base = llama(0, dtype=torch.float32)
    adapter = make(tmp_path / "adapter", base, peft.LoraConfig(**RANDOM, target_modules=["embed_tokens", "q_proj"]),
                   save_embedding_layers=True)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors[key] = tensors[key] + 0.1
    save_file(tensors, file, metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(base, adapter)
    (out,) = pair.merge(tmp_path / "out", [1.0])
    expected = logits(unmerged(base, adapter))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, rtol=1e-4, atol=1e-4)
    exact = pair.exact(dtype=torch.float32)
    torch.testing.assert_close(logits(exact.aligned), expected)
    torch.testing.assert_close(logits(exact.ref), logits(AutoModelForCausalLM.from_pretrained(base)))  # untouched


@pytest.mark.parametrize("kind", ["OSFConfig", "PsoftConfig", "FrodConfig", "PromptTuningConfig"])
def test_what_has_no_weights_or_takes_them_from_the_base_at_load_is_refused_by_name(llama, tmp_path, kind):
    base = llama(0, dtype=torch.float32)
    settings = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"} if kind == "PromptTuningConfig" else SOME
    if kind == "PsoftConfig":
        settings = {**SOME, "r": 4}
    config = getattr(peft, kind)(**settings)
    adapter = make(tmp_path / "adapter", base, config)
    with pytest.raises(DeraError, match=f"{config.peft_type.value} adapters are not merged"):
        ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0])
    if kind != "PromptTuningConfig":  # PEFT's own forward still decodes it exactly, and leaves the reference alone
        exact = ModelPair.from_pretrained(base, adapter).exact(dtype=torch.float32)
        torch.testing.assert_close(logits(exact.ref), logits(AutoModelForCausalLM.from_pretrained(base)))
        torch.testing.assert_close(logits(exact.aligned), logits(unmerged(base, adapter)))


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
def test_the_base_of_a_qlora_adapter_is_what_transformers_dequantises(llama, lora, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    base = llama(0, hidden_size=64, intermediate_size=128)
    adapter = lora(base)
    name, _, double = kind.partition("-")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=bool(double))
    quantised = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)
    reference = quantised.dequantize().float()
    ref_weights = {key: tensor.clone() for key, tensor in reference.state_dict().items()}
    oracle = PeftModel.from_pretrained(reference, adapter).merge_and_unload().state_dict()

    pair = ModelPair.from_pretrained(base, adapter, base_quantization=kind)
    zero, one = pair.merge(tmp_path / "out", [0, 1], dtype="float32")
    for key, tensor in weights(one).items():
        torch.testing.assert_close(tensor, oracle[key], rtol=0, atol=2e-6)
        torch.testing.assert_close(weights(zero)[key], ref_weights[key], rtol=0, atol=0)
    touched = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(ref_weights[touched], weights(base)[touched].float())
    exact = pair.exact(dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(one)
    torch.testing.assert_close(logits(exact.aligned), logits(merged), rtol=1e-4, atol=1e-4)


def test_a_full_checkpoint_beside_qlora_adapters_stays_what_it_is(llama, lora, tmp_path):
    """REF is dequant(base), for the adapter's Δ adds to that; a dense aligned model was in no 4 bits."""
    pytest.importorskip("bitsandbytes")
    base, dense = (llama(seed, torch.float32, hidden_size=64, intermediate_size=128) for seed in (0, 1))
    adapter = lora(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    pair = ModelPair.from_pretrained(base, [adapter, dense])
    assert pair.base_quantization == "nf4"
    ref, own = pair.merge(tmp_path / "out", [[0, 0], [0, 1]], dtype="float32")
    assert all(torch.equal(tensor, weights(dense)[name]) for name, tensor in weights(own).items())
    changed = [name for name, tensor in weights(ref).items() if not torch.equal(tensor, weights(base)[name])]
    assert changed
    assert all(name.endswith("proj.weight") for name in changed)
    exact = pair.exact()
    torch.testing.assert_close(logits(exact.others[0]), logits(AutoModelForCausalLM.from_pretrained(dense)))
    torch.testing.assert_close(logits(exact.ref), logits(AutoModelForCausalLM.from_pretrained(ref)), rtol=1e-4, atol=1e-4)


def test_an_adapter_says_what_base_it_was_trained_on(llama, lora, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = llama(0, hidden_size=64, intermediate_size=128)
    adapter = lora(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    pair = ModelPair.from_pretrained(base, adapter)
    assert pair.base_quantization is None
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "unsloth/x-bnb-4bit"}))
    with pytest.warns(DeraWarning, match="looks like QLoRA"):
        ModelPair.from_pretrained(base, adapter)
    recorded = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "quantization_config": recorded}))
    assert ModelPair.from_pretrained(base, adapter).base_quantization == "nf4-double"
    assert ModelPair.from_pretrained(base, adapter, base_quantization="none").base_quantization == "none"
    with pytest.raises(DeraError, match="nf4, nf4-double"):
        _ = ModelPair.from_pretrained(base, adapter, base_quantization="int3").tensors
    with pytest.raises(DeraError, match="is for adapters"):
        ModelPair.from_pretrained(base, llama(1, hidden_size=64, intermediate_size=128), base_quantization="nf4")


@pytest.fixture
def partly_quantised(tmp_path):
    """A checkpoint whose MLP is stored in FP8 with scales, as some hubs ship them, and the rest in bfloat16."""
    folder = tmp_path / "fp8"
    tiny_llama(0).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    tensors = weights(folder)
    for key in [key for key in tensors if ".mlp." in key]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_tensors_that_delta_does_not_touch_pass_through_byte_for_byte(llama, lora, partly_quantised, tmp_path):
    adapter = lora(llama(0), target_modules=["q_proj", "v_proj"])
    (out,) = ModelPair.from_pretrained(partly_quantised, adapter).merge(tmp_path / "out", [0.5], dtype="float32")
    before, after = weights(partly_quantised), weights(out)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if ".mlp." in key:
            assert after[key].dtype == tensor.dtype
            assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8))
    (dense,) = ModelPair.from_pretrained(llama(0), adapter).merge(tmp_path / "dense", [0.5], dtype="float32")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[key], weights(dense)[key])


def test_a_change_of_a_quantised_tensor_is_refused_by_name(llama, lora, partly_quantised, tmp_path):
    adapter = lora(llama(0), target_modules=["up_proj"])
    with pytest.raises(DeraError, match=r"up_proj\.weight, which .* stores quantised \(float8_e4m3fn\)"):
        ModelPair.from_pretrained(partly_quantised, adapter).merge(tmp_path / "out", [0.5])


def test_a_lora_of_which_rounding_leaves_nothing_is_an_error_not_a_base_in_disguise(llama, lora, tmp_path):
    base = llama(0)
    adapter = lora(base, target_modules=["q_proj"], lora_alpha=1e-6)
    with pytest.raises(DeraError, match=r"q_proj\.weight survives rounding.*stochastic"):
        ModelPair.from_pretrained(base, adapter).merge(tmp_path / "out", [1.0], rounding="nearest")
    assert not (tmp_path / "out").exists()


def test_a_dense_pair_of_which_rounding_leaves_nothing_is_an_error(llama, tmp_path):
    base = llama(0)
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(other)
    save_tokenizer(other)
    tensors = weights(other)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * (1 + 1e-6)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DeraError, match="nothing of Δ survives"):
        ModelPair.from_pretrained(base, other).merge(tmp_path / "out", [0.5], rounding="nearest")
    assert not (tmp_path / "out").exists()
    (kept,) = ModelPair.from_pretrained(base, other).merge(tmp_path / "kept", [0.5], dtype="float32")
    assert not torch.equal(weights(kept)["model.norm.weight"], weights(base)["model.norm.weight"].float())


# λΔ as adapters


def product(base, adapter):
    """s·BA by module of an adapter, by PEFT's own computation."""
    model = unmerged(base, adapter)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    {"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
])  # fmt: skip
def test_a_lambda_adapter_over_the_base_is_the_merge(llama, lora, tmp_path, options):
    base = llama(0, dtype=torch.float32)
    adapter = lora(base, **options)
    pair = ModelPair.from_pretrained(base, adapter)
    for lam, folder in zip((0.0, 0.3, 2.0), pair.merge(tmp_path / "a", [0, 0.3, 2], format="adapter"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 4
        assert not any(config[key] for key in ("use_rslora", "rank_pattern", "alpha_pattern"))
        (full,) = pair.merge(tmp_path / f"full{lam}", [lam])
        expected = logits(AutoModelForCausalLM.from_pretrained(full))
        torch.testing.assert_close(logits(unmerged(base, folder)), expected, rtol=1e-4, atol=1e-4)


def test_two_adapters_on_one_base_are_their_exact_concatenation(llama, lora, tmp_path):
    base = llama(0, dtype=torch.float32)
    one, two = lora(base, 7, target_modules=["q_proj", "up_proj"]), lora(base, 8, r=3, target_modules=["q_proj", "v_proj"])
    pair = ModelPair.from_pretrained(one, two, base=base)
    (folder,) = pair.merge(tmp_path / "a", [0.3], format="adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 7
    first, second, mixed = (product(base, adapter) for adapter in (one, two, folder))
    assert mixed.keys() == first.keys() | second.keys()
    for name, delta in mixed.items():
        expected = 0.7 * first.get(name, torch.zeros(())) + 0.3 * second.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, expected.expand_as(delta), rtol=0, atol=1e-6)


def test_a_cut_rank_is_the_best_approximation_and_says_what_it_lost(llama, lora, tmp_path):
    base = llama(0, dtype=torch.float32)
    one, two = lora(base, 7), lora(base, 8)
    pair = ModelPair.from_pretrained(one, two, base=base)
    (folder,) = pair.merge(tmp_path / "a", [0.5], format="adapter", rank=5)
    found = json.loads((folder / "dera_merge.json").read_text())["statistics"]
    first, second, mixed = (product(base, adapter) for adapter in (one, two, folder))
    kept = total = 0.0
    for name, delta in mixed.items():
        sigma = torch.linalg.svdvals((0.5 * first[name] + 0.5 * second[name]).double())
        best = sigma[5:].square().sum()
        error = (delta - (0.5 * first[name] + 0.5 * second[name])).double().square().sum()
        assert error == pytest.approx(best.item(), rel=1e-3, abs=1e-9)
        kept, total = kept + sigma[:5].square().sum().item(), total + sigma.square().sum().item()
        assert found["per_module"][f"base_model.model.{name}"] == pytest.approx(
            (sigma[:5].square().sum() / sigma.square().sum()).item(), rel=1e-5
        )
    assert found["energy"] == pytest.approx(kept / total, rel=1e-5)
    assert found["energy"] < 0.999


def test_a_dense_pair_becomes_adapters_by_svd(llama, tmp_path):
    base, aligned = llama(0, dtype=torch.float32), llama(1, dtype=torch.float32, near=0)
    pair = ModelPair.from_pretrained(base, aligned)
    with pytest.warns(DeraWarning, match="other tensors change too"):
        half, full = pair.merge(tmp_path / "a", [0.5, 1.0], format="adapter", extract_rank=32)
    mixed = product(base, half)
    start, end = weights(base), weights(aligned)
    for name, delta in mixed.items():  # rank 32 is the whole of these layers
        expected = 0.5 * (end[f"{name}.weight"] - start[f"{name}.weight"])
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-5)
    found = json.loads((full / "dera_merge.json").read_text())["statistics"]
    assert found["energy"] == pytest.approx(1, abs=1e-5)
    assert "model.embed_tokens.weight" in found["left_out"]
    with pytest.warns(DeraWarning):
        (small,) = pair.merge(tmp_path / "b", [1.0], format="adapter", extract_rank=4)
    share = json.loads((small / "dera_merge.json").read_text())["statistics"]["energy"]
    sigmas = [torch.linalg.svdvals((end[f"{n}.weight"] - start[f"{n}.weight"]).double()).square() for n in mixed]
    best = sum(s[:4].sum() for s in sigmas) / sum(s.sum() for s in sigmas)
    assert best.item() * 0.97 < share <= best.item() * 1.000001


def test_what_no_adapter_can_hold_is_refused_by_name(llama, lora, tmp_path):
    base, aligned = llama(0, dtype=torch.float32), llama(1, dtype=torch.float32, near=0)
    dora = lora(base, use_dora=True)
    for pair, message in (
        (ModelPair.from_pretrained(base, aligned), "full models is no adapter"),
        (ModelPair.from_pretrained(base, dora), "is no sum s·BA"),
    ):
        with pytest.raises(DeraError, match=f"{message}.*--format full"):
            pair.merge(tmp_path / "out", [0.5], format="adapter")
    assert not (tmp_path / "out").exists()


def test_bfloat16_adapters_stay_bfloat16_and_can_be_resumed(llama, lora, tmp_path):
    base = llama(0)
    adapter = lora(base)
    file = adapter / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(base, adapter)
    (folder,) = pair.merge(tmp_path / "out", [0.5], format="adapter")
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.bfloat16}
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert pair.merge(tmp_path / "out", [0.5], format="adapter", resume=True) == [folder]
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    with pytest.raises(DeraError, match="--overwrite"):
        pair.merge(tmp_path / "out", [0.7], format="adapter")


# Did a merge lose anything?


def test_inspect_finds_what_a_merge_by_another_tool_lost(llama, lora, tmp_path):
    base = llama(0, dtype=torch.float32)
    adapter = lora(base, target_modules=["q_proj", "up_proj"])
    pair = ModelPair.from_pretrained(base, adapter)
    good = tmp_path / "good"
    unmerged(base, adapter).merge_and_unload().save_pretrained(good)
    found = inspect_pair(pair, merged=good)
    assert not found["lost"]
    assert len(found["tensors"]) == 4
    assert all(row["kept"] == pytest.approx(1, abs=1e-4) for row in found["tensors"].values())

    bad = tmp_path / "bad"
    unmerged(base, adapter).merge_and_unload().save_pretrained(bad)
    tensors = weights(bad)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = weights(base)[name]
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    assert set(inspect_pair(pair, merged=bad)["lost"]) == {name, "model.norm.weight"}


def test_inspect_finds_a_trained_head_that_a_tied_merge_lost(llama, lora, tmp_path):
    base = llama(0, dtype=torch.float32, tie_word_embeddings=True)
    adapter = lora(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    lossy = tmp_path / "lossy"
    model = unmerged(base, adapter).merge_and_unload()
    model.config.tie_word_embeddings = True
    model.save_pretrained(lossy)
    tensors = weights(lossy)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, lossy / "model.safetensors", metadata={"format": "pt"})
    pair = ModelPair.from_pretrained(base, adapter)
    assert "lm_head.weight" in inspect_pair(pair, merged=lossy)["lost"]
    (ours,) = pair.merge(tmp_path / "ours", [1.0])
    assert not inspect_pair(pair, merged=ours)["lost"]
