"""What the fixtures and several tests build models from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from dera_merge import Curve
from dera_merge.calibrating.layers import bendable
from dera_merge.merging.path import Part
from dera_merge.models.fingerprint import fingerprint

VOCAB = 64
LAMS = (-0.5, 0.0, 0.3, 1.0, 2.0, 5.0)


def tiny_llama(seed: int, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, bos_token_id=None, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def tiny_mistral(seed: int, window: int | None) -> MistralForCausalLM:
    """As `tiny_llama`, with attention to the last `window` tokens."""
    settings = {**tiny_llama(0).config.to_dict(), "sliding_window": window}
    torch.manual_seed(seed)
    config = MistralConfig(**{key: value for key, value in settings.items() if key not in ("model_type", "architectures")})
    return MistralForCausalLM(config).eval()


def in_threads(work: Callable[[float], None], values: Iterable[float]) -> None:
    """Run `work` on all values at once, and wait."""
    threads = [threading.Thread(target=work, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def tokenizer(vocabulary: dict[str, int] | None = None) -> PreTrainedTokenizerFast:
    """Words w3 … w63, tokens for padding, end and unknown, and a chat template."""
    words = vocabulary or {"<pad>": 0, "<end>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}w3 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
    return fast


def save_tokenizer(folder: Path) -> None:
    tokenizer().save_pretrained(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, through the safetensors library."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def random_path(pair, rank=3, seed=0, size=0.05):
    """A curved path of a pair with random parts in every layer that can be bent."""
    torch.manual_seed(seed)
    parts = {}
    for name in bendable(pair).values():
        rows, columns = pair.tensors[name].shape
        low_rank = size * torch.randn(rows, rank), torch.randn(rank, columns), torch.randn(rank, 2)
        parts[name] = Part(0.5 * torch.randn(2), *low_rank)
    return Curve((0.0, 2.0), fingerprint(pair), parts)
