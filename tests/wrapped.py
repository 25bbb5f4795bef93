"""Tiny random models of classes that wrap a text decoder and see images, and an image for each to look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from builders import save_tokenizer

VOCAB, IMAGE = 64, 60  # rows of the vocabulary; the token that stands for a piece of an image
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
SEES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4, "initializer_range": 0.3,
}  # fmt: skip
QWEN = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_heads": 4, "depth": 2, "initializer_range": 0.3}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _gemma3() -> tf.PreTrainedConfig:
    return tf.Gemma3Config(text_config={**TEXT, "sliding_window": 16}, vision_config=SEES, mm_tokens_per_image=4,
                           image_token_index=IMAGE, boi_token_index=61, eoi_token_index=62,
                           tie_word_embeddings=False)  # fmt: skip


def _gemma4() -> tf.PreTrainedConfig:
    text = {**TEXT, "sliding_window": 16, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    sees = {**SEES, "head_dim": 8, "num_key_value_heads": 4, "pooling_kernel_size": 2, "position_embedding_size": 16}
    return tf.Gemma4Config(text_config=text, vision_config=sees, audio_config=None, image_token_id=IMAGE,
                           video_token_id=61, audio_token_id=62, tie_word_embeddings=False)  # fmt: skip


def _qwen25() -> tf.PreTrainedConfig:
    sees = {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
            "fullatt_block_indexes": [1]}  # fmt: skip
    return tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=sees, **QWEN_TOKENS)


def _qwen3() -> tf.PreTrainedConfig:
    sees = {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0]}  # fmt: skip
    return tf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=sees, **QWEN_TOKENS)


def _qwen35() -> tf.PreTrainedConfig:
    sees = {**QWEN, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    text = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}, "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
    return tf.Qwen3_5Config(text_config=text, vision_config=sees, **QWEN_TOKENS)


def _mistral3() -> tf.PreTrainedConfig:
    return tf.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
        vision_config={**SEES, "model_type": "pixtral", "head_dim": 8}, image_token_index=IMAGE, spatial_merge_size=2,
    )  # fmt: skip


def _llava() -> tf.PreTrainedConfig:
    return tf.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**SEES, "model_type": "clip_vision_model"},
        image_token_index=IMAGE, image_seq_length=16,
    )  # fmt: skip


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def _grid() -> dict[str, torch.Tensor]:
    """A picture of 4 × 4 patches, which are merged two by two: 4 tokens."""
    return {"pixel_values": _pixels(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _gemma4_picture() -> dict[str, torch.Tensor]:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).flatten(0, 1)[None]
    return {"pixel_values": _pixels(1, 16, 3 * 4 * 4).sigmoid(), "image_position_ids": places}


# class → its config, one picture as its processor gives it, how many tokens stand for that, what else it takes
WRAPPED: dict[str, tuple[Callable[[], tf.PreTrainedConfig], Callable[[], dict[str, torch.Tensor]], int, str | None]] = {
    "Gemma3": (_gemma3, lambda: {"pixel_values": _pixels(1, 3, 16, 16)}, 4, "token_type_ids"),
    "Gemma4": (_gemma4, _gemma4_picture, 4, "mm_token_type_ids"),
    "Qwen2_5_VL": (_qwen25, _grid, 4, "mm_token_type_ids"),
    "Qwen3VL": (_qwen3, _grid, 4, "mm_token_type_ids"),
    "Qwen3_5": (_qwen35, _grid, 4, "mm_token_type_ids"),
    "Mistral3": (
        _mistral3, lambda: {"pixel_values": _pixels(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}, 4, None,
    ),
    "Llava": (_llava, lambda: {"pixel_values": _pixels(1, 3, 16, 16)}, 16, None),
}  # fmt: skip


def class_of(name: str) -> Any:
    return getattr(tf, f"{name}ForConditionalGeneration")


def tiny(name: str, seed: int) -> tf.PreTrainedModel:
    """A random model; seeds other than 0 are its fine-tuned kind, towers included."""
    torch.manual_seed(0)
    model = class_of(name)(WRAPPED[name][0]()).float().eval()
    torch.manual_seed(100)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves some at zero or undefined
            if not parameter.isfinite().all() or not parameter.any():
                parameter.normal_(0, 0.1)
        torch.manual_seed(seed)
        for parameter in model.parameters() if seed else ():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def picture(name: str, before: list[int], after: list[int]) -> dict[str, torch.Tensor]:
    """The inputs of a prompt with one picture in the middle."""
    _, look, tokens, types = WRAPPED[name]
    ids = torch.tensor([[*before, *[IMAGE] * tokens, *after]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **look()}
    return inputs | ({types: (ids == IMAGE).long()} if types else {})


def saved_pair(name: str, factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of a reference and its fine-tuned model, with a tokenizer each."""
    folders = []
    for seed in (0, 1):
        folders.append(factory.mktemp(f"{name}{seed}"))
        tiny(name, seed).save_pretrained(folders[-1])
        save_tokenizer(folders[-1])
    return folders
