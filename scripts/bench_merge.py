#!/usr/bin/env python3
"""How fast is a merge, and how much memory does it take? Ratios within one run, beside copying files and beside
mergekit.

    python scripts/bench_merge.py DIR [--only NAME…] [--repeat 3] [--mergekit PYTHON]

Makes its inputs in DIR (random weights; about 20 GB free are needed, 6 for `--only experts`), measures each case
`--repeat` times in turn with its yardstick and prints the median ratio. `--mergekit` is the interpreter of an
environment with mergekit 0.1.5 in it (it wants older libraries than this project). The file system's cache is warm:
inputs are read once before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {  # hidden, intermediate, layers, key-value width, vocabulary, shards
    "1.1B": (2048, 5632, 22, 256, 32000, 4),
    "135M": (576, 1536, 30, 192, 49152, 1),
    "2GB tensor": (4096, 512, 1, 1024, 256000, 1),
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, kv, vocabulary, _ = SIZES[size]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
            ("mlp.down_proj", (hidden, inner)), ("input_layernorm", (hidden,)), ("post_attention_layernorm", (hidden,)),
        ):  # fmt: skip
            found[f"{prefix}{name}.weight"] = shape
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def make_model(folder: Path, size: str, tuned: bool) -> Path:
    """A Llama of random bfloat16 weights; `tuned` moves them by about an ulp."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    hidden, inner, layers, kv, vocabulary, count = SIZES[size]
    names = list(shapes(size).items())
    per_file = -(-len(names) // count)
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        tensors = {}
        for position, (name, shape) in enumerate(names[number * per_file : (number + 1) * per_file]):
            torch.manual_seed(1000 * number + position)
            tensors[name] = 0.02 * torch.randn(shape)
            if tuned:
                tensors[name] += 1e-4 * torch.randn(shape)
            tensors[name] = tensors[name].bfloat16()
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if count > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    heads = hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv // 64,
        "vocab_size": vocabulary, "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_lora(folder: Path, size: str, targets: tuple[str, ...] = TARGETS, rank: int = 16) -> Path:
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes(size).items():
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.02 * torch.randn(rank, shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.02 * torch.randn(shape[0], rank)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
              "target_modules": list(targets), "base_model_name_or_path": str(folder.parent)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


EXPERTS = """
import glob, shutil, sys, torch
from safetensors.torch import load_file, save_file
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
folder, layers, experts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = Qwen3MoeConfig(
    hidden_size=2048, moe_intermediate_size=768, intermediate_size=6144, num_hidden_layers=layers, num_experts=experts,
    num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=4096,
)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = Qwen3MoeForCausalLM(config)
model.save_pretrained(folder + "/ref")
held = ["experts.gate_up_proj", "experts.down_proj"]
settings = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], target_parameters=held, init_lora_weights=False)
get_peft_model(model, settings).save_pretrained(folder + "/lora")
shutil.copytree(folder + "/ref", folder + "/aligned")
for file in glob.glob(folder + "/aligned/*.safetensors"):
    moved = {name: value + 1e-4 * torch.randn(value.shape) for name, value in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
print("[0, 0]")
"""


def make_experts(folder: Path, layers: int = 2, experts: int = 128) -> tuple[Path, Path, Path]:
    """Qwen3-30B-A3B's shapes in fewer layers; as fine-tuned; and a LoRA on attention and experts."""
    ref, aligned, lora = (folder / name for name in ("ref", "aligned", "lora"))
    if not (aligned / "config.json").exists():  # in a process of its own: a child's peak is at least its parent's
        python(EXPERTS, str(folder), str(layers), str(experts))
    return ref, aligned, lora


# What is timed: each in a process of its own, which says how long it worked and how much memory it had at most

MERGE = """
import json, resource, sys, time
options = json.loads(sys.argv[1])
import huggingface_hub, torch, dera_merge.merging.merge
from dera_merge import ModelPair
from dera_merge.merging import kernels
if kernels.available():  # loads what numba has compiled
    for dtype in (torch.bfloat16, torch.float32):
        for noise in (None, torch.zeros(1, dtype=torch.int32)):
            kernels.store_bfloat16(*torch.zeros(2, 1, dtype=dtype), 0.5, noise, torch.zeros(1, dtype=torch.bfloat16))
if options.pop("adapter"):
    import transformers.models.llama.modeling_llama
ref, aligned, out, lams = (options.pop(key) for key in ("ref", "aligned", "out", "lams"))
began = time.perf_counter()
ModelPair.from_pretrained(ref, aligned).merge(out, lams, **options)
print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
PRODUCTS = """
import json, sys, time
import torch
from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
began = time.perf_counter()
for key in tensors:
    if key.endswith("lora_A.weight"):
        _ = 2.0 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
print(json.dumps([time.perf_counter() - began, 0]))
"""


def python(code: str, *arguments: str) -> tuple[float, float]:
    """(seconds of work, peak bytes) that a script says."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def merge(ref: Path, aligned: Path, out: Path, lams: list[float], **options: object) -> tuple[float, float]:
    clear(out)
    adapter = (aligned / "adapter_config.json").exists()
    settings = {"ref": str(ref), "aligned": str(aligned), "out": str(out), "lams": lams, "adapter": adapter, **options}
    return python(MERGE, json.dumps(settings))


def copying(inputs: list[Path], out: Path, copies: int = 1) -> float:
    """Seconds for `cat` of the inputs' weights, `cp` of the first one's, and sync."""
    clear(out)
    out.mkdir()
    files = [[str(file) for file in sorted(folder.glob("*.safetensors"))] for folder in inputs]
    began = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *(file for group in files for file in group)], stdout=nowhere, check=True)
    for number in range(copies):
        (out / str(number)).mkdir()
        subprocess.run(["cp", *files[0], str(out / str(number))], check=True)
    os.sync()
    return time.perf_counter() - began


def whole_process(command: list[str], out: Path) -> tuple[float, float]:
    """(seconds, peak bytes) of a command from start to end, sync included."""
    clear(out)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{command[0]} failed: {process.stderr.read().decode()[-2000:]}")
    began = time.perf_counter()
    os.sync()
    return seconds + time.perf_counter() - began, usage.ru_maxrss * 1024


def mergekit_command(interpreter: str, ref: Path, aligned: Path, out: Path, work: Path) -> list[str]:
    recipe = work / "mergekit.yaml"
    recipe.write_text(
        f"merge_method: linear\ndtype: bfloat16\nmodels:\n  - model: {ref}\n    parameters: {{weight: 0.5}}\n"
        f"  - model: {aligned}\n    parameters: {{weight: 0.5}}\n"
    )
    return [str(Path(interpreter).with_name("mergekit-yaml")), str(recipe), str(out), "--lazy-unpickle"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=["time", "memory", "mergekit", "processes", "experts"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mergekit", help="interpreter of an environment that holds mergekit 0.1.5")
    args = parser.parse_args()
    work = args.folder
    work.mkdir(parents=True, exist_ok=True)
    out = work / "out"
    if "experts" in args.only:
        one, other, adapter = make_experts(work / "experts")
        peaks = [merge(one, aligned, out, [0.5])[1] / 1e6 for aligned in (other, adapter)]
        print("\n| peak RSS, two layers of 128 experts | dense | LoRA |\n|---|---|---|")
        print(f"| Qwen3-30B-A3B's shapes | {peaks[0]:.0f} MB | {peaks[1]:.0f} MB |", flush=True)
        clear(out)
        if args.only == ["experts"]:
            return
    models = {size: (make_model(work / f"ref {size}", size, False), make_model(work / f"aligned {size}", size, True))
              for size in SIZES}  # fmt: skip
    loras = {size: make_lora(work / f"lora {size}", size) for size in SIZES}
    ref, aligned = models["1.1B"]
    lora, lora_qv = loras["1.1B"], make_lora(work / "lora qv", "1.1B", ("q_proj", "v_proj"))
    print(
        "Timed in a process of its own, imports and the loading of compiled code left out; whole processes have them "
        "in."
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")

    def compare(label: str, ours: Callable[[], float], yardstick: Callable[[], float], what: str) -> None:
        pairs = [(ours(), yardstick()) for _ in range(args.repeat)]
        ratio = statistics.median(one / other for one, other in pairs)
        seconds, other = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {label} | {seconds:.2f} s | {what} | {other:.2f} s | {ratio:.2f} |", flush=True)

    copying([ref, aligned, lora], out)  # warms the cache
    if "time" in args.only:
        print("| 1.1 B, bfloat16 | ours | yardstick | | ratio |\n|---|---|---|---|---|")
        both = [ref, aligned]
        four = [0.25, 0.5, 0.75, 1.5]
        compare("dense, nearest", lambda: merge(ref, aligned, out, [0.5], rounding="nearest")[0],
                lambda: copying(both, out), "cat both, cp one, sync")  # fmt: skip
        compare("dense, default", lambda: merge(ref, aligned, out, [0.5])[0],
                lambda: copying(both, out), "cat both, cp one, sync")  # fmt: skip
        compare("dense, four λ, nearest", lambda: merge(ref, aligned, out, four, rounding="nearest")[0],
                lambda: copying(both, out, 4), "cat both, cp four, sync")  # fmt: skip
        compare("dense, four λ, default", lambda: merge(ref, aligned, out, four)[0],
                lambda: copying(both, out, 4), "cat both, cp four, sync")  # fmt: skip
        for label, adapter in (("LoRA r=16, all layers", lora), ("LoRA r=16, q and v only", lora_qv)):
            products = str(adapter / "adapter_model.safetensors")
            for rounding in ("nearest", "stochastic"):
                compare(f"{label}, {rounding}", lambda a=adapter, r=rounding: merge(ref, a, out, [0.5], rounding=r)[0],
                        lambda p=products: copying([ref], out) + python(PRODUCTS, p)[0],
                        "cat, cp, sync, s·BA")  # fmt: skip
    if "memory" in args.only:
        print("\n| peak RSS of the whole process | dense | LoRA |\n|---|---|---|")
        for size, (one, other) in models.items():
            peaks = [merge(one, other, out, [0.5])[1] / 1e6, merge(one, loras[size], out, [0.5])[1] / 1e6]
            print(f"| {size} | {peaks[0]:.0f} MB | {peaks[1]:.0f} MB |", flush=True)
    if "mergekit" in args.only and args.mergekit:
        command = str(Path(sys.executable).with_name("dera-merge"))
        ours = [command, "merge", str(ref), str(aligned), "-l", "0.5", "-o", str(out)]
        theirs = mergekit_command(args.mergekit, ref, aligned, out, work)
        print(
            "\n| whole process, 1.1 B dense | ours | mergekit 0.1.5 linear | ratio | peak RSS |\n|---|---|---|---|---|"
        )
        for label, more in (("nearest", ["--rounding", "nearest"]), ("default", [])):
            pairs = [(*whole_process([*ours, *more], out), *whole_process(theirs, out)) for _ in range(args.repeat)]
            seconds, peak, other, other_peak = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"| {label} | {seconds:.1f} s | {other:.1f} s | {other / seconds:.2f} | {peak / 1e6:.0f} MB, "
                  f"{other_peak / 1e6:.0f} MB |", flush=True)  # fmt: skip
    if "processes" in args.only:
        program = str(Path(sys.executable).with_name("dera-merge"))
        command = [program, "merge", str(ref), str(aligned), "-l", "0.5", "-o",
                   str(out), "--max-shard-size", "500MB"]  # fmt: skip

        def together() -> float:
            clear(out)
            began = time.perf_counter()
            running = [subprocess.Popen([*command, "--shard", f"{i}/2"], stdout=subprocess.DEVNULL) for i in (1, 2)]
            assert [process.wait() for process in running] == [0, 0]
            os.sync()
            return time.perf_counter() - began

        print("\n| whole processes | | | | ratio |\n|---|---|---|---|---|")
        compare("two processes, --shard", together, lambda: whole_process(command, out)[0], "one process")
    clear(out)


if __name__ == "__main__":
    main()
