"""Tiny random models, made once for the whole run. Nothing here reaches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import save_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes (once) the directory of a tiny random Llama: `llama(seed, dtype=…, **config)`."""
    made: dict[str, Path] = {}

    def make(seed: int = 0, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB", near: int | None = None, **config) -> Path:
        key = repr((seed, dtype, shard, near, sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("llama")
            model = tiny_llama(seed, **config)
            if near is not None:  # a fine-tuned model: another one's weights, moved a little
                torch.manual_seed(1000 + seed)
                for p, q in zip(model.parameters(), tiny_llama(near, **config).parameters(), strict=True):
                    p.data = q.data + 0.01 * torch.randn_like(q) * (torch.rand_like(q) < 0.5)
            model.to(dtype).save_pretrained(folder, max_shard_size=shard)
            save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a LoRA with random weights on a base directory: `lora(base, seed, **LoraConfig options)`."""

    def make(base: Path, seed: int = 7, **options) -> Path:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **options}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
            elif "modules_to_save.default" in name:
                parameter.data += 0.05 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("lora")
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make
