#!/usr/bin/env python3
"""What exact DeRa costs: time per token as a ratio to one model, beside other ways of doing it.

    python scripts/bench_decode.py REF ALIGNED [--dtype float32] [--batch 1,8,32] [--lambda 0.5] [--memory]
    python scripts/bench_decode.py REF ALIGNED --more ALIGNED2          # two adapters on one base
    python scripts/bench_decode.py REF ALIGNED --steps eager,static,compiled --only two,one,dial      # kinds of a step
    python scripts/bench_decode.py REF ALIGNED --ops --only two,one,dial             # and of what a step consists
    python scripts/bench_decode.py --random 7b --device cuda --dtype bfloat16 --batch 1,8

Contestants: one merged model (1.0 by definition); a plain loop over two models with a cache each; a logits processor
that calls the reference model, as the authors' notebook does; CoS (Fu et al., ICML 2025: the two models take turns in
drafting, both verify); PEFT's mixed batch, where PEFT can; transformers' assisted generation with the merged draft; and
ours: two passes, one pass, speculative. All greedy, all with the same number of new tokens, none stops early.
Contestants take turns within a round, and a figure is the median over rounds of the ratio to `one model` in that round.
Prints Markdown tables.

`--steps`: of those that transformers' `generate` runs, a step as it is, with a cache of fixed size, and compiled (on a
CPU, too, which takes minutes). `--ops` counts what one step runs: matrix products, and all kernels.

`--random` makes a pair of that shape with random weights: then acceptance means nothing, and drafts are left out.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import CompileConfig, DynamicCache, LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dera_merge import DeraForCausalLM, ModelPair, Speculation
from dera_merge.decoding.caches import CACHE
from dera_merge.decoding.mix import mix, shares_of
from dera_merge.decoding.speculation import MergedDraft
from dera_merge.texts import prompts

Run = Callable[..., torch.Tensor]  # prompts (batch, tokens) → with new tokens; some take how many
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
STEPS = ("eager", "static", "compiled")
# What moves no data: none of it is a kernel. (`to` is one only where it copies, and then that is seen within it.)
VIEWS = frozenset(
    "view reshape as_strided transpose t expand slice select unsqueeze squeeze split chunk flatten unflatten detach "
    "alias narrow permute _unsafe_view empty empty_like empty_strided resolve_conj resolve_neg result_type item "
    "_local_scalar_dense is_nonzero lift_fresh split_with_sizes numpy_T set_ resize_ view_as unbind to".split()
)
QUIET = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def two_model_loop(ref: PreTrainedModel, aligned: PreTrainedModel, lam: float, new: int) -> Run:
    def run(ids: torch.Tensor) -> torch.Tensor:
        caches = DynamicCache(config=ref.config), DynamicCache(config=aligned.config)
        step = ids
        for _ in range(new):
            logits = [
                model(step, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float()
                for model, cache in zip((ref, aligned), caches, strict=True)
            ]
            step = ((1 - lam) * logits[0] + lam * logits[1]).argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], -1)
        return ids

    return run


class CallsReference(LogitsProcessor):
    """The reference model inside a logits processor, with a cache of its own: one instance a call."""

    def __init__(self, ref: PreTrainedModel, lam: float) -> None:
        self.ref, self.lam, self.cache = ref, lam, DynamicCache(config=ref.config)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        new = input_ids[:, self.cache.get_seq_length() :]
        theirs = self.ref(new, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1].float()
        return (1 - self.lam) * theirs + self.lam * scores


def notebook(ref: PreTrainedModel, aligned: PreTrainedModel, lam: float, new: int) -> Run:
    def run(ids: torch.Tensor) -> torch.Tensor:
        processor = LogitsProcessorList([CallsReference(ref, lam)])
        return aligned.generate(ids, logits_processor=processor, max_new_tokens=new, **QUIET)

    return run


class _Reader:
    """One model of CoS: reads tokens once, remembers its logits for each position."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.logits: dict[int, torch.Tensor] = {}  # position → logits of the token there

    def read(self, ids: torch.Tensor, upto: int) -> None:
        start = self.cache.get_seq_length()
        if start < upto:
            keep = min(upto - start, 32)
            out = self.model(ids[:, start:upto], use_cache=True, logits_to_keep=keep, **{CACHE: self.cache}).logits[0]
            self.logits |= {upto - keep + 1 + i: row.float() for i, row in enumerate(out)}

    def forget(self, length: int) -> None:
        if (have := self.cache.get_seq_length()) > length:
            self.cache.crop(length - have)


def cos(ref: PreTrainedModel, aligned: PreTrainedModel, lam: float, new: int, block: int) -> Run:
    """Collaborative decoding via speculation, greedy: the proposer drafts a block, the verifier reads it in one pass;
    when all of it is kept, the verifier's next token begins its own draft and the two change places."""

    def run(ids: torch.Tensor) -> torch.Tensor:
        readers = [_Reader(ref), _Reader(aligned)]
        weights = {id(readers[0]): 1 - lam, id(readers[1]): lam}
        proposer, verifier = readers[1], readers[0]
        known, end = ids.shape[1], ids.shape[1] + new
        while known < end:
            while ids.shape[1] < known + block:
                proposer.read(ids, ids.shape[1])
                ids = torch.cat([ids, proposer.logits[ids.shape[1]].argmax()[None, None]], 1)
            verifier.read(ids, ids.shape[1])
            rejected = False
            for place in range(known, ids.shape[1]):
                best = sum(weights[id(r)] * r.logits[place] for r in readers).argmax()
                if rejected := bool(best != ids[0, place]):
                    ids = torch.cat([ids[:, :place], best[None, None]], 1)
                    for reader in readers:
                        reader.forget(place)
                    break
            known = ids.shape[1]
            if not rejected:
                ids = torch.cat([ids, verifier.logits[known].argmax()[None, None]], 1)
                proposer, verifier = verifier, proposer
        return ids[:, :end]

    return run


def peft_mixed_batch(ref: PreTrainedModel, adapter: str, lam: float, new: int, dtype: torch.dtype) -> Run:
    """PEFT's `adapter_names`: rows of one batch with and without the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ref.config._name_or_path, dtype=dtype).to(ref.device)
    model = PeftModel.from_pretrained(base, adapter).eval()

    def run(ids: torch.Tensor) -> torch.Tensor:
        names = ["__base__"] * len(ids) + ["default"] * len(ids)
        cache, step = DynamicCache(config=model.config), ids
        for _ in range(new):
            out = model(step.repeat(2, 1), use_cache=True, logits_to_keep=1, adapter_names=names, **{CACHE: cache})
            ref, aligned = out.logits[:, -1].float().chunk(2)
            step = ((1 - lam) * ref + lam * aligned).argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], -1)
        return ids

    return run


class ReadsItself(MergedDraft):
    """A draft whose cache is not made from the pair's: what that brings."""

    def _follow(self, known: int) -> None:
        if have := self.cache.get_seq_length():
            self.cache.crop(min(0, known - have))


def of_step(step: str) -> dict[str, object]:
    """Arguments of `generate` for a kind of step."""
    if step == "eager":
        return {}
    static = {"cache_implementation": "static"}
    config = CompileConfig() if torch.cuda.is_available() else CompileConfig(mode=None)
    config._compile_all_devices = True  # on a CPU too
    return static | ({"compile_config": config} if step == "compiled" else {"disable_compile": True})


def ops_of_step(run: Run, ids: torch.Tensor) -> tuple[int, int]:
    """Matrix products, and all that does work, in one step: what a text longer by a token runs more."""
    counts = []
    for new in (3, 4):
        with torch.profiler.profile() as profile:
            run(ids, new)
        aten = [(event, event.name.removeprefix("aten::")) for event in profile.events() if "aten::" in event.name]
        moving = {id(event) for event, name in aten if name not in VIEWS}
        work = [name for event, name in aten
                if id(event) in moving and moving.isdisjoint(map(id, event.cpu_children))]  # fmt: skip
        counts.append((sum("mm" in name for name in work), len(work)))
    return counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]


def contestants(
    args: argparse.Namespace, pair: ModelPair, batch: int, step: str = "eager"
) -> dict[str, Callable[[], Run]]:
    """Name → makes the contestant: loads what it needs and gives a function."""
    dtype, lam, new = getattr(torch, args.dtype), args.lam, args.tokens
    options = {"dtype": dtype, "device": args.device}

    def exact() -> DeraForCausalLM:
        if "exact" not in loaded:
            loaded["exact"] = pair.exact(lam, **options)
        return loaded["exact"]

    def merged(kind: torch.dtype) -> PreTrainedModel:
        if (key := f"merged, {kind}") not in loaded:
            loaded[key] = pair.merged(lam, device=args.device, compute_dtype=kind)
        return loaded[key]

    def generated(model: PreTrainedModel, copies: int = 1, **more: object) -> Run:
        how = of_step(step)
        return lambda ids, new=new: model.generate(
            ids.repeat(copies, 1), max_new_tokens=new, **QUIET, **how, **more
        )

    def drafted(how: str) -> Run:
        draft = merged(torch.bfloat16)
        if how == "transformers":
            draft.generation_config.num_assistant_tokens = 8
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            return generated(exact(), assistant_model=draft)

        total = totals.setdefault(how, Speculation())

        def run(ids: torch.Tensor) -> torch.Tensor:
            with mock.patch("dera_merge.decoding.exact.MergedDraft", ReadsItself if how == "reading" else MergedDraft):
                return exact().generate(ids, max_new_tokens=new, assistant_model=draft, speculation=total, **QUIET)

        return run

    found: dict[str, Callable[[], Run]] = {
        "one model (merged)": lambda: generated(merged(dtype)),
        "plain two-model loop": lambda: two_model_loop(exact().ref, exact().aligned, lam, new),
        "logits processor (notebook)": lambda: notebook(exact().ref, exact().aligned, lam, new),
        "ours, two passes": lambda: generated(DeraForCausalLM(exact().ref, exact().aligned, lam)),
    }
    if pair.shared_base:
        found["ours, one pass"] = lambda: generated(exact())
        found["two rows through the base alone"] = lambda: generated(exact().ref, 2)
        found["dial, λ for each row"] = lambda: generated(exact().dial())
        if not args.random:
            found["PEFT mixed batch"] = lambda: peft_mixed_batch(exact().ref, args.aligned, lam, new, dtype)
    if args.more:
        several = ModelPair.from_pretrained(args.ref, [args.aligned, args.more])

        def together() -> DeraForCausalLM:
            if "several" not in loaded:
                loaded["several"] = several.exact([lam / 2, lam / 2], **options)
            return loaded["several"]

        apart = [lam / 2, lam / 2]
        found["two aligned models, a pass each"] = lambda: generated(
            DeraForCausalLM(together().ref, together().sides[1:], apart)
        )
        found["two aligned models, one pass"] = lambda: generated(together())
        found["three rows through the base alone"] = lambda: generated(exact().ref, 3)
    if batch == 1 and not args.random:
        for block in (2, 4, 8):
            found[f"CoS, blocks of {block}"] = lambda block=block: cos(exact().ref, exact().aligned, lam, new, block)
        found["assisted generation, merged draft in bfloat16"] = lambda: drafted("transformers")
        found["ours, speculative"] = lambda: drafted("ours")
        found["ours, speculative, a draft that reads"] = lambda: drafted("reading")
    return found


# Those whose step transformers can compile.
GENERATED = (
    "one model (merged)", "ours, two passes", "ours, one pass", "two rows through the base alone",
    "dial, λ for each row",
)  # fmt: skip
totals: dict[str, Speculation] = {}
loaded: dict[str, Any] = {}


def random_pair(shape: str, folder: str) -> tuple[str, str]:
    """A reference with random bfloat16 weights and a LoRA of rank 16 on all its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, dtype=torch.bfloat16)
    ref, aligned = os.path.join(folder, "ref"), os.path.join(folder, "lora")
    if not os.path.exists(aligned):
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(ref)
        tuned = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
        tuned.save_pretrained(aligned)
    return ref, aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", nargs="?")
    parser.add_argument("aligned", nargs="?")
    parser.add_argument("--more", metavar="ADAPTER", help="a second aligned model on the same base")
    parser.add_argument("--random", choices=SHAPES)
    parser.add_argument("--dir", default="bench-pair", help="where a random pair is made")
    parser.add_argument("--lambda", dest="lam", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=4, help="at batch 1; a larger batch is one call")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="contestants whose names have one of these parts, separated by commas"
    )
    parser.add_argument("--steps", default="eager", help=f"kinds of a step, separated by commas: {', '.join(STEPS)}")
    parser.add_argument("--ops", action="store_true", help="count what one step runs")
    parser.add_argument("--memory", action="store_true", help="peak memory of each contestant in a process of its own")
    parser.add_argument(
        "--drafts", action="store_true", help="time a token of quantised drafts too (float32 and CPU only)"
    )
    parser.add_argument("--one-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.random:
        args.ref, args.aligned = random_pair(args.random, args.dir)
    torch._dynamo.config.recompile_limit = 64  # all contestants go through one function of torch's
    torch.set_grad_enabled(False)
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pair = ModelPair.from_pretrained(args.ref, args.aligned)

    def wanted(name: str) -> bool:
        return not args.only or "one model" in name or any(part in name for part in args.only.split(","))

    if args.one_process:
        run = contestants(args, pair, 1)[args.one_process]()
        run(inputs(args, pair, 1)[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(int(torch.cuda.max_memory_allocated() / 2**20 if args.device != "cpu" else peak))
        return
    memory: dict[str, str] = {}
    if args.memory:
        for name in filter(wanted, contestants(args, pair, 1)):
            command = [sys.executable, *sys.argv, "--one-process", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory[name] = f"{done.stdout.split()[-1]} MB"
    for batch in map(int, args.batch.split(",")):
        runs = {name: make() for name, make in contestants(args, pair, batch).items() if wanted(name)}
        for step in args.steps.split(","):
            if step != "eager":
                runs |= {f"{name}, {step}": make() for name, make in contestants(args, pair, batch, step).items()
                         if wanted(name) and name in GENERATED}  # fmt: skip
        texts = inputs(args, pair, batch)
        if args.ops:
            print(f"\n| batch {batch}, one step | matrix products | kernels |\n|---|---|---|")
            for name in filter(GENERATED.__contains__, runs):
                print(f"| {name} | {' | '.join(map(str, ops_of_step(runs[name], texts[0])))} |", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        outputs: dict[str, torch.Tensor] = {}
        for number in range(args.rounds + 1):  # the first is for warming up
            for name, run in runs.items():
                start = time.perf_counter()
                done = [run(ids) for ids in texts]
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if number:
                    seconds[name].append((time.perf_counter() - start) / len(texts) / args.tokens)
                outputs[name] = torch.cat([text[:, -args.tokens :].flatten() for text in done])
        print(
            f"\n| batch {batch}, {args.dtype} | ms per token | ratio to one model "
            "| tokens as the plain loop's | memory |"
        )
        print("|---|---|---|---|---|")
        base = next(iter(seconds))
        for name, times in seconds.items():
            ratio = statistics.median(t / one for t, one in zip(times, seconds[base], strict=True))
            plain = outputs.get("plain two-model loop")
            same = "–"
            if plain is not None and outputs[name].shape == plain.shape and name not in (base, "dial, λ for each row"):
                same = f"{(outputs[name] == plain).float().mean().item():.1%}"
            where = memory.get(name, "–") if batch == 1 else "–"
            took = 1000 * statistics.median(times)
            print(f"| {name} | {took:.1f} | {ratio:.2f} | {same} | {where} |", flush=True)
        for how, total in totals.items():
            if batch == 1 and total.drafted:
                gain = f"{total.tokens_per_verification:.1f} tokens a verification"
                print(f"\nSpeculative ({how}): {total.acceptance_rate:.1%} of drafted tokens kept, {gain}.", flush=True)
    if args.drafts:
        print(f"\n{draft_kinds(args, pair)}")
    print(f"\n{mixing_overhead(args, pair)}")
    print(prefill(args, pair))


def inputs(args: argparse.Namespace, pair: ModelPair, batch: int) -> list[torch.Tensor]:
    """Prompts: at batch 1 several, one a call; else one call with `batch` rows cut to the shortest."""
    if args.random:
        return [torch.randint(5, 500, (batch, 32), generator=torch.Generator().manual_seed(0)).to(args.device)]
    encoded = [prompt.ids for prompt in prompts.encode(prompts.built_in(), pair.tokenizer)]
    if batch == 1:
        return [torch.tensor([ids], device=args.device) for ids in encoded[: args.prompts]]
    width = min(map(len, encoded))
    return [torch.tensor([ids[-width:] for ids in (encoded * batch)[:batch]], device=args.device)]


def mixing_overhead(args: argparse.Namespace, pair: ModelPair) -> str:
    """The mixture alone: two rows of logits read, one written, in float32."""
    size = pair.ref.config["vocab_size"]
    ref, aligned = torch.randn(2, 1, 1, size, dtype=getattr(torch, args.dtype), device=args.device)
    lam = torch.tensor([args.lam], device=args.device)
    for count in (20, 200):
        start = time.perf_counter()
        for _ in range(count):
            mix([ref, aligned], shares_of(lam))
        if args.device != "cpu":
            torch.cuda.synchronize()
        took = (time.perf_counter() - start) / count
    return f"Mixing two rows of {size} logits in float32: {1e6 * took:.0f} µs a token."


def draft_kinds(args: argparse.Namespace, pair: ModelPair) -> str:
    """Milliseconds for one token after a prompt of 32, of the reference as different kinds of draft."""
    import warnings

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    warnings.simplefilter("ignore")
    folder = pair.ref.base.folder

    def load(dtype: torch.dtype, **more: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)

    def int8_weight_only() -> PreTrainedModel:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = load(torch.bfloat16)
        quantize_(model, Int8WeightOnlyConfig())
        return model

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    kinds: dict[str, Callable[[], torch.nn.Module]] = {
        "float32": lambda: load(torch.float32),
        "bfloat16": lambda: load(torch.bfloat16),
        "int8 (torch, dynamic)": lambda: torch.ao.quantization.quantize_dynamic(load(torch.float32), {torch.nn.Linear}),
        "int8 (torchao, weight only)": int8_weight_only,
        "nf4 (bitsandbytes)": lambda: load(torch.bfloat16, quantization_config=nf4, device_map={"": "cpu"}),
    }
    found = []
    for name, make in kinds.items():
        try:
            model = make()
        except ImportError as error:
            found.append(f"{name}: not installed ({error.name})")
            continue
        cache = DynamicCache(config=model.config)
        model(torch.arange(5, 37)[None], use_cache=True, logits_to_keep=1, **{CACHE: cache})
        times = []
        for _ in range(12):
            start = time.perf_counter()
            model(torch.tensor([[7]]), use_cache=True, **{CACHE: cache})
            times.append(time.perf_counter() - start)
        found.append(f"{name}: {1000 * statistics.median(times):.0f} ms")
    return f"A token of a draft: {'; '.join(found)}."


def prefill(args: argparse.Namespace, pair: ModelPair) -> str:
    """Reading a prompt of 256 tokens: exact against the reference alone, in turns."""
    exact = pair.exact(args.lam, dtype=getattr(torch, args.dtype), device=args.device)
    ids = torch.randint(5, 500, (1, 256), generator=torch.Generator().manual_seed(0)).to(args.device)
    ratios = []
    for _ in range(args.rounds + 2):
        took = []
        for model in (exact.ref, exact):
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            if args.device != "cpu":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        ratios.append(took[1] / took[0])
    return f"Prefill of 256 tokens: {statistics.median(ratios):.2f} times one model's."


if __name__ == "__main__":
    main()
