"""One set of weights with a strength for each row: against PEFT's own models, and against merges."""

import copy
from collections import Counter

import pytest
import torch
from builders import LAMS, in_threads, save_tokenizer, tiny_llama
from peft import AutoPeftModelForCausalLM, IA3Config, LNTuningConfig, OFTConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dera_merge import DeraError, DialForCausalLM, ModelPair
from dera_merge.decoding.rows import LowRankRows, MixedRows, in_rows

IDS = torch.tensor([[5, 9, 12, 33], [17, 3, 60, 22], [30, 7, 44, 8]])

# LoRA options → the kind of module that is expected among those that differ.
KINDS = {
    "all linear layers": ({}, LowRankRows),
    "rank and alpha patterns": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}}, LowRankRows),
    "rank-stabilised": ({"use_rslora": True}, LowRankRows),
    "head and embedding": ({"target_modules": ["lm_head", "embed_tokens", "q_proj"]}, MixedRows),
    "a module trained whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}, MixedRows),
    "a block trained whole": ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, MixedRows),
    "biases": ({"target_modules": ["q_proj"], "bias": "lora_only"}, LowRankRows),
    "DoRA": ({"use_dora": True}, MixedRows),
}


def separately(base, adapter):
    """The two models as transformers and PEFT load them, sharing nothing."""
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return AutoModelForCausalLM.from_pretrained(base), tuned.eval()


def agree(exact, ref, aligned):
    for lam in LAMS:
        with torch.no_grad():
            expected = (1 - lam) * ref(IDS).logits.double() + lam * aligned(IDS).logits.double()
            torch.testing.assert_close(exact(IDS, lam=lam).logits.double(), expected, rtol=0, atol=2e-5 * (1 + abs(lam)))


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_is_the_two_models(llama, lora, kind):
    options, module = KINDS[kind]
    base = llama(0, dtype=torch.float32)
    adapter = lora(base, **options)
    exact = ModelPair.from_pretrained(base, adapter).exact()
    assert any(isinstance(m, module) for m in exact.rows.modules())
    agree(exact, *separately(base, adapter))
    if kind not in ("a module trained whole", "a block trained whole", "head and embedding"):
        held = {p.data_ptr(): p.numel() for name, p in exact.named_parameters() if "lora_" not in name}
        extra = sum(p.numel() for name, p in exact.rows.named_parameters() if name.endswith(".bias") or "magnitude" in name)
        assert sum(held.values()) <= exact.ref.num_parameters() + extra  # the base once


def test_embeddings_that_come_with_an_adapter_cost_only_themselves(llama, lora):
    base = llama(0, dtype=torch.float32)
    exact = ModelPair.from_pretrained(base, lora(base, modules_to_save=["lm_head"])).exact()
    assert sum(isinstance(m, LowRankRows) for m in exact.rows.modules()) == 14
    mixed = [name for name, m in exact.rows.named_modules() if isinstance(m, MixedRows)]
    assert set(mixed) <= {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("config", [
    IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    OFTConfig(target_modules=["q_proj", "up_proj"], r=4, oft_block_size=0, init_weights=False),
    LNTuningConfig(target_modules=["input_layernorm", "norm"]),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_other_kinds_of_adapters_take_one_pass_too(llama, tmp_path, config):
    base = llama(0, dtype=torch.float32)
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    exact = ModelPair.from_pretrained(base, tmp_path).exact()
    assert exact.rows is not None
    ref, aligned = separately(base, tmp_path)
    assert (ref(IDS).logits - aligned(IDS).logits).abs().max() > 0.05
    agree(exact, ref, aligned)


def test_two_adapters_on_one_base_are_rows_of_it(llama, lora):
    base = llama(0, dtype=torch.float32)
    adapters = lora(base, 7, target_modules=["q_proj", "up_proj"]), lora(base, 8, target_modules=["q_proj", "v_proj"])
    exact = ModelPair.from_pretrained(*adapters).exact()
    ref, aligned = (AutoPeftModelForCausalLM.from_pretrained(folder).eval() for folder in adapters)
    agree(exact, ref, aligned)
    kept = {p.data_ptr() for name, p in exact.named_parameters() if "up_proj" in name and "lora_" not in name}
    assert len(kept) == 2  # one for each layer, in three trees


def test_a_model_that_flattens_its_tokens_keeps_rows_apart(lora, tmp_path):
    """OPT's feed-forward layers see (rows·tokens, hidden)."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                       word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3)  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    adapter = lora(tmp_path)
    agree(ModelPair.from_pretrained(tmp_path, adapter).exact(), *separately(tmp_path, adapter))


def test_norms_of_single_heads_are_rows_too(lora, tmp_path):
    """Qwen3's q_norm and k_norm see (rows, tokens, heads, size)."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, initializer_range=0.3, eos_token_id=1, pad_token_id=0)  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    adapter = lora(tmp_path, target_modules=["q_proj"], modules_to_save=["q_norm", "k_norm"])
    exact = ModelPair.from_pretrained(tmp_path, adapter).exact()
    assert exact.rows is not None
    agree(exact, *separately(tmp_path, adapter))


def test_what_is_more_than_a_function_of_its_input_takes_two_passes(llama, lora):
    """A wrapper around attention, which keeps a cache, or a module that the model calls by other names."""
    base = tiny_llama(0)
    aligned = copy.deepcopy(base)
    aligned.model.layers[1].self_attn = torch.nn.Sequential(aligned.model.layers[1].self_attn)
    assert in_rows(base, base, aligned) is None


def test_experts_regroup_tokens_so_a_mixture_of_experts_takes_two_passes(lora, tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, num_local_experts=4, initializer_range=0.3)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    adapter = lora(tmp_path, target_modules=["q_proj", "v_proj"])
    pair = ModelPair.from_pretrained(tmp_path, adapter)
    exact = pair.exact()
    assert exact.rows is None
    agree(exact, *separately(tmp_path, adapter))
    with pytest.raises(DeraError, match="share their weights"):
        pair.dial()


@torch.no_grad()
def test_exact_rows_cost_two_products_on_the_aligned_half(llama, lora):
    """No strength is multiplied, and the reference's rows are the base layer's own, bit for bit."""
    base = llama(0, dtype=torch.float32)
    rows = ModelPair.from_pretrained(base, lora(base)).exact().rows
    layer = next(m for m in rows.modules() if isinstance(m, LowRankRows))
    x = torch.randn(4, 3, 32)
    with rows.dera_strength.each(2, 4, 3), torch.profiler.profile() as profile:
        y = layer(x)
    plain = layer.base_layer(x)
    assert torch.equal(y[:2], plain[:2])
    torch.testing.assert_close(y[2:], plain[2:] + x[2:] @ layer.down.T @ layer.up)
    ran = Counter(event.name for event in profile.events())
    assert ran["aten::addmm_"] == 1
    assert ran["aten::mm"] + ran["aten::addmm"] == 2  # W·x and A·x
    assert not ran["aten::mul"]


def test_tokens_that_cannot_be_told_apart_are_an_error(llama, lora):
    base = llama(0, dtype=torch.float32)
    rows = ModelPair.from_pretrained(base, lora(base)).exact().rows
    layer = next(m for m in rows.modules() if isinstance(m, LowRankRows))
    for strengths in (rows.dera_strength.of(torch.tensor([0.0, 1.0]), 3), rows.dera_strength.each(2, 2, 3)):
        with strengths, pytest.raises(DeraError, match="regroups"):
            layer(torch.randn(5, layer.base_layer.in_features))


def test_on_its_own_it_is_the_aligned_model(llama, lora):
    """`exact.aligned` outside of a mixture, also after a mixture was run."""
    base = llama(0, dtype=torch.float32)
    adapter = lora(base)
    exact = ModelPair.from_pretrained(base, adapter).exact()
    ref, aligned = separately(base, adapter)
    with torch.no_grad():
        exact(IDS, lam=0.3)
        torch.testing.assert_close(exact.aligned(IDS).logits, aligned(IDS).logits, rtol=0, atol=2e-5)
        assert torch.equal(exact.ref(IDS).logits, ref(IDS).logits)


# The dial


@pytest.fixture(
    scope="module",
    params=["all linear layers", "a module trained whole", "a block trained whole", "DoRA", "head and embedding"],
)
def pair(request, llama, lora):
    base = llama(0, dtype=torch.float32)
    return ModelPair.from_pretrained(base, lora(base, **KINDS[request.param][0]))


@pytest.mark.core
def test_each_row_of_a_dial_is_the_merge_at_its_lambda(pair):
    dial = pair.dial()
    lams = [-0.5, 0.3, 2.0]
    with torch.no_grad():
        together = dial(IDS, lam=lams).logits
        for row, lam in enumerate(lams):
            merged = pair.merged(lam)(IDS[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], merged, rtol=1e-4, atol=1e-4)


def test_one_dial_generates_at_many_lambdas_in_one_batch(pair):
    dial = pair.dial(0.3)
    options = {"max_new_tokens": 10, "do_sample": False}
    output = dial.generate(IDS, lam=[0.0, 1.0, 2.0], **options)
    for row, lam in enumerate([0.0, 1.0, 2.0]):
        alone = pair.merged(lam).generate(IDS[row : row + 1], **options)[0]
        assert output[row, : len(alone)].tolist() == alone.tolist()
    assert torch.equal(dial.generate(IDS, **options), dial.generate(IDS, lam=0.3, **options))
    guided = dial.generate(IDS[2:], lam=2.0, guidance_scale=1.7, **options)
    assert guided.tolist() == pair.merged(2.0).generate(IDS[2:], guidance_scale=1.7, **options).tolist()
    beams = dial.generate(IDS, lam=[0.0, 1.0, 2.0], num_beams=3, **options)
    alone = pair.merged(2.0).generate(IDS[2:], num_beams=3, **options)[0]
    assert beams[2, : len(alone)].tolist() == alone.tolist()


def test_threads_turn_one_dial_without_seeing_each_other(pair):
    dial = pair.dial()
    expected = {lam: dial.generate(IDS, lam=lam, max_new_tokens=8, do_sample=False) for lam in LAMS}
    wrong = []

    def turn(lam):
        for _ in range(5):
            if not torch.equal(dial.generate(IDS, lam=lam, max_new_tokens=8, do_sample=False), expected[lam]):
                wrong.append(lam)

    in_threads(turn, LAMS)
    assert wrong == []


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_a_dial_turned_a_hundred_times_equals_a_fresh_merge_bit_for_bit(llama, lora, kind):
    base = llama(0)
    pair = ModelPair.from_pretrained(base, llama(1, near=0) if kind == "dense" else lora(base))
    model = pair.merged(0.5, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    for lam in (4 * torch.rand(99, generator=generator) - 1).tolist():
        model.set_lam(lam)
    model.set_lam(0.7)
    fresh = pair.merged(0.7, dtype="auto").state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_a_dial_refuses_what_would_lose_its_lambda(pair):
    dial = pair.dial()
    assert isinstance(dial, DialForCausalLM)
    for call in (
        lambda: dial.generate_batch([[5, 6]]),
        lambda: dial.save_pretrained("/nonexistent"),
    ):
        with pytest.raises(DeraError):
            call()
    with pytest.raises(ValueError, match="shape"):
        dial.generate(IDS, lam=[0.1, 0.2], max_new_tokens=2)


def test_dense_pairs_have_no_dial():
    from dera_merge import DeraForCausalLM

    with pytest.raises(DeraError, match="share their weights"):
        DeraForCausalLM(tiny_llama(0), tiny_llama(1)).dial()
