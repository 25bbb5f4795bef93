#!/usr/bin/env python3
"""How much memory, time and reading a comparison takes, in a process of its own.

    python scripts/bench_memory.py DIR [--size 336M] [--aligned dense lora] [--ways whole layered] [--texts 32]
                                       [--tokens 64] [--lambdas 9]
    python scripts/bench_memory.py --pair REF ALIGNED
    python scripts/bench_memory.py --paper [--disk 3] [--rate 100]

Makes random pairs of bfloat16 in DIR, as `bench_merge.py` does, or takes a pair that is there. Texts are given, so that
nothing is sampled. Peak memory is the largest resident set of the process (Linux's `VmHWM`), libraries and whatever it
maps of files included, and the part of it that is its own (`RssAnon`, looked at 50 times a second); pages of files that
the system keeps for plain reads are neither's. Bytes read are what it asked the system for (`rchar`), from whichever
cache they came, and what came from the disk (`read_bytes`); what is mapped is not in the former.

`--paper` measures nothing: it computes for larger models, layer by layer in float32, what is held, how long a disk of
that many GB/s gives both files, and how long the weights of all models are made at that many millions a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_merge import SIZES, make_lora, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from what_fits import MODELS, OTHER, Shape

SIZES["336M"] = (1024, 2816, 24, 256, 32000, 1)
SIZES["60M"] = (512, 1408, 8, 128, 32000, 1)

WORK = """
import json, random, sys, threading, time, warnings
warnings.simplefilter("ignore")
options = json.loads(sys.argv[1])
import torch, transformers.models.llama.modeling_llama
from dera_merge import ModelPair, compare
pair = ModelPair.from_pretrained(options["ref"], options["aligned"])
words = [token for token in pair.tokenizer.get_vocab() if token.isascii() and token.isalnum()]
dice = random.Random(0)
say = lambda count: " ".join(dice.choices(sorted(words), k=count))
texts = [{"prompt": say(16), "completion": say(options["tokens"])} for _ in range(options["texts"])]
lams = [round(0.125 * number, 3) for number in range(1, options["lambdas"] + 1)]
def of(file, key):
    with open(f"/proc/self/{file}") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(key))
begun, before, disk = time.perf_counter(), of("io", "rchar"), of("io", "read_bytes")
libraries, own = of("status", "VmHWM"), [0]
def watch():
    while True:
        own[0] = max(own[0], of("status", "RssAnon"))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
report = compare(pair, lams, texts, extras=(), **options["how"])
print(json.dumps({
    "seconds": time.perf_counter() - begun, "read": of("io", "rchar") - before, "disk": of("io", "read_bytes") - disk,
    "peak": of("status", "VmHWM") * 1024, "libraries": libraries * 1024,
    "own": own[0] * 1024,
    "kl": [row["kl"] for row in report.results],
}))
"""


def with_tokenizer(folder: Path, vocabulary: int) -> Path:
    """Give a model's directory a tokenizer of made-up words."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


def measured(ref: str, aligned: str, texts: int, tokens: int, lambdas: int, **how: object) -> dict:
    """What one comparison took: seconds, bytes read, peak bytes; and its kl."""
    options = {"ref": ref, "aligned": aligned, "texts": texts, "tokens": tokens, "lambdas": lambdas, "how": how}
    done = subprocess.run([sys.executable, "-c", WORK, json.dumps(options)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def weights(*folders: str) -> int:
    """Bytes of the weights in some directories."""
    return sum(file.stat().st_size for folder in folders for file in Path(folder).glob("*.safetensors"))


LARGE = {
    "8B (Llama 3)": MODELS["8B (Llama 3)"], "70B (Llama 3)": MODELS["70B (Llama 3)"],
    "405B (Llama 3.1)": Shape(16384, 53248, 126, 1024, 128256),
}  # fmt: skip


def on_paper(texts: int, tokens: int, lambdas: int, disk: float, rate: float) -> None:
    """Print what a comparison of two dense bfloat16 checkpoints takes layer by layer, computed."""
    print(f"{texts} texts of {tokens} tokens, {lambdas} λ, {disk:g} GB/s, {rate:g} M weights a second; computed\n")
    print("| model | both files | reading them | weights of all models | held |\n|---|---|---|---|---|")
    count = 2 + 2 * lambdas  # each λ as stored, and not rounded
    for name, shape in LARGE.items():
        files = 2 * 2 * shape.weights
        layer = (2 * 2 * 2 + 4) * shape.layer  # two layers as both files have them, one model's in float32
        heads = (2 * 2 + 4 * 4) * shape.head  # as both files have it, both sides' and two of one λ
        states = 4 * count * texts * tokens * shape.hidden
        held = max(layer + states, heads + states) + OTHER
        print(f"| {name} | {files / 1e9:.0f} GB | {files / disk / 1e9:.0f} s | "
              f"{count * shape.weights / rate / 1e6 / 60:.0f} min | {held / 1e9:.0f} GB |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--pair", nargs=2, metavar=("REF", "ALIGNED"))
    parser.add_argument("--size", choices=SIZES, default="336M")
    parser.add_argument("--aligned", nargs="*", choices=("dense", "lora"), default=["dense", "lora"])
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lambdas", type=int, default=9)
    parser.add_argument("--ways", nargs="*", choices=("whole", "layered"), default=["whole", "layered"])
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--disk", type=float, default=3)
    parser.add_argument("--rate", type=float, default=100)
    args = parser.parse_args()
    if args.paper:
        return on_paper(args.texts, args.tokens, args.lambdas, args.disk, args.rate)
    if args.pair:
        pairs = {"given": tuple(args.pair)}
    elif args.folder:
        ref = with_tokenizer(make_model(args.folder / f"ref {args.size}", args.size, False), SIZES[args.size][4])
        pairs = {}
        if "dense" in args.aligned:
            pairs["dense"] = (str(ref), str(make_model(args.folder / f"aligned {args.size}", args.size, True)))
        if "lora" in args.aligned:
            pairs["lora"] = (str(ref), str(make_lora(args.folder / f"lora {args.size}", args.size)))
    else:
        parser.error("give DIR or --pair")
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"{args.texts} texts of {args.tokens} tokens, {args.lambdas} λ\n")
    columns = ("pair", "weights", "way", "peak RSS", "its own", "libraries at first", "seconds", "asked for / weights",
               "from disk / weights")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, (ref, aligned) in pairs.items():
        size, kl = weights(ref, aligned), []
        for way in args.ways:
            how = {"max_memory": 1} if way == "layered" else {}
            took = measured(ref, aligned, args.texts, args.tokens, args.lambdas, **how)
            kl.append(took["kl"])
            memory = (f"{took[key] / 1e9:.2f} GB" for key in ("peak", "own", "libraries"))
            read = (f"{took[key] / size:.2f}" for key in ("read", "disk"))
            row = (name, f"{size / 1e9:.2f} GB", way, *memory, f"{took['seconds']:.0f}", *read)
            print(f"| {' | '.join(row)} |", flush=True)
        if len(kl) == 2:
            apart = max(abs(one - other) / other for other, one in zip(*kl, strict=True) if other)
            print(f"\n{name}: kl apart by at most {apart:.1e}, relatively\n")


if __name__ == "__main__":
    main()
