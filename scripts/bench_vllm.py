#!/usr/bin/env python3
"""What exact DeRa costs inside vLLM: tokens per second, beside one model in vLLM and beside transformers.

    python scripts/bench_vllm.py REF ALIGNED [--requests 32] [--new-tokens 64] [--dtype bfloat16] [--rounds 3]

Run it where vLLM is installed (`make test-vllm` makes such an environment). Contestants: REF in vLLM (1.0 by
definition); the merged checkpoint; a λ-adapter over REF, where ALIGNED is an adapter; exact DeRa, with a λ for each
request (0, 0.5, 1 and 2 in turn), held once and as two full models; and the exact mixture in transformers, one padded
batch. All requests at once, greedy, the same number of new tokens, none stops early. Each contestant has a process of
its own; one warm-up, then the median of the rounds. Prints a Markdown table, and for how many requests vLLM's exact
tokens are those of transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dera_merge import ModelPair
from dera_merge.texts import prompts

LAMS = (0.0, 0.5, 1.0, 2.0)


def in_vllm(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    longest = max(map(len, job["prompts"])) + job["new_tokens"]
    settings: dict[str, Any] = {"enable_lora": True, "max_lora_rank": job["rank"]} if job["adapter"] else {}
    llm = LLM(
        job["model"], dtype=job["dtype"], max_num_seqs=job["requests"], max_model_len=longest,
        enable_prefix_caching=False,
        enforce_eager=job["eager"], disable_log_stats=True, **settings,
    )  # fmt: skip
    lora = LoRARequest("lambda", 1, job["adapter"]) if job["adapter"] else None
    common = {"temperature": 0, "max_tokens": job["new_tokens"], "ignore_eos": True}
    params = [
        SamplingParams(**common, extra_args={"lambda": LAMS[n % len(LAMS)]} if job["exact"] else None)
        for n in range(job["requests"])
    ]
    asked = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def run() -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        outputs = llm.generate(asked, params, lora_request=lora, use_tqdm=False)
        return time.perf_counter() - start, [list(output.outputs[0].token_ids) for output in outputs]

    return rounds(run, job["rounds"])


def in_transformers(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    from dera_merge import DeraForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DeraForCausalLM.from_pretrained(job["model"], dtype=job["dtype"], device=device)
    longest = max(map(len, job["prompts"]))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in job["prompts"]], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in job["prompts"]], device=device)
    lams = [LAMS[n % len(LAMS)] for n in range(job["requests"])]

    def run() -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        output = model.generate(
            ids, attention_mask=mask, lam=lams, do_sample=False, max_new_tokens=job["new_tokens"],
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        tokens = output[:, longest:].tolist()
        return time.perf_counter() - start, tokens

    return rounds(run, job["rounds"])


def rounds(run: Any, count: int) -> dict[str, Any]:
    run()
    timed = [run() for _ in range(count)]
    return {"seconds": statistics.median(seconds for seconds, _ in timed), "tokens": timed[-1][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref")
    parser.add_argument("aligned")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="leave torch.compile and CUDA graphs out")
    args = parser.parse_args()

    pair = ModelPair.from_pretrained(args.ref, args.aligned)
    asked = prompts.encode(prompts.default(pair.tokenizer), pair.tokenizer)
    ids = [asked[n % len(asked)].ids for n in range(args.requests)]
    job = {**vars(args), "prompts": ids, "exact": False, "adapter": None, "rank": None}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        jobs = {"one model (REF), vLLM": {"model": str(pair.ref.base.folder)}}
        pair.merge(place / "merged", [0.5], rounding="nearest")
        jobs["merged at λ=0.5, vLLM"] = {"model": str(place / "merged")}
        if pair.export_exact(place / "exact", 0.5)["held_once"]:
            from dera_merge.merging.adapters import serving_rank

            pair.merge(place / "adapter", [0.5], format="adapter")
            rank = serving_rank(place / "adapter")
            adapter = {"model": str(pair.ref.base.folder), "adapter": str(place / "adapter"), "rank": rank}
            jobs["λ-adapter over REF, vLLM"] = adapter
            jobs["exact, base held once, vLLM"] = {"model": str(place / "exact"), "exact": True}
        pair.export_exact(place / "two", 0.5, merge_adapter=True)
        jobs["exact, two full models, vLLM"] = {"model": str(place / "two"), "exact": True}
        jobs["exact, transformers"] = {"model": str(place / "exact")}

        results: dict[str, dict[str, Any]] = {}
        for name, what in jobs.items():
            (place / "job.json").write_text(json.dumps(job | what))
            command = [sys.executable, __file__, "--job", str(place / "job.json"), str(place / "result.json"), name]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                sys.exit(f"{name}: {ended.stderr[-3000:]}")
            results[name] = json.loads((place / "result.json").read_text())
            print(f"{name}: {results[name]['seconds']:.2f} s", file=sys.stderr, flush=True)

    count, one = args.requests * args.new_tokens, results["one model (REF), vLLM"]["seconds"]
    print(f"\n{args.requests} requests of {args.new_tokens} new tokens, {args.dtype}\n")
    print("| | tokens per second | throughput, one model = 1 |\n|---|---|---|")
    for name, result in results.items():
        print(f"| {name} | {count / result['seconds']:.0f} | {one / result['seconds']:.2f} |")
    for name in results:
        if name.startswith("exact") and name != "exact, transformers":
            pairs = zip(results[name]["tokens"], results["exact, transformers"]["tokens"], strict=True)
            same = sum(a == b for a, b in pairs)
            print(f"\n{name}: {same} of {args.requests} requests have transformers' tokens")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if sys.argv[1:2] == ["--job"]:
        job = json.loads(Path(sys.argv[2]).read_text())
        result = (in_transformers if "transformers" in sys.argv[4] else in_vllm)(job)
        Path(sys.argv[3]).write_text(json.dumps(result))
    else:
        main()
