"""Tied tensors: whatever an adapter does to one end or to both, a merge is what PEFT's own forward computes.

The oracle is PEFT's unmerged model, which shares no code with the merge. transformers loads the merged file, so that a
tensor which was left out, or an end that was tied again, shows.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dera_merge import ModelPair

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES = {  # the config of a tiny model, its embeddings, a linear layer of its attention
    "llama": (lambda: transformers.LlamaConfig(**SMALL), "embed_tokens", "q_proj"),
    "gemma3": (lambda: transformers.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8), "embed_tokens", "q_proj"),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
        "wte",
        "c_attn",
    ),
    # Besides embeddings and head its layers share whole blocks: ties that go together.
    "zamba2": (
        lambda: transformers.Zamba2Config(
            **SMALL | {"num_hidden_layers": 4}, mamba_d_state=16, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_mem_blocks=1, adapter_rank=4,
        ),
        "embed_tokens",
        "q_proj",
    ),
}  # fmt: skip
FORMS = {  # what an adapter does to the ends E (embeddings) and `lm_head`; Q is a layer beside them
    "the head": {"target_modules": ["lm_head"]},
    "the embeddings": {"target_modules": ["E"]},
    "both": {"target_modules": ["E", "lm_head"]},
    "the head, trained whole": {"target_modules": ["Q"], "modules_to_save": ["lm_head"]},
    "the embeddings, trained whole": {"target_modules": ["Q"], "modules_to_save": ["E"]},
    "some tokens": {"target_modules": ["Q"], "trainable_token_indices": [3, 5]},
    "tokens of the embeddings": {"target_modules": ["Q"], "trainable_token_indices": {"E": [3, 5]}},
    "tokens of the head": {"target_modules": ["Q"], "trainable_token_indices": {"lm_head": [9, 60]}},
    "the same tokens of both": {"target_modules": ["Q"], "trainable_token_indices": {"E": [3, 5], "lm_head": [3, 5]}},
    "other tokens of both": {"target_modules": ["Q"], "trainable_token_indices": {"E": [3, 5], "lm_head": [9, 60]}},
    "all but the ends": {"target_modules": "all-linear"},
}
IDS = torch.tensor([[3, 5, 9, 33, 7, 5, 60]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for family, (config, *_) in FAMILIES.items():
        torch.manual_seed(0)
        folders[family] = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config()).float().save_pretrained(folders[family])
    return folders


def load(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_is_done_to_the_ends_of_a_tie_the_merge_is_pefts_own_forward(bases, tmp_path, family, form):
    _, embeddings, linear = FAMILIES[family]

    def named(value):
        if isinstance(value, dict):
            return {named(key): named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        return {"E": embeddings, "Q": linear}.get(value, value)

    torch.manual_seed(1)
    options = {key: named(value) for key, value in FORMS[form].items()}
    adapted = get_peft_model(load(bases[family]), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "embedding_A" in name or "trainable_tokens_delta" in name:
            parameter.copy_(0.3 * torch.randn_like(parameter))
        elif "modules_to_save.default" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = PeftModel.from_pretrained(load(bases[family]), tmp_path / "adapter").eval()(IDS).logits
    assert (expected - load(bases[family])(IDS).logits).abs().max() > 1e-2  # else nothing would be seen

    pair = ModelPair.from_pretrained(bases[family], tmp_path / "adapter")
    (folder,) = pair.merge(tmp_path / "out", [1.0], dtype="float32")
    for model in (load(folder), pair.merged(1.0), pair.exact(1.0)):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stored", [(True, True), (True, False), (False, True)])
def test_a_head_that_is_stored_in_the_place_of_tied_embeddings_is_both(bases, tmp_path, stored):
    """transformers loads such a file and ties the two; a merge must not come out with neither."""
    folders = []
    for number, only_head in enumerate(stored):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"][0]()).float()
        folders.append(tmp_path / str(number))
        model.save_pretrained(folders[-1])
        if only_head:
            tensors = load_file(folders[-1] / "model.safetensors")
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, folders[-1] / "model.safetensors", metadata={"format": "pt"})
    ref, aligned = (dict(load(folder).named_parameters()) for folder in folders)
    pair = ModelPair.from_pretrained(*folders)
    (folder,) = pair.merge(tmp_path / "out", [0.25], dtype="float32")
    for model in (load(folder), pair.merged(0.25)):
        merged = dict(model.named_parameters())
        assert merged.keys() == ref.keys()
        for name, parameter in merged.items():
            torch.testing.assert_close(parameter, 0.75 * ref[name] + 0.25 * aligned[name], rtol=0, atol=1e-6)
