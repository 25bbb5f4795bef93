#!/usr/bin/env python3
"""What this package does on a GPU: right tokens, and what they cost. Tables ready for docs/benchmarks.md.

    python scripts/gpu_check.py                                    # one data-centre GPU, eight minutes
    python scripts/gpu_check.py --smollm2 REF ALIGNED              # with calibration on a real pair
    python scripts/gpu_check.py --sizes small --device cpu         # the same parts in little, half a minute

A finished part is a line of OUT/finished.jsonl; the same command goes on with what is missing, so call it again where
time ran out, or where something failed and was mended. A part that failed is a `–` in its table, with the reason below
it, and the others go on. `--only decode,merge` runs some; names are those of the tables.

The large pair has the shape of Llama 3.1 8B and random weights, made on the device; its aligned side is a LoRA of rank
16 on all linear layers. "Two passes" of it runs the same weights twice, which reads as many bytes as two checkpoints.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, LlamaConfig, LogitsProcessorList

from dera_merge import DeraForCausalLM, ModelPair, Speculation, calibrate, compare, demo, sweep
from dera_merge.texts.noise import GumbelNoise

FULL = {
    "shape": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256,
    },
    "batches": [1, 8, 32], "prompt": 64, "tokens": [8, 40], "rounds": 2, "texts": [(256, 3), (4096, 3)], "new": 40,
    "measured": {"prompts": 16, "tokens": 32}, "modes": ["eager", "compiled"],
}  # fmt: skip
SMALL = {
    "shape": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 1024,
    },
    "batches": [1, 2], "prompt": 4, "tokens": [2, 4], "rounds": 1, "texts": [(16, 1)], "new": 6,
    "measured": {"prompts": 2, "tokens": 4}, "modes": ["eager", "static"],
}  # fmt: skip
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
LAMS = [0.5, 1.5]


class Check:
    """One run: what was asked, what is done, and the models that several parts share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.sizes = args, FULL if args.sizes == "full" else SMALL
        self.device = args.device
        self.on_gpu = self.device != "cpu"
        self.card = torch.cuda.get_device_name() if self.on_gpu else f"CPU, {torch.get_num_threads()} threads"
        self.dtype = "bfloat16" if self.on_gpu else "float32"
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "finished.jsonl"
        self.began = time.monotonic()
        self.models: dict[str, Any] = {}
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {row["part"]: row for row in map(json.loads, lines) if row["of"] == self.of}

    @property
    def of(self) -> list[str]:
        """What figures may stand in one table."""
        return [self.args.sizes, self.card, torch.__version__]

    @property
    def demo_parts(self) -> list[tuple[str, str, str]]:
        """Which model, how a step is run, and in which dtype."""
        if not self.on_gpu:
            return [(name, mode, "float32") for name, mode in DEMO if mode != "compiled"]
        return [(name, mode, dtype) for dtype in ("float32", "bfloat16") for name, mode in DEMO]

    def run(self, part: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do a part, unless it is done; keep its figures, or the reason why there are none."""
        kept = self.done.get(part, {})
        if "figures" in kept or (self.args.only and part.split("/")[0] not in self.args.only.split(",")):
            return
        if time.monotonic() - self.began > 60 * self.args.minutes:
            self.done[part] = {"failed": "time was up: call again"}
            return
        began = time.monotonic()
        try:
            row = {"figures": work()}
        except Exception as error:  # whatever it is, the other parts say more
            row = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        row = {"part": part, "of": self.of, "seconds": round(time.monotonic() - began, 1), **row}
        self.done[part] = row
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{part}: {row.get('failed') or 'done'}, {row['seconds']} s", file=sys.stderr)
        self.free()

    def free(self) -> None:
        """Give the device's memory back."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def forget(self) -> None:
        """Let go of shared models and of what was compiled for them."""
        self.models.clear()
        torch.compiler.reset()
        self.free()

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """A model that several parts use."""
        if name not in self.models:
            self.models[name] = make()
        return self.models[name]

    def settings(self, mode: str, room: int) -> dict[str, Any]:
        """Arguments of `generate`: as it is, with a cache of fixed size, or compiled, which must be one graph."""
        static = {"cache_implementation": "static", "max_cache_len": room}
        compiled = static | {"compile_config": CompileConfig(fullgraph=True)}
        return {"eager": {}, "static": static | {"disable_compile": True}, "compiled": compiled}[mode]

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds, until the device is done."""
        began = time.perf_counter()
        work()
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def measured(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Seconds, and the device's peak memory in GB."""
        self.free()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, Any] = {}
        seconds = self.timed(lambda: found.update(work()))
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else None
        return {"seconds": seconds, "GB": peak, **found}

    def large_pair(self) -> ModelPair:
        """Made once, on the device, and saved: what reads files can use it too."""
        folder = self.out / f"pair-{self.args.sizes}"
        if not (folder / "lora" / "adapter_config.json").exists():
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            config = LlamaConfig(**self.sizes["shape"], max_position_embeddings=4096, eos_token_id=1, pad_token_id=0)
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder / "ref", max_shard_size="5GB")
            AutoTokenizer.from_pretrained(demo.REF).save_pretrained(folder / "ref")
            settings = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(model, settings).save_pretrained(folder / "lora")
        return ModelPair.from_pretrained(folder / "ref", folder / "lora", base=folder / "ref")

    # a. The demo pair: is it right?

    def prompts(self, pair: ModelPair, device: str) -> dict[str, torch.Tensor]:
        texts = ["The hotel is", "My cousin told me that the", "I love", "This restaurant was"]
        return dict(pair.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(device))

    def demo_models(self, device: str, dtype: str) -> dict[str, Any]:
        pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
        exact = pair.exact(0.5, device=device, dtype=dtype)
        return {
            "two passes": DeraForCausalLM(exact.ref, exact.aligned, 0.5), "rows": exact, "dial": exact.dial(),
            "merged": pair.merged(0.5, device=device, compute_dtype=dtype),
        }  # fmt: skip

    def demo_texts(self, name: str, mode: str, device: str, dtype: str) -> torch.Tensor:
        """Tokens that a model writes, (texts, tokens)."""
        pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
        models = self.kept(f"demo {device} {dtype}", lambda: self.demo_models(device, dtype))
        inputs, new = self.prompts(pair, device), self.sizes["new"]
        more = {} if name == "merged" else {"lam": 0.5}
        if mode == "sampled":
            more["logits_processor"] = LogitsProcessorList([GumbelNoise(range(len(inputs["input_ids"])))])
        elif mode == "speculative":
            inputs = {key: value[1:2] for key, value in inputs.items()}
            more |= {"assistant_model": models["merged"], "speculation": Speculation()}
        else:
            more |= self.settings(mode, new + 16)
        output = models[name].generate(**inputs, max_new_tokens=new, **GREEDY, **more)
        return output[:, inputs["input_ids"].shape[1] :].cpu()

    @torch.no_grad()
    def demo_logits(self, name: str, device: str, dtype: str) -> torch.Tensor:
        """log π of the next token at every place of the plain texts, float64."""
        pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
        models = self.kept(f"demo {device} {dtype}", lambda: self.demo_models(device, dtype))
        ids = self.demo_texts("two passes", "eager", "cpu", "float32")
        ids = torch.cat([self.prompts(pair, "cpu")["input_ids"][:, -2:], ids], 1).to(device)
        more = {} if name == "merged" else {"lam": 0.5}
        return models[name](ids, **more).logits.double().cpu().log_softmax(-1)

    def right(self, name: str, mode: str, dtype: str) -> dict[str, Any]:
        """Tokens on the device against those of a CPU in float32, and kl of the distributions."""
        theirs = self.demo_texts(name, mode if mode in ("sampled", "speculative") else "eager", "cpu", "float32")
        ours = self.demo_texts(name, mode, self.device, dtype)
        same = (ours == theirs).float().cumprod(1)  # up to the first that differs; all after it follow from that
        exact = self.demo_logits(name, "cpu", "float32")
        here = self.demo_logits(name, self.device, dtype)
        rows = min(exact.shape[-1], here.shape[-1])
        exact, here = exact[..., :rows], here[..., :rows]
        return {
            "texts": float(same.amin(1).mean()), "tokens": float(same.mean()),
            "kl": float((exact.exp() * (exact - here)).sum(-1).mean()),
        }  # fmt: skip

    def figures(self, device: str) -> dict[str, Any]:
        pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
        few = self.sizes["measured"]
        prompts = [{"prompt": text, "completion": " was very good and the room was clean"}
                   for text in ("The hotel", "My cousin said it", "The food")]  # fmt: skip
        report = compare(
            pair, LAMS, prompts, dtype="float32", extras=(), max_new_tokens=few["tokens"], device=device,
            compute_dtype="float32",
        )  # fmt: skip
        return {f"{row['lambda']:g}": {key: row[key] for key in ("kl", "tv", "kl_ref")} for row in report.results}

    # b. What a token costs at the large shape

    def contestant(self, name: str, mode: str) -> Any:
        exact = self.kept("exact", lambda: self.large_pair().exact(0.5, device=self.device, dtype=self.dtype))
        make = {
            "one model": lambda: exact.ref, "two plain rows": lambda: exact.ref, "rows": lambda: exact,
            "two passes": lambda: DeraForCausalLM(exact.ref, exact.ref), "dial": exact.dial,
        }  # fmt: skip
        key = "one model" if name == "two plain rows" else name
        return self.kept(f"{key} {mode}", make[name])

    def step(self, name: str, mode: str, batch: int) -> dict[str, Any]:
        """Milliseconds of one step: what longer texts take more than shorter ones, over the steps that they have more.

        The first call compiles; it is not counted.
        """
        model, (short, long) = self.contestant(name, mode), self.sizes["tokens"]
        rows = batch * (2 if name == "two plain rows" else 1)
        ids = torch.randint(2, 1000, (rows, self.sizes["prompt"]), device=self.device)
        settings = GREEDY | self.settings(mode, self.sizes["prompt"] + long)

        def run(new: int) -> float:
            return self.timed(lambda: model.generate(ids, max_new_tokens=new, **settings))

        first = run(long)
        more = [run(long) - run(short) for _ in range(self.sizes["rounds"])]
        return {"ms": 1000 * statistics.median(more) / (long - short), "first": first}

    def floor(self) -> dict[str, Any]:
        """Milliseconds to read what a step reads of one model's weights, at the bandwidth of a large copy."""
        model = self.contestant("one model", "eager")
        heads = {id(p) for p in model.get_input_embeddings().parameters()}  # of which a step reads one row a token
        heads -= {id(p) for p in model.get_output_embeddings().parameters()}
        size = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in heads)
        block = torch.empty(2**30 if self.on_gpu else 2**24, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(block)
        seconds = min(self.timed(lambda: other.copy_(block)) for _ in range(6))
        return {"GB": size / 1e9, "GB/s": 2 * len(block) / seconds / 1e9, "ms": 1000 * size * seconds / 2 / len(block)}

    # c. Sampling

    def sampling(self, name: str, noise: bool, batch: int) -> dict[str, Any]:
        """Tokens a second, all of a call counted but the first."""
        mode = self.sizes["modes"][-1]
        model, new = self.contestant(name, mode), self.sizes["tokens"][-1]
        ids = torch.randint(2, 1000, (batch, self.sizes["prompt"]), device=self.device)
        more = GREEDY | self.settings(mode, self.sizes["prompt"] + new)
        if not noise:
            more |= {"do_sample": True, "top_k": 0}

        def run() -> float:
            own = {"logits_processor": LogitsProcessorList([GumbelNoise(range(batch))])} if noise else {}
            return self.timed(lambda: model.generate(ids, max_new_tokens=new, **more, **own))

        run()
        seconds = statistics.median(run() for _ in range(self.sizes["rounds"]))
        return {"tokens/s": batch * new / seconds}

    # d., e., f. Work on whole pairs

    def compared(self) -> dict[str, Any]:
        few = self.sizes["measured"]
        prompts = [f"The hotel number {number} is" for number in range(few["prompts"])]
        compare(self.large_pair(), LAMS, prompts, max_new_tokens=few["tokens"], extras=(), device=self.device)
        return {}

    def swept(self) -> dict[str, Any]:
        few = self.sizes["measured"]
        prompts = [f"The hotel number {number} is" for number in range(few["prompts"])]
        sweep(
            self.large_pair(), prompts, [lambda text: float(len(text))], merged=False, check=False,
            max_new_tokens=few["tokens"], device=self.device,
        )  # fmt: skip
        return {}

    def calibrated(self, texts: int, passes: int) -> dict[str, Any]:
        if self.args.smollm2 is None and self.args.sizes == "full":
            raise ValueError("no pair: give --smollm2 REF ALIGNED")
        pair = ModelPair.from_pretrained(*(self.args.smollm2 or (demo.REF, demo.ALIGNED_LORA)))
        rank, few = self.args.rank, self.sizes["measured"]
        began = time.monotonic()
        path = calibrate(
            pair, [0.0, 2.0], texts=texts, passes=passes, rank=rank, device=self.device, max_new_tokens=48 if
            self.args.sizes == "full" else 8,
        )  # fmt: skip
        seconds = time.monotonic() - began
        report = compare(
            pair, [0.5, 1.5, 2.0], path=path, dtype="float32", extras=(), max_new_tokens=few["tokens"], seed=1000,
            device=self.device, prompts=None if self.args.sizes == "full" else ["The hotel is"],
        )  # fmt: skip
        over = {f"{row['lambda']:g}": row["line"]["kl"] / row["kl"] for row in report.results}
        return {"calibration": seconds, "over": over}

    def merged(self) -> dict[str, Any]:
        pair, out = self.large_pair(), self.out / "merged"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        pair.merge(out, [0.5])
        seconds = time.perf_counter() - began
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        return {"GB": size / 1e9, "seconds": seconds}


CONTESTANTS = ["one model", "two passes", "rows", "dial", "two plain rows"]
DEMO = [
    *((name, mode) for name in ("two passes", "rows", "dial") for mode in ("eager", "static", "compiled")),
    ("rows", "sampled"), ("rows", "speculative"), ("merged", "eager"),
]  # fmt: skip
SAMPLED = [("one model", False), ("one model", True), ("rows", False), ("rows", True)]


def work(check: Check) -> None:
    """All parts; the most is said first, so that a run which is cut short says something of everything."""
    for device in ("cpu", check.device):
        check.run(f"figures/{device}", lambda device=device: check.figures(device))
    for name, mode, dtype in check.demo_parts:
        check.run(f"tokens/{name}/{mode}/{dtype}", lambda of=(name, mode, dtype): check.right(*of))
    check.forget()
    first, *larger = check.sizes["batches"]
    eager, fixed = check.sizes["modes"]
    check.run("floor", check.floor)
    for batch in check.sizes["batches"]:
        steps(check, eager, batch)
    steps(check, fixed, first)
    check.forget()
    check.run("compare", lambda: check.measured(check.compared))
    check.run("sweep", lambda: check.measured(check.swept))
    check.run("merge", check.merged)
    few, *many = check.sizes["texts"]
    learn(check, *few)
    for batch in larger:
        steps(check, fixed, batch)
    for name, noise in SAMPLED:
        check.run(f"sampling/{name}/{noise}", lambda of=(name, noise, check.sizes["batches"][-1]): check.sampling(*of))
    check.forget()
    for more in many:
        learn(check, *more)


def learn(check: Check, texts: int, passes: int) -> None:
    part = f"calibrate/{texts}×{passes}/{check.args.rank}"
    check.run(part, lambda: check.measured(lambda: check.calibrated(texts, passes)))


def steps(check: Check, mode: str, batch: int) -> None:
    for name in CONTESTANTS:
        check.run(f"decode/{name}/{mode}/{batch}", lambda name=name: check.step(name, mode, batch))


def table(check: Check, head: list[str], rows: Iterable[tuple[str, list[tuple[str, Callable[[Any], str]]]]]) -> None:
    """Markdown: each cell is a part and what to show of its figures; `–` where there are none, with reasons below."""
    reasons: dict[str, list[str]] = {}
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for title, cells in rows:
        shown = []
        for part, show in cells:
            row = check.done.get(part, {"failed": "not run"})
            shown.append(show(row["figures"]) if "figures" in row else "–")
            if "failed" in row and part not in (parts := reasons.setdefault(row["failed"], [])):
                parts.append(part)
        print(f"| {title} | {' | '.join(shown)} |")
    print()
    for reason, parts in reasons.items():
        print(f"–: {parts[0]}{f' and {len(parts) - 1} more' if parts[1:] else ''}: {reason}\n")


def tables(check: Check) -> None:
    sizes = check.sizes
    print(f"{check.card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, `--sizes {check.args.sizes}`\n")
    print(f"The demo pair at λ = 0.5, beside a CPU in float32: texts that are the same to the end, tokens before the "
          f"first that differs, and kl of the distributions ({sizes['new']} tokens, nats)\n")  # fmt: skip
    table(check, ["", "dtype", "texts", "tokens", "kl"], (
        (f"{name}, {mode} | {dtype}", [
            (f"tokens/{name}/{mode}/{dtype}", lambda f: f"{f['texts']:.0%}"),
            (f"tokens/{name}/{mode}/{dtype}", lambda f: f"{f['tokens']:.0%}"),
            (f"tokens/{name}/{mode}/{dtype}", lambda f: f"{f['kl']:.1e}"),
        ]) for name, mode, dtype in check.demo_parts
    ))  # fmt: skip
    print("compare's figures on given texts, float32\n")
    table(check, ["λ", "figure", "CPU", check.device], (
        (f"{lam:g} | {key}", [
            (f"figures/{device}", lambda f, at=(f"{lam:g}", key): f"{f[at[0]][at[1]]:.6g}")
            for device in ("cpu", check.device)
        ]) for lam in LAMS for key in ("kl", "tv", "kl_ref")
    ))  # fmt: skip
    floor = check.done.get("floor", {}).get("figures")
    if floor:
        print(f"One step of the large shape, {check.dtype}. Floor: {floor['GB']:.2f} GB of weights at "
              f"{floor['GB/s']:.0f} GB/s: {floor['ms']:.2f} ms\n")  # fmt: skip
    keys = [(mode, batch) for mode in sizes["modes"] for batch in sizes["batches"]]

    def of_one(part: str) -> Callable[[Any], str]:
        name, mode, batch = part.split("/")[1:]
        one = check.done.get(f"decode/one model/{mode}/{batch}", {}).get("figures")
        return lambda f: f"{f['ms']:.2f}" + (f" ({f['ms'] / one['ms']:.2f})" if one and name != "one model" else "")

    table(check, ["ms (one model = 1)", *(f"{mode}, {batch}" for mode, batch in keys)], (
        (name, [(part, of_one(part)) for part in (f"decode/{name}/{mode}/{batch}" for mode, batch in keys)])
        for name in CONTESTANTS
    ))  # fmt: skip
    print("Seconds of the first call, which compiles\n")
    table(check, ["", *(f"{mode}, {batch}" for mode, batch in keys)], (
        (name, [(f"decode/{name}/{mode}/{batch}", lambda f: f"{f['first']:.1f}") for mode, batch in keys])
        for name in CONTESTANTS
    ))  # fmt: skip
    print(f"Sampling, {sizes['batches'][-1]} texts at once, {sizes['modes'][-1]}\n")
    table(check, ["", "tokens/s"], (
        (f"{name}, {'our noise' if noise else 'multinomial'}",
         [(f"sampling/{name}/{noise}", lambda f: f"{f['tokens/s']:.0f}")]) for name, noise in SAMPLED
    ))  # fmt: skip
    few, cores = sizes["measured"], len(os.sched_getaffinity(0))
    print(f"Whole work: compare and sweep of {few['prompts']} prompts and {few['tokens']} tokens, with the device's "
          f"peak memory; merge on {cores} cores, with what it wrote\n")  # fmt: skip
    calibrations = [f"calibrate/{texts}×{passes}/{check.args.rank}" for texts, passes in sizes["texts"]]
    table(check, ["", "s", "GB"], (
        (part, [(part, lambda f: f"{f['seconds']:.1f}"),
                (part, lambda f: "" if f["GB"] is None else f"{f['GB']:.1f}")])
        for part in ("compare", "sweep", "merge")
    ))  # fmt: skip
    print("Calibration: line's kl over the path's, on unseen prompts\n")
    table(check, ["texts × passes / rank", "s", "λ = 0.5", "λ = 1.5", "λ = 2"], (
        (part.partition("/")[2], [(part, lambda f: f"{f['calibration']:.0f}")]
         + [(part, lambda f, lam=lam: f"÷{f['over'][lam]:.2f}") for lam in ("0.5", "1.5", "2")])
        for part in calibrations
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", choices=["full", "small"], default="full")
    parser.add_argument("--out", default="gpu-check", help="finished parts, and the large pair (16 GB; gpu-check)")
    parser.add_argument("--only", default="", help="kinds of parts, separated by commas: tokens,figures,floor,decode,…")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after these (8)")
    parser.add_argument("--smollm2", nargs=2, metavar=("REF", "ALIGNED"), help="a real pair, to calibrate")
    parser.add_argument("--rank", type=int, default=16, help="of calibrated paths (16)")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --sizes small --device cpu runs all parts in little")
    torch._dynamo.config.recompile_limit = 64  # several models go through one function of torch's
    check = Check(args)
    try:
        work(check)
    finally:
        tables(check)


if __name__ == "__main__":
    main()
