"""Classes that wrap a text decoder and see images: merged, live, decoded and measured as any other, images included.

Oracles: each model's own `generate`, the formula on logits that it gives, and a state dict interpolated here.
"""

import sys
from pathlib import Path

import pytest
import torch
from builders import save_tokenizer, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from wrapped import VOCAB, WRAPPED, class_of, picture, saved_pair, tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from tiny_models import Sizes, tiny_model

from dera_merge import DeraError, DeraForCausalLM, ModelPair, compare
from dera_merge.decoding.caches import CACHE

pytestmark = pytest.mark.core

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
BEFORE, AFTER = [5, 9, 62], [7, 8, 40]


@pytest.fixture(scope="module", params=WRAPPED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folders(name, tmp_path_factory):
    return saved_pair(name, tmp_path_factory)


@pytest.fixture(scope="module")
def models(name, folders):
    return [class_of(name).from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]


@pytest.fixture(scope="module")
def exact(folders):
    return ModelPair.from_pretrained(*folders).exact()


@torch.no_grad()
def plain_loop(models, inputs, lam, steps):
    """Greedy DeRa from each model's own `generate`, one token of which is asked for with everything before it."""
    inputs = dict(inputs)
    for _ in range(steps):
        ref, aligned = (
            model.generate(**inputs, **GREEDY, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
            .logits[0].double() for model in models
        )  # fmt: skip
        token = (ref + lam * (aligned - ref)).argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                inputs[key] = torch.cat([inputs[key], torch.full_like(token, key == "attention_mask")], 1)
    return inputs["input_ids"]


def text():
    ids = torch.tensor([[0, 0, 5, 9, 12], [33, 7, 8, 41, 22]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@torch.no_grad()
def test_text_decodes_as_the_formula_says_and_at_both_ends_as_the_models_themselves(models, exact):
    ids = text()["input_ids"][1:]
    ref, aligned = (model(input_ids=ids).logits.double() for model in models)
    torch.testing.assert_close(exact(ids, lam=0.3).logits.double(), 0.7 * ref + 0.3 * aligned, rtol=1e-4, atol=1e-4)
    for lam in (0, 1):
        for beams in (1, 2):
            options = {**GREEDY, "max_new_tokens": 6, "num_beams": beams}
            assert torch.equal(exact.generate(**text(), lam=lam, **options), models[lam].generate(**text(), **options))
    options = {**GREEDY, "max_new_tokens": 5}
    written = plain_loop(models, text(), 0.4, 5)
    for cache in ("dynamic", "static"):
        assert torch.equal(exact.generate(**text(), lam=0.4, cache_implementation=cache, **options), written)


@torch.no_grad()
def test_a_picture_is_seen_by_both_towers(name, models, exact):
    inputs = picture(name, BEFORE, AFTER)
    blind = {**inputs, "pixel_values": 0 * inputs["pixel_values"]}
    options = {**GREEDY, "max_new_tokens": 6}
    for lam in (0, 1):
        own = models[lam].generate(**inputs, **options)
        assert torch.equal(exact.generate(**inputs, lam=lam, **options), own)
        seen, unseen = (models[lam](**each).logits[0, -1] for each in (inputs, blind))
        assert (seen - unseen).abs().max() > 1e-3, "the picture makes no difference, so this test shows nothing"
    written = plain_loop(models, inputs, 0.4, 6)
    for cache in ("dynamic", "static"):
        assert torch.equal(exact.generate(**inputs, lam=0.4, cache_implementation=cache, **options), written)
    beams = {**options, "num_beams": 2}
    assert torch.equal(exact.generate(**inputs, lam=1.0, **beams), models[1].generate(**inputs, **beams))
    logits = [model(**inputs).logits.double() for model in models]
    torch.testing.assert_close(exact(**inputs, lam=2.0).logits.double(), 2 * logits[1] - logits[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_towers_are_part_of_delta_in_files_live_and_when_measured(name, folders, models, tmp_path):
    pair = ModelPair.from_pretrained(*folders)
    (half,) = pair.merge(tmp_path / "half", [0.25])
    merged = class_of(name).from_pretrained(half, dtype=torch.float32).eval().state_dict()
    live = pair.merged(0.25)
    ref, aligned = (model.state_dict() for model in models)
    assert merged.keys() == ref.keys()
    for key, tensor in ref.items():
        if tensor.is_floating_point():
            expected = tensor.double() + 0.25 * (aligned[key].double() - tensor.double())
            torch.testing.assert_close(merged[key].double(), expected, rtol=1e-6, atol=1e-7)
    assert type(live) is class_of(name)
    inputs = picture(name, BEFORE, AFTER)
    between = class_of(name).from_pretrained(half, dtype=torch.float32).eval()
    assert torch.equal(live(**inputs).logits, between(**inputs).logits)

    pair.tokenizer = tokenizer()  # transformers gives some configs their own tokenizer class, whatever the files say
    (result,) = compare(pair, [0.25], [{"prompt": "w5 w9", "completion": "w12 w33 w7"}]).results
    ids = torch.tensor([[5, 9, 12, 33, 7]])
    ref, aligned, merged = (model(input_ids=ids).logits[0, 1:4].double() for model in (*models, between))
    log_p, log_q = torch.log_softmax(ref + 0.25 * (aligned - ref), -1), torch.log_softmax(merged, -1)
    assert result["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("towers", [False, True])
def test_an_adapters_picture_takes_two_passes_and_its_text_one(tmp_path, towers):
    """Rows of one batch cannot share one picture: pixels have no batch axis in this class."""
    name = "Qwen2_5_VL"
    tiny(name, 0).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    torch.manual_seed(3)
    targets = r".*(language_model|visual).*(q_proj|qkv|down_proj)" if towers else r".*language_model.*(q_proj|down_proj)"
    model = get_peft_model(tiny(name, 0), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    base = class_of(name).from_pretrained(tmp_path / "base").eval()
    tuned = PeftModel.from_pretrained(class_of(name).from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    pair = ModelPair.from_pretrained(tmp_path / "base", tmp_path / "lora")
    exact = pair.exact()
    assert exact.rows is not None
    for inputs in (text(), picture(name, BEFORE, AFTER)):
        assert torch.equal(
            exact.generate(**inputs, lam=0.4, max_new_tokens=5, **GREEDY), plain_loop((base, tuned), inputs, 0.4, 5)
        )
    dial = pair.dial()
    ends = dial.generate(**text(), lam=[0.0, 1.0], max_new_tokens=5, **GREEDY)
    own = [model.generate(**text(), max_new_tokens=5, **GREEDY)[row] for row, model in enumerate((base, tuned))]
    assert [row.tolist() for row in ends] == [row.tolist() for row in own]
    inputs = picture(name, BEFORE, AFTER)
    if towers:
        with pytest.raises(DeraError, match="changes how images are seen"):
            dial.generate(**inputs, max_new_tokens=2)
    else:
        assert torch.equal(dial.generate(**inputs, lam=1.0, max_new_tokens=5, **GREEDY),
                           tuned.generate(**inputs, max_new_tokens=5, **GREEDY))  # fmt: skip


# Text models that prepare their inputs in a way of their own


def _openai_gpt():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _xlm():
    from transformers import XLMConfig, XLMWithLMHeadModel

    config = XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64, is_encoder=True,
                       causal=True, mask_token_id=5, lang_id=0, pad_token_id=0)  # fmt: skip
    return XLMWithLMHeadModel(config)


def _xlnet():
    from transformers import XLNetConfig, XLNetLMHeadModel

    return XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48))


def _cpmant():
    from transformers import CpmAntConfig, CpmAntForCausalLM

    return CpmAntForCausalLM(CpmAntConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48,
                                          num_hidden_layers=2, prompt_length=4, prompt_types=4, segment_types=4))  # fmt: skip


def _recurrent_gemma():
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    config = RecurrentGemmaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
                                  num_attention_heads=4, lru_width=32, attention_window_size=16)  # fmt: skip
    return RecurrentGemmaForCausalLM(config)


def _rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, context_length=64))


def _blt():
    """The cache that it is given becomes a part of one of two, which it hands on."""
    return tiny_model("blt", Sizes(vocab=VOCAB), 0)


def _xlstm():
    """Its state is no cache of transformers', though it is called one."""
    return tiny_model("xlstm", Sizes(vocab=VOCAB), 0)


OWN_WAY = {"openai-gpt": _openai_gpt, "xlm": _xlm, "xlnet": _xlnet, "cpmant": _cpmant,
           "recurrent_gemma": _recurrent_gemma, "rwkv": _rwkv, "blt": _blt, "xlstm": _xlstm}  # fmt: skip


def moved(build, seed):
    torch.manual_seed(0)
    model = build().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "blt")) for kind in OWN_WAY])
@pytest.mark.parametrize("use_cache", [True, False])
def test_at_the_ends_a_class_with_a_way_of_its_own_generates_as_it_does_alone(kind, use_cache):
    models = [moved(OWN_WAY[kind], seed) for seed in (1, 2)]
    exact = DeraForCausalLM(*models)
    options = {**GREEDY, "max_new_tokens": 6, "use_cache": use_cache}
    if is_too_old_for(kind):
        with pytest.raises(DeraError, match="transformers 5.24"):
            exact.generate(**text(), **options)
        return
    own = [model.generate(**text(), **options) for model in models]
    assert not torch.equal(*own)
    for lam in (0, 1):
        assert torch.equal(exact.generate(**text(), lam=lam, **options), own[lam])


def is_too_old_for(kind):
    """Whether the installed transformers calls what these models keep by another name than they do."""
    return CACHE != "cache" and kind in ("xlm", "xlnet", "xlstm")


@pytest.mark.parametrize("kind", ["openai-gpt", "xlm", "recurrent_gemma"])
def test_a_dial_of_a_class_without_keys_and_values_generates_at_a_lambda_for_each_row(kind, tmp_path):
    moved(OWN_WAY[kind], 1).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    torch.manual_seed(3)
    targets = {"openai-gpt": ["c_attn"], "xlm": ["q_lin", "v_lin"], "recurrent_gemma": ["q_proj", "v_proj", "o_proj"]}[kind]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
                           LoraConfig(r=4, target_modules=targets, init_lora_weights=False))  # fmt: skip
    model.save_pretrained(tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora").eval()
    options = {**GREEDY, "max_new_tokens": 6}
    own = [model.generate(**text(), **options)[row].tolist() for row, model in enumerate((base, tuned))]
    pair = ModelPair.from_pretrained(tmp_path / "base", tmp_path / "lora")
    if is_too_old_for(kind):
        with pytest.raises(DeraError, match="transformers 5.24"):
            pair.dial().generate(**text(), lam=[0.0, 1.0], **options)
        return
    assert pair.dial().generate(**text(), lam=[0.0, 1.0], **options).tolist() == own
    assert pair.exact().generate(**text(), lam=[0.0, 1.0], **options).tolist() == own
