"""A tiny random model of any type that the installed transformers knows: its own config class, with small numbers.

A config's fields are recognised by name (`RULES`): a hidden size, a number of heads or experts, a token. What is
no size keeps the value that transformers gives it, so that a family is tried with its own switches. Where the full
model has layers of several kinds, the tiny one has a layer of each. `EXCEPTIONS` is for configs that need more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

PAD, END, UNKNOWN, FIRST = 0, 1, 2, 3  # tokens; text begins with FIRST


@dataclass(frozen=True)
class Sizes:
    """How large a tiny model is."""

    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    inner: int = 48
    experts: int = 4
    vocab: int = 96

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def text(self) -> int:
        """Tokens below this are text; those of images and the like are above."""
        return self.vocab - 32


# A field's whole name, and its value; the first that matches holds. Only whole numbers are changed.
RULES: list[tuple[str, Callable[[Sizes], int]]] = [
    (r"_?pad_token_id|padding_idx|pad_index", lambda s: PAD),
    (r"(eos|bos|sep|cls|decoder_start|unk|forced_eos|forced_bos|eod)_token_id|bos_index|eos_index", lambda s: END),
    (r"unk_index", lambda s: UNKNOWN),
    (r"type_vocab_size|task_type_vocab_size", lambda s: 2),
    (r"(text_|decoder_|tgt_|org_|unpadded_)?vocab_size(_per_layer_input)?|n_words", lambda s: s.vocab),
    (r"(max|n|num)_positions?(_embeddings)?|n_ctx|max_(target|source)_positions|model_max_length|context_length|"
     r"max_seq(uence)?_len(gth)?|original_max_position_embeddings|num_position_embeddings|rel_extent", lambda s: 256),
    (r"(num_|n_)?(swa_|global_)?(num_)?(key_value_heads|kv_heads)|n_head_kv|kv_n_heads|linear_num_key_heads|"
     r"num_query_groups", lambda s: s.kv_heads),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", lambda s: 2 * s.heads),
    (r"index_n_heads", lambda s: 2),
    (r"(\w+_)?attention_heads|(\w+_)?(num|n)_heads?|linear_num_(value_)?heads", lambda s: s.heads),
    (r"(\w+_)?(num_|n_)(\w+_)?layers|(encoder_|decoder_)?layers|n_layer|depth|num_blocks", lambda s: s.layers),
    (r"(\w+_)?qk_(rope|nope)_head_dim|rotary_dim", lambda s: s.head_dim // 2),
    (r"(\w+_)?(head_dim|d_head|dim_head|headdim|head_size)|kv_channels|d_kv", lambda s: s.head_dim),
    (r"(\w+_)?(q|kv|o)_lora_rank|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank|loop_gate_rank|d_rel",
     lambda s: s.hidden // 2),
    (r"\w*(intermediate|ffn_hidden|ffn|expert)_(size|dim)(_mlp)?|(encoder|decoder)_ffn_dim|n_inner|d_ff|dim_ff|dff|"
     r"mlp_dim|d_inner|feed_forward_size|\w+_intermediate_size", lambda s: s.inner),
    (r"(moe_)?(num|n)_(routed_|local_)?experts|zero_expert_num", lambda s: s.experts),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_?k|top_?k_experts|moe_k", lambda s: 2),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_groups|mamba_ngroups|(moe_)?(num|n)_shared_experts", lambda s: 1),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers|num_nextn_predict_layers", lambda s: 1),
    (r"attention_hidden_size|mamba_d_ssm", lambda s: 2 * s.hidden),
    (r"(\w+_)?hidden_size(_per_layer_input)?|d_model|n_embd|dim|(\w+_)?embed_dim|(\w+_)?embedding_size|emb_dim|"
     r"embedding_dim|dim_model|hidden_dim|lru_width|word_embed_proj_dim|projection_dim|vision_output_dim|output_dim|"
     r"projector_(in|out)put_dim|hidden_size_global|adapter_(in|out)_dim|dim_model_base", lambda s: s.hidden),
    (r"index_topk", lambda s: 64),  # all there is, since a choice may turn on rounding
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|local_attention|window_size|"
     r"chunk_size|mamba_chunk_size|block_size|index_block_size", lambda s: 8),
    (r"mamba_d_state|state_size|ssm_state_size", lambda s: 8),
    (r"time_step_rank|mamba_dt_rank", lambda s: 4),
    (r"query_pre_attn_scalar", lambda s: s.head_dim),
]  # fmt: skip
VISION_RULES: list[tuple[str, Callable[[Sizes], int]]] = [
    (r"(\w+_)?image_size|resolution", lambda s: 16),
    (r"(\w+_)?patch_size", lambda s: 4),
    (r"num_mel_bins", lambda s: 16),
    (r"num_embeddings", lambda s: 32),
    (r"(base|output|latent|\w+_out)_channels|num_filters|codebook_(size|dim)", lambda s: 32),
]
# Tokens of images and the like, above those of text, each its own.
SPECIAL = re.compile(
    r"(image|video|audio|vision|img|im|boi|eoi|boa|eoa|frame|low_res|user|system|mask)\w*_(id|index|token_id|token_index)"
)
# What a family needs beside the rules; the fields given here are left alone by them.
EXCEPTIONS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "bamba": lambda s: {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "blt": lambda s: {"num_hidden_layers": s.layers},
    "cohere_compass_text": lambda s: {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    "dbrx": lambda s: {"attn_config": {"kv_n_heads": s.kv_heads, "clip_qkv": 8, "rope_theta": 1e4}},
    "dory": lambda s: {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "ernie4_5_vl_moe_text": lambda s: {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, s.head_dim // 2 - 2]},
    },
    "fun_asr_nano_adaptor": lambda s: {"intermediate_size": s.hidden // 4},
    "gemma3n_text": lambda s: {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [s.inner] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "granitemoehybrid": lambda s: {
        "num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": s.inner,
    },
    "jamba": lambda s: {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "lfm2_moe": lambda s: {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": lambda s: {"num_heads": 2 * s.heads},
    "muse_glimmer_text": lambda s: {"output_norm_multiplier": 1.0},
    "qwen4_exp_text": lambda s: {
        "indexer_budget": 8, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": s.head_dim,
    },
    "recurrent_gemma": lambda s: {"num_hidden_layers": 3},
    "reformer": lambda s: {
        "attn_layers": (["local", "lsh"] * s.layers)[: s.layers], "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [8, s.hidden - 8], "num_hashes": 1, "hash_seed": 0,
    },
    "rwkv": lambda s: {"attention_hidden_size": s.hidden},
    "step3p7_text": lambda s: {"sliding_window": 8},
    "xlstm": lambda s: {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},  # it rounds to multiples of 64
    "xmod": lambda s: {"default_language": "en_XX"},
    "zamba": lambda s: {
        "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1, "layers_block_type": None,
        "n_mamba_heads": 2,
    },
    "zamba2": lambda s: {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1,
        "n_mamba_heads": s.heads, "mamba_headdim": 2 * s.hidden // s.heads,
    },
    "zaya": lambda s: {"num_experts_per_tok": 1},
}  # fmt: skip
# Fields that are None in some configs because the released checkpoints give them.
FILLED = re.compile("head_dim|num_key_value_heads|num_experts_per_tok|n_(routed|shared)_experts")


@cache
def families() -> dict[str, str]:
    """Model type → name of its class: causal language models, then what takes images or sound too."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    found: dict[str, str] = {}
    text, wrapped = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    for names in (text, wrapped):
        # Several types may be names of one config and class; the family's own name is the shortest.
        types: dict[tuple[str, str], str] = {}
        for kind, name in names.items():
            if kind in CONFIG_MAPPING_NAMES and not (names is text and kind in wrapped and f"{kind}_text" in text):
                key = CONFIG_MAPPING_NAMES[kind], name
                types[key] = min(types.get(key, kind), kind, key=len)
        for (_, name), kind in types.items():
            if found.get(kind) != name:
                found[kind if kind not in found else f"{kind}:{name}"] = name
    return found


def tiny_config(family: str, sizes: Sizes = Sizes()) -> PretrainedConfig:
    """The config of a tiny model of a family of `families()`."""
    config = CONFIG_MAPPING[family.partition(":")[0]]()
    if not isinstance(config, model_class(family).config_class):  # the text model of a wrapped one
        config = config.get_text_config()
    shrunk = _shrunk(config, sizes, iter(range(sizes.text, sizes.vocab)))
    if ":" not in family and family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and hasattr(shrunk, "is_decoder"):
        shrunk.is_decoder = True
    return shrunk


def model_class(family: str) -> type[PreTrainedModel]:
    """The class of transformers that a family of `families()` is made of."""
    import transformers

    return getattr(transformers, families()[family])


def _shrunk(config: PretrainedConfig, sizes: Sizes, specials: Iterator[int]) -> PretrainedConfig:
    seen = re.search("vision|audio|encoder|vit|vq|sam|speech", config.model_type)
    rules = VISION_RULES + RULES if seen else RULES
    exceptions = EXCEPTIONS.get(config.model_type, lambda sizes: {})(sizes)
    given: dict[str, Any] = {}
    fields = vars(config)
    for key, value in fields.items():
        if key in exceptions:
            given[key] = exceptions[key]
        elif isinstance(value, PretrainedConfig):
            given[key] = _shrunk(value, sizes, specials)
        elif key == "pad_token_id":
            given[key] = PAD
        elif type(value) is int and value > 0 and SPECIAL.fullmatch(key):
            given[key] = next(specials)
        elif (type(value) is int and value > 0) or (value is None and FILLED.fullmatch(key)):
            given |= next(({key: rule(sizes)} for name, rule in rules if re.fullmatch(name, key)), {})
    if "qk_rope_head_dim" in fields:  # latent attention: one compressed key and value for all heads
        for key in {"num_key_value_heads", "head_dim"} & fields.keys() - exceptions.keys():
            given[key] = sizes.heads if key == "num_key_value_heads" else sizes.head_dim // 2
    rope = fields.get("rope_parameters")
    in_sections = re.search("vl|glm4v|glm_ocr|omni", config.model_type) or "mrope_section" in str(rope)
    if in_sections and isinstance(rope, dict):
        given["rope_parameters"] = _sections(rope, given.get("head_dim", sizes.head_dim))
    given |= exceptions
    depth = None if "num_hidden_layers" in exceptions else getattr(config, "num_hidden_layers", None)
    lists = {
        key: value
        for key, value in fields.items()
        if isinstance(value, list) and len(value) == depth and key not in given
    }
    if not lists:
        return type(config)(**given)
    layers = _of_each_kind(list(lists.values()), sizes.layers)
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(config)(
        **given | {name: len(layers)} | {key: [value[i] for i in layers] for key, value in lists.items()}
    )


def _sections(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters whose sections for time, height and width fill half of a small head."""
    if any(isinstance(value, dict) for value in rope.values()):  # of each kind of layer
        return {key: _sections(value, head_dim) if isinstance(value, dict) else value for key, value in rope.items()}
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    sides = max(half // 3, min(half - 1, 1))
    return {**rope, "mrope_section": [half - 2 * sides if half > 2 else 1, sides, sides if half > 2 else 0]}


def _of_each_kind(lists: list[list[Any]], at_least: int) -> list[int]:
    """Layers such that each list's values are all there, no fewer than `at_least`."""
    chosen = [
        layer
        for layer in range(len(lists[0]))
        if any(values[layer] not in values[:layer] for values in lists if isinstance(values[0], str))
    ]
    chosen += [layer for layer in range(len(lists[0])) if layer not in chosen][: max(0, at_least - len(chosen))]
    return sorted(chosen)


def tiny_model(family: str, sizes: Sizes = Sizes(), seed: int = 0) -> PreTrainedModel:
    """A random model whose logits differ by about 1, float32, in evaluation mode; its config names its class."""
    config = tiny_config(family, sizes)
    torch.manual_seed(seed)
    model = model_class(family)(config).float().eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD, do_sample=False)
    stir(model, seed, 1.0)
    return model


@torch.no_grad()
def stir(model: PreTrainedModel, seed: int, strength: float) -> None:
    """Add noise to all weights, of a size that goes with how many inputs each value sums."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = strength * (0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
        parameter += size * torch.randn(parameter.shape, generator=generator)
