#!/usr/bin/env python3
"""How much memory and processor time calibrate takes in each of its ways, each in a process of its own.

    python scripts/bench_calibrate.py --pair REF LORA [--texts 32] [--passes 1] [--tokens 32] [--ways float32 …]
    python scripts/bench_calibrate.py DIR [--size 1.1B]

Takes a pair that is there, or makes a random LoRA pair of bfloat16 in DIR, as `bench_memory.py` does. Peak memory is
the largest resident set of the process (Linux's `VmHWM`), libraries included; of it the process's own is what is no
page of a mapped file (`RssAnon`). Expected is what calibrate counts on beside libraries.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from bench_memory import with_tokenizer
from bench_merge import SIZES, make_lora, make_model

WAYS = {  # dtype, whether activations are checkpointed, what the base is held in
    "float32": ("float32", False, None),
    "float32-checkpointed": ("float32", True, None),
    "bfloat16": ("bfloat16", False, None),
    "bfloat16-checkpointed": ("bfloat16", True, None),
    "4bit": ("bfloat16", True, "4bit"),
}
WORK = """
import json, random, sys, threading, time, warnings
warnings.simplefilter("ignore")
options = json.loads(sys.argv[1])
import torch, transformers.models.llama.modeling_llama
from dera_merge import ModelPair, calibrate
from dera_merge.calibrating import calibrate as work
def of(key):
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(key))
dtype, recomputed, load_in = options["way"]
how, expected = {"compute_dtype": dtype}, None
if hasattr(work, "way"):
    from dera_merge.calibrating.ways import Way
    def way(size, *_):
        global expected
        one = Way(getattr(torch, dtype), recomputed)
        expected = size.takes(one.dtype, recomputed, load_in)
        return one
    work.way, how["load_in"] = way, load_in
prompts = None
if options["words"]:
    dice = random.Random(0)
    prompts = [" ".join(f"w{dice.randrange(options['words'])}" for _ in range(16)) for _ in range(options["texts"])]
own = [0]
def watch():
    while True:
        own[0] = max(own[0], of("RssAnon"))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
begun = time.process_time()
path = calibrate(
    ModelPair.from_pretrained(options["ref"], options["aligned"]), [0.0, 2.0], prompts, texts=options["texts"],
    max_new_tokens=options["tokens"], passes=options["passes"], **how)
print(json.dumps({
    "seconds": time.process_time() - begun, "peak": of("VmHWM") * 1024, "own": own[0] * 1024, "expected": expected,
    "held_out": path.recipe["held_out"],
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--pair", nargs=2, metavar=("REF", "ALIGNED"))
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    if args.pair:
        (ref, aligned), words = args.pair, 0
    elif args.folder:
        words = SIZES[args.size][4]
        ref = with_tokenizer(make_model(args.folder / f"ref {args.size}", args.size, False), words)
        aligned = make_lora(args.folder / f"lora {args.size}", args.size)
    else:
        parser.error("give DIR or --pair")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{time.strftime('%Y-%m-%d')}; {args.texts} texts of {args.tokens} tokens, {args.passes} passes\n")
    print("| way | peak RSS | of it its own | expected | CPU seconds | held out: line | path |")
    print("|---|---|---|---|---|---|---|")
    for name in args.ways:
        options = {"ref": str(ref), "aligned": str(aligned), "way": WAYS[name], "words": words} | {
            key: getattr(args, key) for key in ("texts", "tokens", "passes")
        }
        done = subprocess.run([sys.executable, "-c", WORK, json.dumps(options)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        took = json.loads(done.stdout.splitlines()[-1])
        expected = "–" if took["expected"] is None else f"{took['expected'] / 1e9:.2f} GB"
        kl = [" / ".join(f"{side[which]:.2g}" for side in took["held_out"].values()) for which in ("line", "path")]
        memory = " | ".join(f"{took[key] / 1e9:.2f} GB" for key in ("peak", "own"))
        print(f"| {name} | {memory} | {expected} | {took['seconds']:.0f} | {' | '.join(kl)} |", flush=True)


if __name__ == "__main__":
    main()
