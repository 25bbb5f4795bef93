#!/usr/bin/env python3
"""How much accuracy does a token buy? Accuracy and tokens against λ: exact DeRa, merged, bent, and models trained at λ.

    python scripts/study_effort.py deepscaler -o DIR               # public models, from the Hub by name
    python scripts/study_effort.py qwen3 -o DIR
    python scripts/study_effort.py REF ALIGNED [--prompts FILE --reward answer:number] -o DIR
    python scripts/study_effort.py deepscaler --estimate           # what it takes, without loading anything

`deepscaler` asks whether a decoding-time mixture of DeepSeek-R1-Distill-Qwen-1.5B and DeepScaleR-1.5B-Preview answers
in fewer tokens at the accuracy of the latter, beside models that were trained to be that mixture at λ = 0.5, 1.5, 2, 5
and 10 (Zhu et al., Flexible Realignment of Language Models, arXiv 2506.12704). `qwen3` goes from Qwen3-4B-Instruct-2507
to Qwen3-4B-Thinking-2507. A pair of one's own is asked, without --prompts, how many of what everyone knows (legs of a
spider), with an explanation.

Every λ is sampled by itself (texts of thousands of tokens say nothing of other λ), under common noise, at temperature 1
without any warper. DIR keeps all texts; the same command goes on with what is there. It ends with DIR/effort.md,
effort.json and, with matplotlib, effort.png.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dera_merge import DeraError, ModelPair, calibrate, sweep
from dera_merge.files.atomic import json_bytes, write_atomically
from dera_merge.lambdas import name, parse_lambdas
from dera_merge.pages.frame import figure_of, have_matplotlib, read
from dera_merge.pages.sweep import sentences
from dera_merge.texts.prompts import read as read_prompts

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
BENT_TO = 2.0  # the largest λ that a path is learned for
BATCH = 32  # texts that are decoded together


@dataclass(frozen=True)
class Shape:
    """What of a model's shape decides what it takes.

    Attributes:
        parameters: how many.
        cached: numbers that the cache holds for a token: layers · 2 · key-value heads · their size.
    """

    parameters: int
    cached: int


@dataclass(frozen=True)
class Study:
    """A pair, and what it is asked.

    Attributes:
        trained: λ → a model that was trained to be the mixture at that λ.
        prompts: a data set whose rows have a `problem` and an `answer`.
    """

    ref: str
    aligned: str
    shape: Shape
    trained: dict[float, str] = field(default_factory=dict)
    prompts: str = "HuggingFaceH4/MATH-500:test"
    lams: str = "0,0.5,1,1.5,2"
    tokens: int = 8192


STUDIES = {
    "deepscaler": Study(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "agentica-org/DeepScaleR-1.5B-Preview",
        Shape(1_777_088_000, 28 * 2 * 2 * 128),
        {0.5: "wh-zhu/DeepSeek-R1-TrRa-1.5B_lambda_0.5", 1.5: "wh-zhu/DeepSeek-R1-TrRa-1.5B_lambda_1.5",
         2.0: "wh-zhu/DeepSeek-R1-TrRa-1.5B-lambda_2", 5.0: "wh-zhu/DeepSeek-R1-TrRa-1.5B-lambda_5",
         10.0: "wh-zhu/DeepSeek-R1-TrRa-1.5B-lambda_10"},
        lams="0,0.5,1,1.5,2,5,10",
    ),
    "qwen3": Study(
        "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507", Shape(4_022_468_096, 36 * 2 * 8 * 128),
        lams="0:1.25:0.25",
    ),
}  # fmt: skip


FACTS = {
    "days are in a week": 7, "months are in a year": 12, "hours are in a day": 24, "minutes are in an hour": 60,
    "seconds are in a minute": 60, "legs does a dog have": 4, "legs does a spider have": 8, "legs does a bird have": 2,
    "wheels does a bicycle have": 2, "wheels does a car have": 4, "sides does a triangle have": 3,
    "sides does a square have": 4, "letters are in the English alphabet": 26, "eyes does a person have": 2,
    "fingers are on one hand": 5, "seasons are in a year": 4, "planets go around the Sun": 8, "weeks are in a year": 52,
    "colours are in a rainbow": 7, "strings does a violin have": 4, "cents are in a dollar": 100,
    "continents are there": 7, "eggs are in a dozen": 12, "degrees are in a right angle": 90,
}  # fmt: skip
ASKED = ("How many {}? Explain your answer in a few sentences, and end with the number.",
         "A child asks: how many {}? Answer in a few sentences, and end with the number.")  # fmt: skip
LEARNED = "How many {}? Give reasons."  # what a path is learned from is asked otherwise


def quantities(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What everyone knows, so that small models do too at times, with the answers; another seed, another order."""
    rows = [{"question": ask.format(what), "answer": answer} for ask in ASKED for what, answer in FACTS.items()]
    random.Random(seed).shuffle(rows)
    return rows[:count]


def takes(shape: Shape, texts: int, lams: int, tokens: int, trained: int, bent: int, bandwidth: float) -> str:
    """What a study takes, in words; hours are what reading weights and caches alone takes, at two bytes a number."""
    weights, cache = 2 * shape.parameters, 2 * shape.cached
    forms = [("exact DeRa", 2, lams), ("merged", 1, lams), ("bent", 1, bent), ("trained", 1, trained)]
    lines = [
        f"Downloads: {(2 + trained) * weights / 1e9:.0f} GB.",
        f"Memory of the device: {(2 * weights + 2 * BATCH * tokens * cache) / 1e9:.0f} GB at most in 16 bits (two "
        f"models, and the caches of {BATCH} texts of {tokens:,} tokens in each); twice that in float32.",
    ]  # fmt: skip
    for title, models, points in (form for form in forms if form[2]):
        batches = -(-texts * points // BATCH)
        traffic = batches * tokens * models * (weights + BATCH * cache * tokens / 2)
        lines.append(f"{title}: {texts * points:,} texts, {texts * points * tokens / 1e6:.1f} M tokens at most, "
                     f"{traffic / bandwidth / 3600e9:.1f} hours or more.")  # fmt: skip
    return "\n".join([*lines, (
        "An estimate from shapes: every text as long as it may be, and hours for reading weights and caches at "
        f"{bandwidth:,.0f} GB/s alone. transformers' generate takes several times as long where a model is small; "
        "--engine samples exact DeRa by vLLM. Texts that end sooner make all of it less."
    )])  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", nargs="+", help=f"{' or '.join(STUDIES)}; or REF ALIGNED")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--prompts", help="file or data set; default: MATH-500, or how many of what, for your own pair")
    parser.add_argument("--reward", help="default: answer:boxed, or answer:number for your own pair")
    parser.add_argument("--lambdas")
    parser.add_argument("--tokens", type=int, help="length of a text at most")
    parser.add_argument("--limit", type=int, default=500, help="prompts at most (500)")
    parser.add_argument("--samples", type=int, default=1, help="texts for each prompt at each λ (1)")
    parser.add_argument("--keep", type=float, default=0.98, help="share of λ=1's accuracy to keep (0.98)")
    parser.add_argument("--no-bent", action="store_true", help="learn no path")
    parser.add_argument("--path-texts", type=int, default=256, help="texts that the path is learned from (256)")
    parser.add_argument("--trained", action="append", default=[], metavar="λ=MODEL", help="trained at λ; repeatable")
    parser.add_argument("--engine", help="sample exact DeRa by vLLM, as sweep does")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--estimate", action="store_true", help="say what it takes, and stop")
    parser.add_argument("--bandwidth", type=float, default=3350, help="of the device's memory, GB/s (3350, an H100)")
    args = parser.parse_args(words)
    if len(args.pair) != (1 if args.pair[0] in STUDIES else 2):
        parser.error(f"give {' or '.join(STUDIES)}, or REF and ALIGNED")
    if not args.estimate and args.output is None:
        parser.error("give -o DIR")
    try:
        study(args)
    except DeraError as error:
        sys.exit(f"error: {error}")


def study(args: argparse.Namespace) -> None:
    known = STUDIES.get(args.pair[0])
    ref, aligned = (known.ref, known.aligned) if known else args.pair
    lams = parse_lambdas([args.lambdas or (known.lams if known else "0,0.5,1,1.5,2")])
    tokens = args.tokens or (known.tokens if known else 256)
    trained = dict(known.trained) if known else {}
    trained |= {float(at): model for at, _, model in (entry.partition("=") for entry in args.trained)}
    near = [] if args.no_bent else [lam for lam in lams if 0 <= lam <= BENT_TO]
    if args.estimate:
        shape = known.shape if known else shape_of(ModelPair.from_pretrained(ref, aligned))
        texts = args.limit * args.samples
        return print(takes(shape, texts, len(lams), tokens, len(trained), len(near), args.bandwidth))
    rows, reward = asked(args, known), args.reward or ("answer:boxed" if known else "answer:number")
    out: Path = args.output
    settle(out, {"ref": ref, "aligned": aligned, "lambdas": [name(lam) for lam in lams], "tokens": tokens,
                 "prompts": rows, "reward": reward, "samples": args.samples, "keep": args.keep})  # fmt: skip
    common = {"max_new_tokens": tokens, "samples": args.samples, "device": args.device, "merged": False, "check": False,
              "reweight": False, "compute_dtype": args.compute_dtype, "budget": 1}  # fmt: skip

    def measured(form: str, models: tuple[str, str], lams: list[float], **how: Any) -> dict[str, Any]:
        """A sweep of its own in DIR/form; one that is finished is read."""
        finished = out / form / "sweep.json"
        if not finished.is_file():
            print(f"{form}: λ = {', '.join(map(name, lams))}", file=sys.stderr)
            keep = args.keep if 1.0 in lams and len(lams) > 1 else None
            pair = ModelPair.from_pretrained(*models)
            sweep(pair, rows, [reward], lams, keep=keep, out=out / form, resume=True, **common | how).save(out / form)
        return read(json.loads(finished.read_text(encoding="utf-8")))

    found = {"exact": measured("exact", (ref, aligned), lams, engine=args.engine)}
    found["merged"] = measured("merged", (ref, aligned), lams, mode="merged")
    if set(near) - {0.0, 1.0}:  # at the ends every path is exact
        path = out / "path.safetensors"
        if not path.is_file():
            print("bent: learning a path", file=sys.stderr)
            others = None  # the reference writes some
            if not (known or args.prompts):
                others = [{"question": LEARNED.format(what)} for what in FACTS]
            calibrate(ModelPair.from_pretrained(ref, aligned), [0.0, max(near)], others, texts=args.path_texts,
                      max_new_tokens=min(tokens, 256), device=args.device, out=path, resume=True)  # fmt: skip
        found["bent"] = measured("bent", (ref, aligned), near, mode="merged", path=path)
    for lam, model in sorted(trained.items()):
        found[f"trained at {name(lam)}"] = measured(f"trained-{name(lam)}", (ref, model), [1.0], mode="merged")
    write(out, found, trained)


def asked(args: argparse.Namespace, known: Study | None) -> list[dict[str, Any]]:
    """The prompts with their answers."""
    if known is None and args.prompts is None:
        return quantities(args.limit)
    rows = read_prompts(args.prompts or known.prompts, args.limit)
    if args.prompts:
        return rows
    return [
        {"messages": [{"role": "user", "content": row["problem"] + BOXED}], "answer": row["answer"]} for row in rows
    ]


def shape_of(pair: ModelPair) -> Shape:
    """The shape of a pair, from its headers and config."""
    config = json.loads((pair.ref.source.folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    cached = config["num_hidden_layers"] * 2 * (config.get("num_key_value_heads") or heads) * size
    return Shape(sum(tensor.numel for tensor in pair.tensors.values()), cached)


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Note what is studied in DIR. Raises DeraError where another study lies there."""
    file, content = out / "study.json", json_bytes(settings)
    if file.is_file() and file.read_bytes() != content:
        raise DeraError(f"{out} holds another study, with other settings or prompts; give another -o")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content)


def write(out: Path, found: dict[str, dict[str, Any]], trained: dict[float, str]) -> None:
    """The table, the sentences and the plot of all forms."""
    rows = [
        {"form": form.partition(" at ")[0], "lambda": float(form.partition(" at ")[2] or row["lambda"])}
        | {ours: row[theirs] for ours, theirs in (
            ("accuracy", "reward"), ("accuracy_ci", "reward_ci"), ("tokens", "length"), ("tokens_ci", "length_ci"),
            ("cut", "cut"), ("kl_token", "kl_token"))}
        for form, sweep in found.items() for row in sweep["curve"]
    ]  # fmt: skip
    said = [f"- {form}: {sentence}" for form in found if "target" in found[form]["best"]
            for sentence in sentences(found[form])]  # fmt: skip
    lines = ["| | λ | accuracy | tokens | cut off | KL from the reference, nats a token |", "|---" * 6 + "|"]
    for row in rows:
        accuracy, tokens = (f"{row[key]:{form}} ({row[key + '_ci'][0]:{form}} to {row[key + '_ci'][1]:{form}})"
                            for key, form in (("accuracy", ".3f"), ("tokens", ".0f")))  # fmt: skip
        cells = [row["form"], name(row["lambda"]), accuracy, tokens, f"{row['cut']:.0%}", f"{row['kl_token']:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(["# Accuracy and tokens against λ", "", *lines, "", *said, ""])
    content = {"rows": rows, "trained": {name(at): model for at, model in trained.items()}}
    write_atomically(out / "effort.json", json_bytes(content))
    write_atomically(out / "effort.md", text.encode())
    if have_matplotlib():
        figure_of([lambda axis: draw(axis, rows)], (6, 4.5)).savefig(out / "effort.png", dpi=140)
    print(text)


def draw(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Accuracy against tokens, λ along each curve."""
    for number, form in enumerate(dict.fromkeys(row["form"] for row in rows)):
        of_form = [row for row in rows if row["form"] == form]
        at = [row["tokens"] for row in of_form], [row["accuracy"] for row in of_form]
        axis.plot(*at, "*" if form == "trained" else "o-", color=f"C{number}", label=form, linewidth=1, markersize=5)
        for row in of_form:
            axis.annotate(f" {name(row['lambda'])}", (row["tokens"], row["accuracy"]), fontsize=7, color=f"C{number}")
    axis.set(xlabel="tokens a text", ylabel="accuracy", title="What a token buys, by λ")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
