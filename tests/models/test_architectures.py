"""Other architectures than Llama, tiny and random: merged as dense pairs, decoded exactly, measured; or refused in one line."""

import pytest
import torch
import transformers as tf
from builders import VOCAB, save_tokenizer, tokenizer, weights
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dera_merge import DeraError, ModelPair, compare

pytestmark = pytest.mark.core

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None, initializer_range=0.3,
)  # fmt: skip
EIGHT = {**SMALL, "head_dim": 8}
CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1,
                                  bos_token_id=1, initializer_range=0.3),
    "neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "qwen2": lambda: tf.Qwen2Config(**SMALL),
    "qwen3-tied": lambda: tf.Qwen3Config(**EIGHT, tie_word_embeddings=True),
    "mistral-sliding": lambda: tf.MistralConfig(**EIGHT, sliding_window=4),
    "gemma": lambda: tf.GemmaConfig(**EIGHT),
    "gemma2-softcap": lambda: tf.Gemma2Config(**EIGHT, final_logit_softcapping=5.0, sliding_window=8),
    "phi": lambda: tf.PhiConfig(**SMALL),
    "mixtral": lambda: tf.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def folders(request, tmp_path_factory):
    made = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += seed * 0.01 * torch.randn_like(p)
        made.append(tmp_path_factory.mktemp(f"{request.param}{seed}"))
        model.save_pretrained(made[-1])
        save_tokenizer(made[-1])
    return made


def test_merge_exact_live_and_compare(folders, tmp_path):
    pair = ModelPair.from_pretrained(*folders)
    half, one = pair.merge(tmp_path / "out", [0.5, 1.0])
    for name, tensor in weights(half).items():
        ref, aligned = (weights(folder)[name].double() for folder in folders)
        torch.testing.assert_close(tensor.double(), (ref + aligned) / 2, rtol=1e-6, atol=1e-7)
    ids = torch.tensor([[5, 9, 12, 33, 7, 8, 40]])
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (*folders, half, one)]
    with torch.no_grad():
        ref, aligned, merged, last = (model.eval()(ids).logits for model in models)
        torch.testing.assert_close(last, aligned)
        torch.testing.assert_close(pair.merged(0.5)(ids).logits, merged)
        exact = pair.exact(0.3)
        torch.testing.assert_close(exact(ids).logits, 0.7 * ref + 0.3 * aligned, rtol=1e-4, atol=1e-4)
    live = pair.merged(1.0)
    live.set_lam(0.5)
    for mine, theirs in zip(live.parameters(), models[2].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert greedy(models[:2], [5, 9, 12], 0.3) == exact.generate(torch.tensor([[5, 9, 12]]), max_new_tokens=8, do_sample=False)[
        0, 3:].tolist()  # fmt: skip
    pair.tokenizer = tokenizer()  # transformers gives a Qwen2 config its own tokenizer class, whatever the files say
    (result,) = compare(pair, [0.5], [{"prompt": "w5 w9", "completion": "w12 w33 w7"}]).results
    with torch.no_grad():
        ids = torch.tensor([[5, 9, 12, 33, 7]])
        ref, aligned, merged = (model(ids).logits[0, 1:4].double() for model in models[:3])
    log_p, log_q = torch.log_softmax((ref + aligned) / 2, -1), torch.log_softmax(merged, -1)
    assert result["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3, abs=1e-9)


@torch.no_grad()
def greedy(models, prompt, lam):
    ids = list(prompt)
    while len(ids) < len(prompt) + 8 and ids[-1] != 1:
        ref, aligned = (model(torch.tensor([ids])).logits[0, -1].double() for model in models)
        ids.append(int(((1 - lam) * ref + lam * aligned).argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prefix", [True, False])
def test_lora_on_gpt2s_transposed_layers_equals_peft_with_and_without_the_prefix_on_disk(tmp_path, lora, prefix):
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    if not prefix:
        file = tmp_path / "base" / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    adapter = lora(tmp_path / "base", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    (folder,) = ModelPair.from_pretrained(tmp_path / "base", adapter).merge(tmp_path / "out", [1.0])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-6)


def test_lora_on_experts_that_are_stored_fused_equals_pefts_forward(tmp_path):
    torch.manual_seed(0)
    config = tf.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    save_tokenizer(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (out,) = ModelPair.from_pretrained(base, tmp_path / "adapter").merge(tmp_path / "out", [1.0])
    ids = torch.arange(3, 21)[None]
    with torch.no_grad():
        merged, plain = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (out, base))
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")(ids).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_decoder_of_text_is_refused_in_one_line_that_says_what_it_is(tmp_path):
    t5 = tf.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name, config in {
        "audio": '{"architectures": ["VoxtralForConditionalGeneration"], "model_type": "voxtral", "audio_config": {}}',
        "diffusion": '{"architectures": ["DiffusionGemmaForBlockDiffusion"], "model_type": "diffusion_gemma"}',
        "encoder": '{"architectures": ["BertForMaskedLM"], "model_type": "bert"}',
        "nothing": "{}",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    for name, kind in {
        "t5": "an encoder-decoder model", "audio": "an audio model", "diffusion": "a diffusion model",
        "encoder": "BertForMaskedLM, not a causal", "nothing": "a model that names no architecture, not a causal",
    }.items():  # fmt: skip
        with pytest.raises(DeraError, match=f"{kind}.*; dera-merge takes decoders that write text") as refusal:
            ModelPair.from_pretrained(tmp_path / name, tmp_path / name)
        assert "\n" not in str(refusal.value)
