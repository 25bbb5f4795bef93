"""Tiny random models of every text family that the installed transformers can build."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 64
IDS = torch.tensor([[5, 9, 12, 33, 7, 8, 40, 21]])
# What makes a config small, by the names that families have for it; a family takes those that it knows.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "initializer_range": 0.2,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
    # GPT-2 and its kind
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48, "rotary_dim": 4, "n_ctx": 64,
    "d_model": 32, "d_inner": 48, "num_layers": 2, "num_heads": 4, "ffn_dim": 48, "dim": 32, "n_heads": 4, "n_layers": 2,
    "d_head": 8, "emb_dim": 32, "dim_ff": 48, "word_embed_proj_dim": 32, "embedding_size": 32, "ffn_hidden_size": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2, "dim_model": 32,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_kv": 8, "d_ff": 48, "hidden_dim": 32, "type_vocab_size": 2,
    "feed_forward_size": 48, "kv_channels": 8, "multi_query_group_num": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1, "expert_ffn_hidden_size": 16, "moe_num_shared_experts": 1, "shared_intermediate_size": 16,
    "num_dense_layers": 1, "num_shared_experts": 1, "moe_layer_start_index": 1, "intermediate_size_mlp": 48,
    "moe_shared_intermediate_size": 16, "expert_intermediate_size": 16,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    # state spaces
    "state_size": 8, "mamba_d_state": 8, "mamba_headdim": 8, "mamba_head_dim": 8, "mamba_num_heads": 8, "n_groups": 1,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_ngroups": 1, "n_mamba_heads": 8, "expand": 2,
    "mamba_d_ssm": 64, "ssm_state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "mamba_chunk_size": 8, "chunk_size": 8,
    "lru_width": 32, "attention_window_size": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_hidden_size": 32, "context_length": 64,
    "sliding_window": 16, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
}  # fmt: skip
# What a family needs beside.
EXTRA: dict[str, dict[str, Any]] = {
    "longcat_flash": {"zero_expert_num": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip


def families() -> list[str]:
    """The model types of transformers' causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model of one family."""
    default = AutoConfig.for_model(family)
    known = set(default.to_dict()) | set(inspect.signature(type(default).__init__).parameters)
    known |= set(getattr(default, "attribute_map", {}))
    settings = {key: value for key, value in SMALL.items() if key in known}
    if "kv_lora_rank" in known:  # keys and values of all heads are made of one latent vector
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return AutoConfig.for_model(family, **{**settings, **EXTRA.get(family, {}), **changes})


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model in float32; `seed` 0 is a reference, others are its fine-tuned kind."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and not tensor.isfinite().all():
                tensor.zero_()
        torch.manual_seed(100)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif not parameter.any():
                parameter.normal_(0, 0.1)
        if seed:
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model
