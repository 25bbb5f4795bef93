"""One prompt at one λ: exactly, merged, or exactly with the merged model drafting."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import set_seed

from .errors import DeraError
from .pair import ModelPair
from .prompts import encode

Mode = Literal["exact", "merged", "speculative"]


def decode(
    pair: ModelPair,
    lam: float,
    prompt: str,
    *,
    mode: Mode = "exact",
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str | None = None,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        pair: the two models.
        lam: λ.
        prompt: raw text, or with `chat` a user's turn.
        mode: `"exact"` runs both models, `"merged"` θ_ref + λΔ, `"speculative"` lets the merged model draft and both
            verify (Leviathan et al., 2023): the output is exact DeRa's.
        max_new_tokens: in tokens.
        temperature: 0 is greedy.
        seed: of sampling.
        device, compute_dtype: where and in what to run; default float32 on CPU, else the checkpoint's dtype.

    Returns:
        `text` (special tokens left out), `token_ids` (the new ones), `prompt_tokens` (their count).

    Raises:
        DeraError: the pair cannot be run in this mode, or the prompt has no tokens.
    """
    tokenizer = pair.tokenizer
    entry = {"messages": [{"role": "user", "content": prompt}]} if chat else prompt
    (encoded,) = encode([entry], tokenizer)
    limit = pair.context_length
    if limit and len(encoded.ids) + max_new_tokens > limit:
        raise DeraError(f"{len(encoded.ids)} prompt tokens and {max_new_tokens} new ones are more than the model's {limit}")
    if compute_dtype is None:
        compute_dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    draft = pair.merged(lam, device=device, compute_dtype=compute_dtype) if mode != "exact" else None
    model = draft if mode == "merged" else pair.exact(lam, dtype=compute_dtype, device=device)
    assert model is not None
    warper = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = torch.tensor([encoded.ids], device=device)
    set_seed(seed)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id, **warper, **({"assistant_model": draft} if mode == "speculative" else {}),
    )  # fmt: skip
    new = output[0, len(encoded.ids) :].tolist()
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new,
        "prompt_tokens": len(encoded.ids),
    }
