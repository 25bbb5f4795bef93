#!/usr/bin/env python3
"""The DeRa authors' own demonstration: Zephyr-7b at six strengths of alignment.

    pip install '.[quant]'
    python scripts/zephyr_demo.py                                          # on a GPU: 2 × 7B, 4-bit, from the Hub
    python scripts/zephyr_demo.py dera_merge/demo/reference dera_merge/demo/aligned-lora --full-precision --new-tokens
    40

The reference is HuggingFaceH4/mistral-7b-sft-beta, whose shards are pickled (read with weights_only=True), the aligned
model HuggingFaceH4/zephyr-7b-beta. Both are loaded in 4 bit. λ = 0 is the reference, 1 the aligned model, 10 far
beyond. Temperature 0.7, the 50 likeliest tokens, of these those that make up 0.95; 128 tokens; one seed for each λ, so
that texts differ by λ alone as far as the draws go.
"""

from __future__ import annotations

import argparse

import torch
from transformers import BitsAndBytesConfig

from dera_merge import DeraForCausalLM, ModelPair

LAMS = (0.0, 1 / 6, 2 / 3, 1.0, 3.0, 10.0)


def answer(model: DeraForCausalLM, pair: ModelPair, prompt: str, lam: float, *, new_tokens: int, seed: int) -> str:
    """One sampled answer to a user's turn at λ."""
    messages = [{"role": "user", "content": prompt}]
    inputs = pair.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    inputs = inputs.to(model.device)
    torch.manual_seed(seed)
    output = model.generate(
        **inputs, lam=lam, do_sample=True, temperature=0.7, top_k=50, top_p=0.95, max_new_tokens=new_tokens,
        pad_token_id=pair.tokenizer.pad_token_id or pair.tokenizer.eos_token_id,
    )  # fmt: skip
    return pair.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", nargs="?", default="HuggingFaceH4/mistral-7b-sft-beta")
    parser.add_argument("aligned", nargs="?", default="HuggingFaceH4/zephyr-7b-beta")
    parser.add_argument("--prompt", default="What do you think of rainy days?")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-precision", action="store_true", help="not in 4 bit")
    args = parser.parse_args()

    pair = ModelPair.from_pretrained(args.ref, args.aligned, allow_pickle=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = (
        None if args.full_precision else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    )
    model = pair.exact(device=device, **({"quantization_config": quantised} if quantised else {}))
    print(f"{args.prompt}\n")
    for lam in LAMS:
        text = answer(model, pair, args.prompt, lam, new_tokens=args.new_tokens, seed=args.seed)
        print(f"λ = {lam:.3g}\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
