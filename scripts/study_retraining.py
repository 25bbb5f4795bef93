#!/usr/bin/env python3
"""Does decoding at λ stand for retraining at β/λ? Train at several β, and compare with what one training gives at λ.

    python scripts/study_retraining.py demo -o out/retraining                # trains on the demo pair's reference
    python scripts/study_retraining.py demo -o out/retraining --preset small # a few minutes
    python scripts/study_retraining.py theory                                # small cases, by enumeration: seconds
    python scripts/study_retraining.py pair REF ALIGNED --beta 0.1 --retrained 0.4=DIR --retrained 0.025=DIR \\
        --second DIR --prompts FILE --reward SPEC -o out/retraining          # models that you have trained

`demo` trains LoRA adapters at β₀/4 … 4β₀ and a second seed at β₀, by DPO and IPO (preferences by
`dera_merge.demo.reward`), by REBEL (regression on differences of that reward) and by a KL-regularised policy gradient
whose reward is an answer's length (near 24 tokens is best), each on the same prompts in the same order. What was
trained or measured is not done
again: a broken run goes on. Writes agreement.json, agreement.md and agreement.png into DIR; λ = β₀/β throughout.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import dpo
import torch
import train_demo_pair as grammar
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dera_merge import Curve, ModelPair, calibrate, demo, load_reward, sweep
from dera_merge.lambdas import Vector
from dera_merge.measuring.retraining import agreement, optimum, per_token, regret
from dera_merge.pages.frame import have_matplotlib, number
from dera_merge.texts.prompts import read
from dera_merge.texts.rewards import Reward

ANSWER = 64  # tokens
WANTED = 24  # tokens, of the length reward
BETAS = {"dpo": 0.1, "ipo": 0.1, "rebel": 1.0, "length": 0.05}  # β₀
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # β/β₀
PRESETS = {
    "full": {"dpo_steps": 120, "pg_steps": 80, "asked": 512, "samples": 2, "texts": 192},
    "long": {"dpo_steps": 360, "pg_steps": 240, "asked": 512, "samples": 2, "texts": 192},  # do the steps suffice?
    "small": {"dpo_steps": 40, "pg_steps": 20, "asked": 128, "samples": 1, "texts": 48},
    "tiny": {"dpo_steps": 4, "pg_steps": 2, "asked": 16, "samples": 1, "texts": 16},  # for the test
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.REF)


def length_reward(text: str) -> float:
    """0 for an answer of `WANTED` tokens; each eight tokens off count squared."""
    return -(((len(tokenizer()(text)["input_ids"]) - WANTED) / 8) ** 2)


REWARDS = {"dpo": demo.reward, "ipo": demo.reward, "rebel": demo.reward, "length": length_reward}


def fresh(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))


def policy_gradient(
    model: PeftModel, asked: Sequence[dpo.Conversation], reward: Callable[[str], float], *, beta: float, steps: int,
    seed: int, prompts: int = 8, answers: int = 8, lr: float = 1e-3,
) -> None:  # fmt: skip
    """Maximise E[r] - β·KL(π‖π_ref) by REINFORCE with the mean of the other answers as baseline (Ahmadian et al.,
    2024).
    """
    rng = random.Random(seed)
    descend = dpo.descent(model, lr, steps)
    model.eval()
    for step in range(steps):
        conversations = rng.sample(list(asked), prompts)
        ids = [dpo.prompt_ids(tokenizer(), c) for c in conversations for _ in range(answers)]
        texts = dpo.sample(model, tokenizer(), conversations, answers=answers, max_new_tokens=ANSWER, quiet=True)
        new = [ids for each in texts for ids in each]
        logp = dpo.completion_logprobs(model, ids, new)
        with torch.no_grad(), model.disable_adapter():
            ref = dpo.completion_logprobs(model, ids, new)
        earned = torch.tensor([reward(tokenizer().decode(row, skip_special_tokens=True)) for row in new])
        value = (earned - beta * (logp.detach() - ref)).view(prompts, answers)
        advantage = (value - (value.sum(1, keepdim=True) - value) / (answers - 1)).flatten()
        descend(-(advantage * logp).mean())
        if (step + 1) % 20 == 0:
            moved = f"log ratio {(logp - ref).mean():.1f} nats"
            print(f"  step {step + 1}/{steps}: mean reward {earned.mean():.2f}, {moved}", flush=True)


class Trainings:
    """Models trained at several β on the same prompts in the same order, each once."""

    def __init__(self, objective: str, home: Path, settings: dict[str, int]) -> None:
        self.objective, self.home, self.settings = objective, home, settings
        self.seconds: dict[str, float] = {}

    @cached_property
    def asked(self) -> list[dpo.Conversation]:
        rng = random.Random(0)
        seen, _ = grammar.split_names(rng)
        return grammar.questions(seen, self.settings["asked"], rng)

    @cached_property
    def preferences(self) -> list[dpo.Preference]:
        torch.manual_seed(0)
        reference = AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float32)
        answers = dpo.sample(reference, tokenizer(), self.asked, answers=8, max_new_tokens=ANSWER)
        pairs = dpo.neighbours if self.objective == "rebel" else dpo.best_against_worst
        return pairs(tokenizer(), self.asked, answers, demo.reward)

    def folder(self, name: str, factor: float, seed: int = 0) -> Path:
        """Where the model trained at β = factor·β₀ lies, once it is trained."""
        folder = self.home / name
        if not (folder / "seconds.json").is_file():
            print(f"{self.objective}: β = {factor:g}·β₀, seed {seed}", flush=True)
            preferences = [] if self.objective == "length" else self.preferences
            began, model, beta = time.monotonic(), fresh(seed), factor * BETAS[self.objective]
            if self.objective == "length":
                policy_gradient(model, self.asked, length_reward, beta=beta, steps=self.settings["pg_steps"], seed=seed)
            else:
                how = {"steps": self.settings["dpo_steps"], "batch_size": 16, "objective": self.objective}
                dpo.train(model, preferences, lr=1e-3, beta=beta, seed=seed, **how)
            dpo.save_adapter(model, folder, base=str(demo.REF))
            (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))
        self.seconds[name] = json.loads((folder / "seconds.json").read_text())
        return folder

    def model(self, factor: float) -> Any:
        return load(demo.REF, self.folder(f"{factor:g}", factor))


def load(ref: str | Path, folder: str | Path) -> Any:
    """A trained model, adapters merged in float32."""
    return ModelPair.from_pretrained(ref, folder).merged(1.0)


def kept(file: Path, work: Callable[[], Any]) -> Any:
    """What `work` gives, or gave in an earlier run."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(work(), ensure_ascii=False))
    return json.loads(file.read_text())


def study(objective: str, out: Path, settings: dict[str, int]) -> dict[str, Any]:
    """Everything about one objective on the demo's reference."""
    home, reward = out / objective, REWARDS[objective]
    trained = Trainings(objective, home, settings)
    for factor in FACTORS:
        trained.folder(f"{factor:g}", factor)
    second = trained.folder("second", 1.0, seed=1)
    seconds = dict(trained.seconds)
    test, validation = demo.prompts(), demo.prompts("validation")
    pair = ModelPair.from_pretrained(demo.REF, home / "1")
    common: dict[str, Any] = {"samples": settings["samples"], "max_new_tokens": ANSWER}

    def compared() -> Any:
        if not (file := home / "path.safetensors").is_file():
            calibrate(pair, [0.0, 4.0], validation, texts=settings["texts"]).save(file)
        models = {1 / factor: trained.model(factor) for factor in FACTORS}
        return agreement(pair, models, test, reward, second=load(demo.REF, second), path=Curve.load(file), **common)

    def pulled_back() -> Any:
        """The training at the smallest β is the start, and λ < 1 takes it back."""
        over = ModelPair.from_pretrained(demo.REF, home / f"{FACTORS[0]:g}")
        models = {FACTORS[0] / factor: trained.model(factor) for factor in FACTORS[1:]}
        return agreement(over, models, test, reward, **common)

    def chosen() -> dict[str, Any]:
        """λ by sweep, β by having trained all of them; then a training at β₀/λ to see."""
        began, span = time.monotonic(), [1 / FACTORS[-1], 1 / FACTORS[0]]
        scorer = Reward(objective, lambda texts: [reward(text) for _, text in texts])
        swept = sweep(pair, validation, [scorer], span, merged=False, check=False, **common)
        lam, took = swept.best["lambda"], time.monotonic() - began
        seen = agreement(pair, {1 / factor: trained.model(factor) for factor in FACTORS}, validation, reward, **common)
        best = max(seen, key=lambda row: row["kinds"]["retrained"]["reward"])["lambda"]
        models = {lam: load(demo.REF, trained.folder("confirmed", 1 / lam)), best: trained.model(1 / best)}
        rows = {row["lambda"]: row["kinds"] for row in agreement(pair, models, test, reward, **common)}
        lost, between = regret(rows[best]["retrained"], rows[lam]["exact"])
        return {
            "lambda": lam, "best": best, "sweep_seconds": took, "regret": lost, "regret_ci": between,
            "exact": rows[lam]["exact"]["reward"], "confirmed": rows[lam]["retrained"]["reward"],
        }  # fmt: skip

    return {
        "objective": objective, "beta": BETAS[objective], "seconds": seconds,
        "rows": kept(home / "agreement.json", compared), "pulled_back": kept(home / "pulled_back.json", pulled_back),
        "chosen": kept(home / "chosen.json", chosen),
    }  # fmt: skip


# -- Shown ------------------------------------------------------------------------------------------------------------


def interval(figures: dict[str, Any], key: str) -> str:
    bounds = figures.get(f"{key}_ci")
    text = number(figures[key])
    return text if bounds is None else f"{text} ({number(bounds[0])} to {number(bounds[1])})"


def tables(result: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    rows = result["rows"]
    names = [name for name in (*STYLE, "second") if any(name in row["kinds"] for row in rows)]
    lines = [f"**{result['objective']}**, β₀ = {result['beta']:g}\n"]
    for key, what in (("reward", "Reward"), ("length", "Length, tokens"), ("kl", "KL from the reference, nats a text")):
        lines += [f"{what}:\n", f"| λ | β/β₀ | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
        for row in rows:
            cells = [interval(row["kinds"][name], key) if name in row["kinds"] else "–" for name in names]
            lines.append(f"| {row['lambda']:g} | {1 / row['lambda']:g} | {' | '.join(cells)} |")
        lines.append("")
    apart = [name for name in ("exact", "merged", "calibrated", "aligned", "ref", "second")
             if any(name in row["from_retrained"] for row in rows)]  # fmt: skip
    lines += ["KL from the retrained model, nats per token:\n", f"| λ | {' | '.join(apart)} |"]
    lines.append(f"|---|{'---|' * len(apart)}")
    for row in rows:
        found = row["from_retrained"]
        cells = [interval(found[name], "kl") if name in found else "–" for name in apart]
        lines.append(f"| {row['lambda']:g} | {' | '.join(cells)} |")
    scale = next((row["from_retrained"]["second"]["kl"] for row in rows if "second" in row["from_retrained"]), None)
    if scale is not None:
        # Distances shrink with λ, where the reference itself may be as near as a second seed at β₀: so relative ones.
        share = {
            row["lambda"]: row["from_retrained"]["exact"]["kl"] / row["from_retrained"]["ref"]["kl"] for row in rows
        }
        said = ", ".join(f"{part:.0%} at λ = {lam:g}" for lam, part in share.items() if lam != 1)
        two = scale / next(row["from_retrained"]["ref"]["kl"] for row in rows if row["lambda"] == 1)
        lines += [
            "", f"Two trainings at β₀ are {number(scale)} nats per token apart, {two:.0%} of the distance of the "
            "reference; "
            f"exact DeRa's share of it: {said}.",
        ]  # fmt: skip
    if chosen := result.get("chosen"):
        spent, count = sum(result["seconds"].values()) / 60, len(result["seconds"])
        lines += [
            "", f"Chosen: sweep recommends λ = {chosen['lambda']:g}; of the retrained, λ = {chosen['best']:g} earns "
            f"most on the validation prompts. Regret on the test prompts {interval(chosen, 'regret')}. Exact DeRa "
            f"at that λ earns {number(chosen['exact'])}, a training at β₀/λ {number(chosen['confirmed'])}.",
            f"Cost: {spent:.1f} min for {count} trainings, {chosen['sweep_seconds'] / 60:.1f} min for the sweep.",
        ]  # fmt: skip
    if back := result.get("pulled_back"):
        head = ("λ", "β/β₀", "reward, retrained", "reward, exact", "KL from the retrained, nats per token")
        lines += ["", "From the training at β₀/4, taken back:\n", f"| {' | '.join(head)} |", "|---|---|---|---|---|"]
        for row in back:
            cells = [interval(row["kinds"][name], "reward") for name in ("retrained", "exact")]
            cells.append(interval(row["from_retrained"]["exact"], "kl"))
            lines.append(f"| {row['lambda']:g} | {FACTORS[0] / row['lambda']:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


STYLE = {"retrained": ("k", "o"), "exact": ("C0", "s"), "merged": ("C1", "^"), "calibrated": ("C2", "v")}


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Reward and KL against λ, the frontier, and distances; a row for each objective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.4 * len(results)), layout="constrained")
    for axes, result in zip(figure.subplots(len(results), 4, squeeze=False), results, strict=True):
        rows, lams = result["rows"], [row["lambda"] for row in result["rows"]]
        for name, (colour, mark) in STYLE.items():
            own = [row["kinds"][name] for row in rows if name in row["kinds"]]
            if len(own) < len(rows):
                continue
            style = {"color": colour, "marker": mark, "label": name, "linewidth": 1.2, "markersize": 5}
            for axis, key in zip(axes, ("reward", "kl"), strict=False):
                axis.plot(lams, [each[key] for each in own], **style)
                if name in ("retrained", "exact") and all(each[f"{key}_ci"] for each in own):
                    band = zip(*(each[f"{key}_ci"] for each in own), strict=True)
                    axis.fill_between(lams, *band, color=colour, alpha=0.15)
            axes[2].plot([each["kl"] for each in own], [each["reward"] for each in own], **style)
        for name, colour in (("exact", "C0"), ("merged", "C1"), ("calibrated", "C2"), ("aligned", "C4"), ("ref", "C7")):
            near = [(row["lambda"], row["from_retrained"][name]["kl"]) for row in rows if name in row["from_retrained"]]
            near = [(lam, kl) for lam, kl in near if lam != 1 or name == "ref"]  # at 1 they are the model itself
            if near:
                axes[3].plot(
                    *zip(*near, strict=True), color=colour, marker="o", label=name, linewidth=1.2, markersize=4
                )
        for row in rows:
            if "second" in row["from_retrained"]:
                two = row["from_retrained"]["second"]["kl"]
                axes[3].axhline(two, color="k", linestyle="--", linewidth=1, label="two trainings at β₀")
        titles = ("reward", "KL from the reference", "frontier", "KL from the retrained model")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(f"{result['objective']}: {title}", fontsize=10)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=7)
        for axis in (axes[0], axes[1], axes[3]):
            axis.set_xscale("log")
            axis.set_xticks(lams, [f"{lam:g}" for lam in lams])
            axis.minorticks_off()
            axis.set_xlabel("λ = β₀/β")
        axes[1].set_yscale("log")
        axes[2].set_xscale("log")
        axes[3].set_yscale("log")
        axes[1].set_ylabel("nats a text")
        axes[3].set_ylabel("nats per token")
        axes[2].set(xlabel="KL from the reference, nats a text", ylabel="reward")
    figure.savefig(file, dpi=60)


def theory(size: int = 4, length: int = 4, problems: int = 50) -> str:
    """How far exact DeRa, token by token, is from the optimum at β/λ, over every answer of random small problems.

    The last column has two rewards: from an optimum for each, the optimum of half of both.
    """
    lams, lines = (0.25, 0.5, 2.0, 4.0), []
    for beta in (4.0, 2.0, 1.0, 0.5, 0.25):
        cells: list[list[float]] = [[] for _ in (*lams, "two")]
        moved = []
        for seed in range(problems):
            dice = torch.Generator().manual_seed(seed)
            ref, reward, other = (torch.randn((size,) * length, generator=dice, dtype=torch.float64) for _ in range(3))
            ref = ref - ref.logsumexp(tuple(range(length)))
            aligned = optimum(ref, reward, beta)
            moved.append(float((aligned.exp() * (aligned - ref)).sum()))
            for cell, lam in zip(cells, lams, strict=False):
                wanted = optimum(ref, reward, beta / lam)
                cell.append(float((wanted.exp() * (wanted - per_token(ref, [aligned], lam))).sum()))
            wanted, both = optimum(ref, (reward + other) / 2, beta), [aligned, optimum(ref, other, beta)]
            cells[-1].append(float((wanted.exp() * (wanted - per_token(ref, both, Vector((0.5, 0.5))))).sum()))
        means = " | ".join(number(sum(cell) / problems) for cell in cells)
        lines.append(f"| {beta:g} | {number(sum(moved) / problems)} | {means} |")
    names = " | ".join([*(f"λ = {lam:g}" for lam in lams), "two rewards, λ = 0.5+0.5"])
    head = f"| β | KL(π_β‖π_ref) | {names} |\n|---|---|{'---|' * len(cells)}\n"
    return head + "\n".join(lines)


def show(results: list[dict[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "agreement.json").write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    text = "\n".join(map(tables, results))
    (out / "agreement.md").write_text(text)
    print(text)
    if have_matplotlib():
        draw(results, out / "agreement.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    trained = commands.add_parser("demo")
    trained.add_argument("--preset", choices=PRESETS, default="full")
    trained.add_argument("--objectives", default="dpo,ipo,rebel,length")
    commands.add_parser("theory")
    given = commands.add_parser("pair")
    given.add_argument("ref")
    given.add_argument("aligned")
    given.add_argument("--beta", type=float, required=True, help="of ALIGNED's training")
    given.add_argument("--retrained", action="append", required=True, metavar="BETA=DIR")
    given.add_argument("--second", metavar="DIR", help="another training at ALIGNED's β")
    given.add_argument("--prompts", required=True)
    given.add_argument("--reward", required=True)
    given.add_argument("--path", help="a path that calibrate learned")
    given.add_argument("--samples", type=int, default=1)
    given.add_argument("--tokens", type=int, default=64)
    for each in (trained, given):
        each.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()

    began = time.monotonic()
    if args.what == "theory":
        return print(theory())
    if args.what == "demo":
        results = [study(objective, args.out, PRESETS[args.preset]) for objective in args.objectives.split(",")]
    else:
        scorer = load_reward(args.reward)

        def earned(text: str) -> float:
            (value,) = scorer.score([("", text)])
            if value is None:
                raise SystemExit(f"the reward {args.reward} fails on {text!r:.80}: {scorer.why_not(('', text))}")
            return value

        models = {
            args.beta / float(b): load(args.ref, folder) for b, folder in (r.split("=", 1) for r in args.retrained)
        }
        pair = ModelPair.from_pretrained(args.ref, args.aligned)
        models.setdefault(1.0, pair.merged(1.0))
        rows = agreement(
            pair, models, read(args.prompts), earned,
            second=load(args.ref, args.second) if args.second else None,
            path=Curve.load(args.path) if args.path else None,
            samples=args.samples, max_new_tokens=args.tokens, progress=lambda *told: print(*told, flush=True),
        )  # fmt: skip
        results = [{"objective": "pair", "beta": args.beta, "rows": rows}]
    show(results, args.out)
    print(f"{time.monotonic() - began:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
