"""Hidden states and head of any architecture, put together again, are the model: `compare` measures through them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from dera_merge.measuring.contexts import trace_at_once
from dera_merge.measuring.traces import Text, decoder_of, trace_of

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
WHOLE = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "intermediate_size")}
FAMILIES = {  # a config, and where its decoder is
    "llama": (lambda: tf.LlamaConfig(**SMALL), "model"),
    "gpt2": (lambda: tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), "transformer"),
    "a soft cap": (lambda: tf.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0), "model"),
    "scaled logits": (lambda: tf.GraniteConfig(**SMALL, logits_scaling=3.0), "model"),
    "a multiplier that the decoder keeps": (
        lambda: tf.FalconH1Config(
            **SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16,
            lm_head_multiplier=0.7,
        ),
        "model",
    ),
    "a decoder within the base model": (lambda: tf.OPTConfig(**WHOLE, ffn_dim=48, word_embed_proj_dim=32), "model.decoder"),
    "that projects": (lambda: tf.OPTConfig(**WHOLE, ffn_dim=48, word_embed_proj_dim=16), "model.decoder"),
    "of an encoder-decoder's kind": (
        lambda: tf.BartConfig(
            vocab_size=64, d_model=32, decoder_ffn_dim=48, decoder_layers=2, decoder_attention_heads=4,
            max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False,
        ),
        "model.decoder",
    ),
    "a model that is its own decoder": (
        lambda: tf.Llama4TextConfig(
            **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1
        ),
        "model",
    ),
}  # fmt: skip
TEXTS = [Text(0, [5, 9, 12, 33, 7, 8], 2), Text(1, [4, 9, 3, 3], 1)]


def build(family) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family][0]()).float().eval()


@torch.no_grad()
def whole(model) -> torch.Tensor:
    """The logits that predict the completions, a text at a time."""
    return torch.cat([model(torch.tensor([text.ids])).logits[0, text.start - 1 : -1] for text in TEXTS])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_and_its_head_give_the_models_own_logits(family):
    model = build(family)
    expected = whole(model)
    assert decoder_of(model)[0] == FAMILIES[family][1]
    trace = trace_of(model, TEXTS)
    torch.testing.assert_close(trace.head(trace.hidden), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_head_survives_a_change_of_the_model_and_holds_none_of_its_decoder(family):
    model = build(family)
    expected = whole(model)
    trace = trace_of(model, TEXTS, [])
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(trace.head(trace.hidden), expected, rtol=1e-5, atol=1e-5)
    layer = weakref.ref(
        next(module for module in decoder_of(model)[1].modules() if isinstance(module, torch.nn.ModuleList))
    )
    del model, parameter
    gc.collect()
    assert layer() is None, "the head holds the decoder's layers alive"


class OfTokens(tf.LlamaForCausalLM):
    """A class that makes its logits of more than its decoder's states, so that its head cannot be told apart."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(states + self.model.embed_tokens(input_ids))
        return CausalLMOutputWithPast(logits=logits)


@torch.no_grad()
def test_what_enters_the_output_embeddings_can_be_read_in_a_batch_of_another_shape():
    """Else the resolution of such models would be that of one reading against itself."""
    torch.manual_seed(0)
    model, rows = OfTokens(tf.LlamaConfig(**SMALL)).eval(), []
    trace = trace_of(model, TEXTS)
    assert trace.one_by_one
    torch.testing.assert_close(trace.head(trace.hidden), whole(model), rtol=1e-5, atol=1e-5)
    model.model.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    again = trace_of(model, TEXTS, room=8)
    assert rows == [2, 1, 2, 2, 1]  # both texts, and a first token; each beside itself, and a first token
    torch.testing.assert_close(again.hidden, trace.hidden, rtol=1e-5, atol=1e-5)


# Contexts that several texts have

CONTEXTS = [[(7 * n + k) % 60 + 2 for n in range(20)] for k in (0, 5)]
ENDINGS = [[5, 9, 12], [33, 7, 8, 5, 9], [40]], [[11, 4], [11, 6]]
ITEMS = [Text(k, [*context, *ending], 20) for k, context in enumerate(CONTEXTS) for ending in ENDINGS[k]]
ITEMS = [ITEMS[3], Text(2, [4, 9, 3, 3], 1), *ITEMS[:3], ITEMS[4], Text(3, [9] * 30, 24)]  # beside some that are alone
SLIDING = {"a window": (lambda: tf.MistralConfig(**SMALL, sliding_window=8), "model")}


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *SLIDING])
def test_a_context_that_several_texts_have_is_read_once_and_their_states_are_the_same(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, *next(iter(SLIDING.items())))
    model = build(family)
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    expected = trace_of(model, ITEMS)
    one_by_one, seen[:] = sum(seen), []
    found = trace_at_once(model, ITEMS)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.head(found.hidden), expected.head(expected.hidden), rtol=1e-4, atol=1e-4)
    keeps_all = family != "a multiplier that the decoder keeps"  # which has recurrent layers
    assert (sum(seen) < one_by_one) == keeps_all
    monkeypatch.setattr("dera_merge.measuring.contexts._reads_so", lambda *args: False)
    assert torch.equal(trace_at_once(model, ITEMS).hidden, expected.hidden), "what does not fit is read one by one"
