"""One prompt at one λ: exactly, merged, or exactly with the merged model drafting."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import LogitsProcessorList, set_seed

from ..decoding import settings
from ..decoding.exact import DeraForCausalLM
from ..decoding.plausibility import PlausibilityMask
from ..decoding.speculation import Speculation
from ..errors import DeraError
from ..merging.hollow import offloaded
from ..merging.live import live
from ..models.pair import Pair
from .images import beside, turn
from .offload import offloaded_exact, stored_dtype
from .prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["exact", "merged", "speculative"]
LoadIn = Literal["4bit", "8bit"]


def decode(
    pair: Pair,
    lam: float | Sequence[float],
    prompt: str,
    *,
    mode: Mode = "exact",
    chat: bool = False,
    images: Sequence[str | os.PathLike[str]] = (),
    max_new_tokens: int = 64,
    temperature: float | None = None,
    as_configured: bool = False,
    seed: int = 0,
    device: str | torch.device | Sequence[str | torch.device] = "cpu",
    compute_dtype: torch.dtype | str | None = None,
    load_in: LoadIn | None = None,
    plausibility: float | None = None,
    path: str | os.PathLike[str] | None = None,
    offload: bool = False,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        pair: the two models.
        lam: λ; with several aligned models, a number for each.
        prompt: raw text, or with `chat` or images a user's turn.
        images: files of images that the turn shows before the prompt; the pair's processor reads them.
        mode: `"exact"` runs both models, `"merged"` θ_ref + λΔ, `"speculative"` lets the merged model draft and both
            verify (Leviathan et al., 2023): the output is exact DeRa's.
        max_new_tokens: in tokens.
        temperature: 0, and None, is greedy; no warper applies beside it.
        as_configured: apply what the model's generation_config.json says (`top_k`, `repetition_penalty`, …), and decode
            its way where `temperature` is None. The output is then not said to be exact DeRa's.
        seed: of sampling.
        device: where to run; two devices put the reference on the first, the aligned model on the second.
        compute_dtype: in what to run; default float32 on CPU, else the checkpoint's dtype. A draft on a CPU is
            bfloat16.
        load_in: quantise both models with bitsandbytes when they are loaded; the output is exact DeRa of the quantised
            pair.
        plausibility: α of a `PlausibilityMask`; the output is then no longer exact DeRa.
        path: file of a learned path, for the merged model or the one that drafts.
        offload: hold no more than a layer of each model, see `merging.hollow.offloaded`: every token reads the files.

    Returns:
        `text` (special tokens left out), `token_ids` (the new ones), `prompt_tokens` (their count), `exact` (whether
        the tokens are exact DeRa's), `applied` (settings that change the distribution, name → value), `left_out` (what
        the model's generation config would have changed); with speculation `acceptance_rate`,
        `tokens_per_verification`, `drafted`, `verifications`.

    Raises:
        DeraError: the pair cannot be run in this mode, or the prompt has no tokens.
    """
    (lam,) = pair.known([lam])
    if plausibility:
        pair.only_pair("the plausibility mask is")
    tokenizer = pair.tokenizer
    if images:
        if mode == "speculative":
            raise DeraError("a draft reads no images; --mode exact and merged do")
        entry: str | dict[str, Any] = turn(prompt, [Path(image) for image in images])
    else:
        entry = {"messages": [{"role": "user", "content": prompt}]} if chat else prompt
    if not prompt and entry == prompt and not tokenizer("")["input_ids"]:
        raise DeraError("the prompt is empty, and this tokenizer begins a text with no token of its own; give a text")
    (encoded,) = encode([entry], tokenizer, lambda: pair.processor)
    count = len(encoded.ids)
    limit = pair.context_length
    if limit and count + max_new_tokens > limit:
        raise DeraError(f"{count} prompt tokens and {max_new_tokens} new ones are more than the model's {limit}")
    if mode == "merged" and (load_in or plausibility):
        raise DeraError(
            "quantised loading and the plausibility mask are for exact decoding; merge first, or leave them out"
        )
    if offload and (load_in or mode == "speculative"):
        raise DeraError("quantised models and drafts are held whole; leave out --load-in and --mode speculative")
    if mode == "exact" and path is not None:
        raise DeraError("exact decoding merges nothing; --path is for --mode merged and speculative")
    main_device = torch.device(device if isinstance(device, str | torch.device) else device[0])
    on_cpu = main_device.type == "cpu"
    if compute_dtype is None:
        compute_dtype = torch.float32 if on_cpu else stored_dtype(pair) if offload else "auto"
    options: dict[str, Any] = {}
    if mode == "merged":
        make_merged = offloaded if offload else live
        model = make_merged(pair, lam, device=main_device, compute_dtype=compute_dtype, path=path)
    elif offload:
        model = offloaded_exact(pair, lam, dtype=compute_dtype, device=device, as_configured=True)
    else:
        loading = {"quantization_config": quantised(load_in)} if load_in else {}
        model = DeraForCausalLM.from_pair(pair, lam, dtype=compute_dtype, device=device, as_configured=True, **loading)
    speculation = Speculation()
    if mode == "speculative":
        if (
            model.rows is not None and not on_cpu and path is None
        ):  # an adapter pair drafts with the weights that it has
            draft = model.dial()
        else:
            kind = torch.bfloat16 if on_cpu else compute_dtype
            draft = live(pair, lam, device=main_device, compute_dtype=kind, path=path)
        options |= {"assistant_model": draft, "speculation": speculation}
    if plausibility:
        options["logits_processor"] = LogitsProcessorList([PlausibilityMask(plausibility)])
    applied, left_out = configure(model, temperature, as_configured)
    ids = torch.tensor([encoded.ids], device=main_device)
    options |= {"attention_mask": torch.ones_like(ids), **beside(encoded.shown, count, model)}
    set_seed(seed)
    output = model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **options)
    new = output[0, count:].tolist()
    result = {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "token_ids": new,
        "prompt_tokens": count,
        "exact": mode != "merged" and not plausibility and not as_configured,
        "applied": applied,
        "left_out": left_out,
    }
    if mode == "speculative":
        keys = ("acceptance_rate", "tokens_per_verification", "drafted", "verifications")
        result |= {key: getattr(speculation, key) for key in keys}
    return result


def configure(
    model: PreTrainedModel, temperature: float | None, as_configured: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give a model the generation config of the calls that follow.

    On the model, because `generate` fills what a call leaves open from there.

    Args:
        model: which.
        temperature, as_configured: as for `decode`.

    Returns:
        What of the config changes the distribution, name → value; and what the model's own would have changed.
    """
    own = copy.deepcopy(model.generation_config)
    if temperature is not None or not as_configured:
        own.do_sample = bool(temperature)
    config = copy.deepcopy(own) if as_configured else settings.plain(own)
    if config.do_sample and config.top_k is None:
        config.top_k = 50  # transformers' own, where nobody gives one
    if temperature:
        config.temperature = temperature
    model.generation_config = config
    applied = settings.applied(config)
    return applied, {} if as_configured else {k: v for k, v in settings.applied(own).items() if k != "temperature"}


def quantised(load_in: LoadIn) -> Any:
    """transformers' config for loading weights in 4 (nf4) or 8 bits with bitsandbytes. Raises DeraError without it."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise DeraError("loading in 4 or 8 bits needs bitsandbytes: pip install 'bitsandbytes>=0.47.0'")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
