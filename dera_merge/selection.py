"""Choose λ: what each λ earns and what it costs in KL from the reference, on a validation set.

`sweep` is the whole line. Texts are sampled from exact DeRa at a few λ (anchors), scored, and read once by both models;
`reweighting.py` makes curves over all λ of them. Where the best λ is not known well enough, the next anchor goes there. The
merged model, whose texts weigh nothing for exact DeRa, is sampled at the anchors, under the same noise. Without weights
every λ is sampled, and a budget that is left is spent around the best.

Every batch of texts is appended to `texts.jsonl` as it comes, with its rewards; an interrupted run goes on from there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import LogitsProcessorList, set_seed

from . import engine as engines
from . import lambdas
from . import prompts as prompt_files
from .checkpoint import json_bytes, load_json, write_atomically
from .curve import Curve, fingerprint, opened
from .divergence import densities, finite, gram, log_ratio
from .errors import DeraError
from .lambdas import Lam, Vector
from .ledger import gathered, launched
from .pair import ModelPair, warn
from .prompts import Prompt
from .rewards import Reward
from .reweighting import Pool, interval
from .sampling import BATCH, GumbelNoise, decode_batch
from .speculation import Speculation
from .traces import Text, per_text, tokens_of, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
Kind = Literal["exact", "merged"]
Mode = Literal["exact", "merged", "speculative"]

ANCHORS = (0.0, 0.5, 1.0, 2.0)
POINTS = 33  # of the grid between the smallest and the largest λ
STEPS = {2: 0.125, 3: 0.25}  # of the grid from 0 to 1 of each of several aligned models; 0.5 for more of them
COLUMNS = ("lambda", "ess", "known", "reward", "kl", "length", "wins_aligned", "wins_ref", "gain")  # of the curve
FINEST = 1 / 64  # of the range: λ that are nearer to each other are not told apart
KNOWN = 0.25  # effective texts a prompt, below which a curve is drawn as unknown
SURE = 0.75  # of those at the best λ, below which an anchor is put there
TEXTS = "texts.jsonl"


@dataclass(frozen=True)
class Answer:
    """A text of a model at one λ.

    Attributes:
        mode: `"exact"`, or `"merged"`: whose it is.
        prompt, sample: its prompt, and which of that prompt's texts it is.
        ids: its new tokens.
        rewards: name → number, None where the reward failed.
    """

    mode: Kind
    lam: Lam
    prompt: int
    sample: int
    ids: list[int]
    text: str
    rewards: dict[str, float | None]


@dataclass
class Sweep:
    """What `sweep` found.

    Attributes:
        curve: for each λ of the grid `lambda`, `reward` (the weighted sum), `reward_ci`, each reward by name
            (`length_reward` where the name is one of these), `kl` (nats a text, exact DeRa from the reference), `kl_ci`,
            `length` (tokens), `wins_aligned`, `wins_ref`, `gain` (over λ=1; of several aligned models, over the one that
            earns most alone), `gain_ci`, `ess` (effective texts a prompt), `known`.
        points: for each λ that was sampled and each mode, `reward`, `kl`, `length`, `distinct` (share of different word
            pairs), `failed`, `texts`.
        best: the recommended λ, `lambda`, `interval` (of several aligned models, one for each), what it gains, and where
            that lies.
        answers: all texts.
    """

    ref: str
    aligned: str
    curve: list[dict[str, Any]]
    points: list[dict[str, Any]]
    best: dict[str, Any]
    settings: dict[str, Any]
    faithful: dict[str, Any] | None = None
    commands: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What `sweep.json` holds; never NaN or infinity."""
        return finite({
            "ref": self.ref, "aligned": self.aligned, "best": self.best, "curve": self.curve, "points": self.points,
            "faithful": self.faithful, "commands": self.commands, "settings": self.settings,
        })  # fmt: skip

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write sweep.json, sweep.md, sweep.html and, with matplotlib, sweep.png into a directory; returns it."""
        from .sweep_report import html, markdown, plot_sweep

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "sweep.json", json_bytes(self.to_dict()))
        write_atomically(folder / "sweep.md", markdown(self).encode())
        write_atomically(folder / "sweep.html", html(self).encode())
        plot_sweep(self, folder / "sweep.png")
        return folder


def sweep(
    pair: ModelPair,
    prompts: Sequence[str | dict[str, Any]],
    rewards: Sequence[Reward],
    lams: Sequence[float | Sequence[float]] | None = None,
    *,
    weights: Sequence[float] | None = None,
    anchors: Sequence[float | Sequence[float]] | None = None,
    samples: int = 1,
    max_new_tokens: int = 64,
    mode: Mode = "exact",
    reweight: bool = True,
    merged: bool = True,
    path: str | os.PathLike[str] | Curve | None = None,
    scored: Sequence[dict[str, Any]] | None = None,
    budget: int | None = None,
    check: bool = True,
    beta: float | None = None,
    seed: int = 0,
    engine: str | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Find the λ that rewards on a validation set want.

    Started by `accelerate launch` or `torchrun`, each process samples and reads a share; all return the same.

    Args:
        pair: the two models.
        prompts: texts, `{"prompt": …}` or `{"messages": …}`.
        rewards: what texts are worth.
        lams: the λ of interest; with `reweight`, the curve spans them. Default: 0 to 2. With several aligned models a number
            for each, and those that are given are the grid; default: every combination from 0 to 1.
        weights: of the rewards; default 1 each.
        anchors: where texts are sampled; default 0, 0.5, 1 and 2 as far as they lie within the span, and its ends; with
            several aligned models, each alone, none, and their mean.
        samples: texts for each prompt at each anchor.
        max_new_tokens: their length, in tokens.
        mode: whose texts answer the question: exact DeRa's, the same sampled one by one with the merged model drafting
            (`"speculative"`), or the merged model's alone (`"merged"`; they cannot be reweighted).
        reweight: make curves over all λ of the texts of a few; without it every one of `lams` is sampled, and what a budget
            leaves goes half-way between the best and its neighbours, or, with several aligned models, where optuna's sampler
            proposes within the box that `lams` span.
        merged: sample the merged model at the anchors too.
        path: a path that `calibrate` learned, for the merged model.
        scored: texts that were sampled before, see `read_scored`; nothing is sampled then.
        budget: texts of exact DeRa in all; default: those of the anchors, and with `reweight` of three more.
        check: measure how far the merged model at the recommended λ is from exact DeRa.
        beta: the KL coefficient that ALIGNED was trained with; default: what its directory says, if it does.
        seed: of sampling and bootstrap.
        engine: sample exact DeRa's texts by vLLM: the address of a server of the pair's exact directory, or `"vllm"` to
            start one. Its noise is its own, so texts of several λ and of both modes are not coupled.
        device, compute_dtype: where and in what the models run.
        out: a directory in which texts are kept as they come.
        resume: go on with what an interrupted call with the same arguments left there.
        progress: called as work goes on.

    Returns:
        A `Sweep`. Intervals are 95 % (bootstrap over prompts).

    Raises:
        DeraError: prompts, rewards or λ are unusable, or a reward fails on every text.
    """
    if mode == "merged":
        if scored is not None or engine:
            raise DeraError("--from-scored and --engine bring exact DeRa's texts; leave out --mode merged")
        reweight = False
    if mode == "speculative" and engine:
        raise DeraError("--engine samples by itself; leave out --mode speculative")
    lams = pair.known(lams) if lams is not None else _default(pair, reweight)
    names = [reward.name for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        raise DeraError("give one reward or more, each once")
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    if len(weights) != len(rewards) or not all(map(math.isfinite, weights)):
        raise DeraError(f"{len(weights)} weights for {len(rewards)} rewards")
    encoded = prompt_files.encode(prompts, pair.tokenizer)
    if any(prompt.completion is not None for prompt in encoded):
        raise DeraError("the prompts bring completions; texts that are scored already go with --from-scored")
    if len(encoded) < 2:
        raise DeraError("one prompt says nothing about others; give more")
    prompt_files.check_lengths(encoded, max_new_tokens, pair.context_length)
    curve = opened(path, pair, lams)
    tell = progress or (lambda what, done, total: None)
    grid = sorted({*lams, *_between(lams)}) if reweight else sorted(lams)
    anchors = pair.known(anchors) if anchors is not None else _anchors(pair, lams) if reweight else grid
    grid = sorted({*grid, *anchors})
    settings = {
        "prompts": len(encoded), "samples": samples, "max_new_tokens": max_new_tokens, "anchors": anchors, "seed": seed,
        "rewards": dict(zip(names, weights, strict=True)), "reweight": reweight, "budget": budget,
        "path": curve.describe() if curve else None, "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "engine": "vllm" if engine else None, "mode": mode,
    }  # fmt: skip
    mark = {"pair": fingerprint(pair), "prompts": [prompt.ids for prompt in encoded]}
    mark |= {key: value for key, value in settings.items() if key not in ("anchors", "budget")}  # texts are the same
    process, processes = launched()
    store = _Store(None if out is None else Path(out), mark, resume, writes=process == 0)
    lab = _Sampler(
        pair, encoded, [_plain(entry) for entry in prompts], list(rewards), samples, max_new_tokens, seed, device,
        compute_dtype, curve, reweight, mode, store, tell, process, processes,
    )  # fmt: skip

    if scored is not None:
        lab.take(scored)
        anchors = sorted({answer.lam for answer in store.answers})
        grid = sorted({*grid, *anchors})
    else:
        with engines.engine(engine, pair, lambda: lab.exact, encoded, max_new_tokens, compute_dtype) as lab.engine:
            lab.sample(lab.kind, anchors)
            most = budget or (len(anchors) + 3 * reweight) * len(encoded) * samples
            first = anchors
            while (len(anchors) + 1) * len(encoded) * samples <= most:
                wanted = lab.next_anchor(grid, weights) if reweight else _next_point(lab.means(weights), first, seed)
                if wanted is None:
                    break
                anchors, grid = sorted([*anchors, wanted]), sorted({*grid, wanted})
                lab.sample(lab.kind, [wanted])
    if merged and scored is None and mode != "merged":
        lab.sample("merged", [lam for lam in anchors if lam not in pair.ends()])
    result = lab.result(grid if reweight else anchors, weights, settings | {"anchors": anchors})
    lam = result.best["lambda"]
    if not pair.others and (beta := beta if beta is not None else recorded_beta(pair)) is not None:
        result.best |= {"beta": beta, "equivalent_beta": beta / lam if lam else None}
    if check and result.best["tells_apart"] and lam not in pair.ends():
        from .fidelity import compare

        few = prompts[: min(len(prompts), 16)]
        tell("checking the merge", 0, 1)
        row = compare(
            pair, [lam], few, path=curve, max_new_tokens=max_new_tokens, seed=seed, device=device,
            compute_dtype=compute_dtype,
        ).at(lam)  # fmt: skip
        result.faithful = {key: row[key] for key in ("kl", "kl_ci", "tv", "top1", "captured", "verdict", "why")}
    return result


def _default(pair: ModelPair, reweight: bool) -> list[Lam]:
    """The λ of interest where none are given: what a curve spans, or all that are sampled."""
    models = len(pair.pairs)
    if models == 1:
        return [0.0, 2.0] if reweight else lambdas.parse_lambdas(["0:2:0.25"])
    return lambdas.parse_lambdas(["+".join([f"0:1:{STEPS.get(models, 0.5)}"] * models)], models)


def _between(lams: Sequence[Lam]) -> list[float]:
    """A grid from the smallest to the largest λ of one aligned model; those of several are a grid already."""
    if isinstance(lams[0], Vector):
        return []
    return (np.linspace(min(lams), max(lams), POINTS).round(4) + 0.0).tolist()


def _anchors(pair: ModelPair, lams: Sequence[Lam]) -> list[Lam]:
    """Where to sample first: known places within the box that `lams` span, and its ends."""
    if not pair.others:
        inside = {lam for lam in ANCHORS if min(lams) <= lam <= max(lams)}
        return sorted({*inside, min(lams), max(lams)})
    box = [(min(each), max(each)) for each in zip(*lams, strict=True)]
    mean = Vector([1 / len(box)] * len(box))
    places = [lam for lam in (*pair.ends(), mean) if all(a <= x <= b for x, (a, b) in zip(lam, box, strict=True))]
    corners = [Vector(corner) for corner in zip(*box, strict=True)]
    return sorted({*places, *corners})


def recorded_beta(pair: ModelPair) -> float | None:
    """The KL coefficient that ALIGNED's directory records as JSON (`beta` of a training config); None where it does not.

    TRL pickles its arguments (`training_args.bin`), and those are not opened.
    """
    for name in ("training_args.json", "training_config.json", "dpo_config.json", "trainer_config.json"):
        file = pair.aligned.source.folder / name
        if file.is_file() and isinstance(found := load_json(file), dict) and isinstance(found.get("beta"), int | float):
            return float(found["beta"]) or None
    return None


def read_scored(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Texts that were sampled and scored before, from JSON Lines.

    Each line has `"prompt"` (text, or number of the prompt) or `"messages"`, `"completion"`, where it came from as
    `"lambda": 0.5` (`[0.5, 0.25]` of several aligned models) or `"from": "ref"|"aligned"`, and `"reward"` or
    `"rewards": {name: number}`. `texts.jsonl` of an earlier sweep will do.

    Raises:
        DeraError: the file cannot be read, or a line lacks something.
    """
    lines = []
    try:
        content = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DeraError(f"{file} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(content, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("expected an object")
            if "settings" in entry and "prompt" not in entry:  # the head of texts.jsonl
                continue
            if entry.get("mode", "exact") != "exact":
                continue
            where = {"ref": 0.0, "aligned": 1.0}.get(entry.get("from"), entry.get("lambda"))
            each = where if isinstance(where, list) and where else [where]
            if not all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in each):
                raise ValueError('expected "lambda": number, or "from": "ref" or "aligned"')
            text = entry.get("completion", entry.get("text"))
            if not isinstance(text, str) and not isinstance(entry.get("token_ids"), list):
                raise ValueError('expected "completion"')
            given = entry.get("rewards", {"reward": entry["reward"]} if "reward" in entry else {})
            numbers = {k: v for k, v in given.items() if isinstance(v, int | float) and math.isfinite(v)}
            rewards = dict.fromkeys(given) | numbers
            where = Vector(where) if isinstance(where, list) else float(where) + 0.0
            lines.append(entry | {"lambda": where, "completion": text, "rewards": rewards})
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise DeraError(f"{file}, line {number}: {error}") from error
    if not lines:
        raise DeraError(f"{file} holds no scored texts")
    return lines


def _plain(entry: str | dict[str, Any]) -> str:
    """A prompt as a reward sees it: the text, or the last turn of a conversation."""
    if isinstance(entry, str):
        return entry
    return entry["messages"][-1]["content"] if "messages" in entry else entry["prompt"]


class _Store:
    """Answers in memory and, line by line as they come, in `<folder>/texts.jsonl`.

    Raises:
        DeraError: what lies there was made by another call.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], resume: bool, writes: bool) -> None:
        self.answers: list[Answer] = []
        self._file = None if folder is None else folder / TEXTS
        self._writes = writes  # the first of several processes does; all read what is there
        self._head: dict[str, str] | None = {"settings": hashlib.sha256(json_bytes(settings)).hexdigest()}  # till written
        if self._file is not None and resume and self._file.is_file():
            first, *lines = self._file.read_text(encoding="utf-8").split("\n")
            if json.loads(first or "{}") != self._head:
                raise DeraError(f"{self._file} was begun by another call or from other inputs; leave out --resume")
            whole = lines[:-1]  # what follows the last newline was cut off
            keys = ("prompt", "sample", "token_ids", "text", "rewards")
            try:
                for row in map(json.loads, whole):
                    self.answers.append(Answer(row["mode"], lambdas.loaded(row["lambda"]), *(row[key] for key in keys)))
            except (ValueError, KeyError, AttributeError) as error:
                raise DeraError(f"{self._file} is broken ({error}); leave out --resume") from error
            if writes:
                write_atomically(self._file, "".join(f"{line}\n" for line in [first, *whole]).encode())
            self._head = None

    def add(self, answers: Sequence[Answer]) -> None:
        self.answers += answers
        if self._file is None or not self._writes:
            return
        if self._head is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, (json.dumps(self._head) + "\n").encode())
            self._head = None
        with self._file.open("a", encoding="utf-8") as stream:
            for a in answers:
                row = {"mode": a.mode, "lambda": a.lam, "prompt": a.prompt, "sample": a.sample, "token_ids": a.ids,
                       "text": a.text, "rewards": a.rewards}  # fmt: skip
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


@dataclass
class _Sampler:
    """The models of one sweep: texts, rewards, densities, curves."""

    pair: ModelPair
    prompts: list[Prompt]
    plain: list[str]
    rewards: list[Reward]
    samples: int
    max_new_tokens: int
    seed: int
    device: str | torch.device
    compute_dtype: torch.dtype | str
    path: Curve | None
    reweight: bool
    mode: Mode
    store: _Store
    tell: Progress
    process: int
    processes: int

    def __post_init__(self) -> None:
        self.exact = self.pair.exact(dtype=self.compute_dtype, device=self.device)
        self.kind: Kind = "merged" if self.mode == "merged" else "exact"  # whose texts answer the question
        self._merged: Any = None
        self._merged_at: Lam | None = None
        self.engine: engines.Engine | None = None
        # Of each of exact DeRa's texts, log π_λ and KL from the reference, in nats: λ → number.
        self._known: dict[int, dict[Lam, tuple[float, float]]] = {}
        self._kls: dict[Lam, np.ndarray] = {}  # KL of the merged model from the reference on its own texts
        # Of all texts that were read with several aligned models: `gram` times tokens, and tokens.
        self._gram: tuple[Any, int] = (0.0, 0)

    def merged(self, lam: Lam) -> PreTrainedModel:
        if self._merged is None:
            self._merged = self.pair.merged(lam, device=self.device, compute_dtype=self.compute_dtype, path=self.path)
        if lam != self._merged_at:
            self._merged.set_lam(lam)
            self._merged_at = lam
        return self._merged

    @cached_property
    def _dial(self) -> Any:
        return self.exact.dial()

    def sample(self, mode: Kind, lams: Sequence[Lam]) -> None:
        """Texts at each λ that are not there yet; exact DeRa's share batches, whatever their λ."""
        there = {(a.mode, a.lam, a.prompt, a.sample) for a in self.store.answers}
        tasks = [
            (lam, prompt, number) for lam in lams for prompt in range(len(self.prompts)) for number in range(self.samples)
            if (mode, lam, prompt, number) not in there
        ]  # fmt: skip
        if mode == "exact" and self.mode != "speculative":
            tasks.sort(key=lambda task: len(self.prompts[task[1]].ids))
        else:  # one λ at a time
            tasks.sort(key=lambda task: (task[0], len(self.prompts[task[1]].ids)))
        done = 0
        while done < len(tasks):
            most = engines.AT_ONCE if self.engine and mode == "exact" else BATCH
            batch = tasks[done : done + most * self.processes]
            if mode == "merged":
                batch = [task for task in batch if task[0] == batch[0][0]]
            mine = batch[self.process :: self.processes]
            fresh = gathered(self._answers(mode, mine) if mine else [])
            place = {task: number for number, task in enumerate(batch)}
            self.store.add(sorted(fresh, key=lambda a: place[a.lam, a.prompt, a.sample]))
            done += len(batch)
            self.tell(f"sampling from {'exact DeRa' if mode == 'exact' else 'the merged model'}", done, len(tasks))

    def _answers(self, mode: Kind, batch: list[tuple[Lam, int, int]]) -> list[Answer]:
        # Both modes have the same noise: their texts part only where distributions do. So have all λ, where they are
        # compared as they are; where texts of several λ are pooled, each λ's are to be news.
        own = {lam: zlib.crc32(lambdas.name(lam).encode()) % 9973 if self.reweight else 0 for lam, _, _ in batch}
        streams = [p + len(self.prompts) * (n + self.samples * own[lam]) for lam, p, n in batch]
        asked, lams = [self.prompts[p].ids for _, p, _ in batch], [lam for lam, _, _ in batch]
        if self.engine and mode == "exact":
            new = self.engine.sample(asked, lams, max_new_tokens=self.max_new_tokens)
        elif self.mode == "speculative" and mode == "exact":
            new = [self._drafted(*each) for each in zip(asked, lams, streams, strict=True)]
        else:
            noise = LogitsProcessorList([GumbelNoise(streams, self.seed, self.pair.vocab_size)])
            how = {"do_sample": False, "max_new_tokens": self.max_new_tokens, "logits_processor": noise}
            model = self.exact if mode == "exact" else self.merged(lams[0])
            new = decode_batch(model, self.pair.tokenizer, asked, **how, **({"lam": lams} if mode == "exact" else {}))
        texts = [self.pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        rows = self._scored([(self.plain[p], text) for (_, p, _), text in zip(batch, texts, strict=True)])
        return [Answer(mode, lam, p, n, ids, text, row)
                for (lam, p, n), ids, text, row in zip(batch, new, texts, rows, strict=True)]  # fmt: skip

    def _drafted(self, ids: list[int], lam: Lam, stream: int) -> list[int]:
        """A text of exact DeRa, the merged model drafting. Its noise is its own: drafts use it up."""
        draft = self._dial if self.exact.rows is not None and self.path is None else self.merged(lam)
        set_seed((self.seed * 1_000_003 + stream) % 2**32)
        (new,) = decode_batch(
            self.exact, self.pair.tokenizer, [ids], do_sample=True, temperature=1.0, top_k=0, top_p=1.0, lam=lam,
            max_new_tokens=self.max_new_tokens, assistant_model=draft, speculation=Speculation(),
        )  # fmt: skip
        return new

    def _scored(self, texts: list[tuple[str, str]]) -> list[dict[str, float | None]]:
        rows: list[dict[str, float | None]] = [{} for _ in texts]
        for reward in self.rewards:
            values = reward.score(texts)
            for row, value in zip(rows, values, strict=True):
                row[reward.name] = value
            # One text may be at fault, a whole first batch is not.
            if not self.store.answers and all(value is None for value in values) and (why := reward.why_not(texts[0])):
                raise DeraError(f"the reward {reward.name} fails on every text: {why}")
        return rows

    def take(self, scored: Sequence[dict[str, Any]]) -> None:
        """Texts that were sampled and scored before; rewards that they lack are worked out."""
        places = {text: number for number, text in enumerate(self.plain)}
        answers: list[Answer] = []
        counts: dict[tuple[Lam, int], int] = {}
        for number, entry in enumerate(scored, 1):
            asked = entry["prompt"] if "prompt" in entry else _plain(entry)
            prompt = asked if isinstance(asked, int) else places.get(asked)
            if prompt is None or not 0 <= prompt < len(self.prompts):
                raise DeraError(f"scored text {number} answers a prompt that is not among the {len(self.prompts)} given")
            ids = entry.get("token_ids") or self._tokens(entry["completion"])
            if not all(isinstance(token, int) and 0 <= token < self.pair.vocab_size for token in ids):
                raise DeraError(f"scored text {number} has token ids that are not this tokenizer's")
            text = entry["completion"] if entry["completion"] is not None else self.pair.tokenizer.decode(ids)
            known = entry["rewards"]
            if len(self.rewards) == 1 and "reward" in known:  # what it is called does not matter then
                known = {self.rewards[0].name: known["reward"]}
            key = (self._place(entry["lambda"], number), prompt)
            counts[key] = counts.get(key, 0) + 1
            answers.append(Answer("exact", key[0], prompt, counts[key] - 1, ids, text, dict(known)))
        for reward in self.rewards:
            lacking = [a for a in answers if reward.name not in a.rewards]
            values = reward.score([(self.plain[a.prompt], a.text) for a in lacking]) if lacking else []
            for answer, value in zip(lacking, values, strict=True):
                answer.rewards[reward.name] = value
        self.store.add(answers)

    def _place(self, lam: Lam, number: int) -> Lam:
        """The λ of scored text `number`; 0 and 1 of several aligned models are the reference and the first of them."""
        if self.pair.others and lam in (0.0, 1.0):
            return self.pair.ends()[int(lam)]
        try:
            return self.pair.known([lam])[0]
        except (TypeError, ValueError) as error:
            raise DeraError(f"scored text {number}: {error}") from None

    def _tokens(self, completion: str) -> list[int]:
        """A text as tokens, ended if it is shorter than texts may be."""
        ids, end = self.pair.tokenizer(completion, add_special_tokens=False)["input_ids"], self.pair.tokenizer.eos_token_id
        return ids if end is None or len(ids) >= self.max_new_tokens else [*ids, end]

    # Curves

    def _texts(self, answers: Sequence[Answer]) -> list[Text]:
        """Answers behind their prompts."""
        prompts = [self.prompts[a.prompt].ids for a in answers]
        return [Text(a.prompt, [*ids, *a.ids], len(ids)) for a, ids in zip(answers, prompts, strict=True)]

    def _densities(self, lams: Sequence[Lam]) -> tuple[list[Answer], np.ndarray, np.ndarray]:
        """The texts that answer, and log π_λ and KL from the reference of each at each λ, (texts, λ) in nats."""
        answers = [a for a in self.store.answers if a.mode == self.kind]
        if self.kind == "merged":
            return answers, *self._own_densities(answers, lams)
        fresh = [i for i in range(len(answers)) if any(lam not in self._known.get(i, {}) for lam in lams)]
        if fresh:
            mine = fresh[self.process :: self.processes]
            found = self._read([answers[i] for i in mine], lams) if mine else []
            for i, row in gathered(list(zip(mine, found, strict=True))):
                self._known[i] = row
        both = np.array([[self._known[i][lam] for lam in lams] for i in range(len(answers))])
        return answers, both[..., 0], both[..., 1]

    def _own_densities(self, answers: Sequence[Answer], lams: Sequence[Lam]) -> tuple[np.ndarray, np.ndarray]:
        """Of the merged model's texts KL from the reference at the λ that each was drawn at; they say nothing of others."""
        kl, where = np.zeros((len(answers), len(lams))), {lam: number for number, lam in enumerate(lams)}
        for lam in sorted({a.lam for a in answers}):
            kl[[a.lam == lam for a in answers], where[lam]] = self._merged_kl(lam)
        return np.zeros_like(kl), kl

    def _read(self, answers: Sequence[Answer], lams: Sequence[Lam]) -> list[dict[Lam, tuple[float, float]]]:
        """log π_λ and KL from the reference of these texts at each λ."""
        texts, traces = self._texts(answers), []
        for number, model in enumerate(self.exact.sides):
            self.tell("reading the texts", number, len(self.exact.sides) + 1)
            traces.append(trace_of(model, texts))
        self.tell("reading the texts", len(traces), len(traces) + 1)
        found = densities(traces, tokens_of(texts), lams, self.exact.config.vocab_size)
        logp, kl = (per_text(each, texts) for each in found)
        if self.pair.others:
            count = len(traces[0].hidden)
            self._gram = (self._gram[0] + count * gram(traces, self.exact.config.vocab_size), self._gram[1] + count)
        self.tell("reading the texts", len(traces) + 1, len(traces) + 1)
        return [{lam: (logp[row, c], kl[row, c]) for c, lam in enumerate(lams)} for row in range(len(texts))]

    def _pool(
        self, grid: Sequence[Lam], weights: Sequence[float]
    ) -> tuple[Pool, list[Answer], np.ndarray, np.ndarray]:
        """Exact DeRa's texts that have a reward, as a pool; and of each its answer, reward and KL at each λ."""
        answers, logp, kl = self._densities(grid)
        total = self._totals(answers, weights)
        kept = ~np.isnan(total)
        if not kept.any():
            raise DeraError("a reward failed on every text")
        answers = [a for a, k in zip(answers, kept, strict=True) if k]
        where = {lam: number for number, lam in enumerate(grid)}
        drawn, prompts = np.array([where[a.lam] for a in answers]), np.array([a.prompt for a in answers])
        return Pool(np.array(grid), logp[kept], drawn, prompts, self.seed), answers, total[kept], kl[kept]

    def _totals(self, answers: Sequence[Answer], weights: Sequence[float]) -> np.ndarray:
        """The weighted sum of each text's rewards; NaN where one failed."""
        return np.array([[a.rewards[r.name] for r in self.rewards] for a in answers], dtype=float) @ np.array(weights)

    def means(self, weights: Sequence[float]) -> dict[Lam, float]:
        """The mean reward of what was sampled at each λ, as it is."""
        mine: dict[Lam, list[Answer]] = {}
        for answer in self.store.answers:
            if answer.mode == self.kind:
                mine.setdefault(answer.lam, []).append(answer)
        return {lam: float(np.nanmean(self._totals(answers, weights))) for lam, answers in mine.items()}

    def next_anchor(self, grid: Sequence[Lam], weights: Sequence[float]) -> Lam | None:
        """Where another anchor tells most about the best λ; None where the best is known well enough.

        That is the λ with the highest upper bound of its reward, as long as few effective texts stand for it.
        """
        pool, _, total, _ = self._pool(grid, weights)
        _, draws = pool.mean(total)
        upper = np.where(pool.ess < KNOWN, np.inf, interval(draws)[1])
        there = {a.lam for a in self.store.answers if a.mode == "exact"}
        best = int(np.argmax(upper - 1e-9 * pool.ess))
        return None if pool.ess[best] >= SURE or grid[best] in there else grid[best]

    def result(self, grid: Sequence[Lam], weights: Sequence[float], settings: dict[str, Any]) -> Sweep:
        """All curves, points and the answer."""
        ends, several = self.pair.ends(), bool(self.pair.others)
        within = not several and min(grid) <= 0 and max(grid) >= 1 and settings["reweight"]
        grid = sorted({*grid, *ends}) if within else list(grid)
        pool, answers, total, kl = self._pool(grid, weights)
        failed = sum(a.mode == self.kind for a in self.store.answers) - len(answers)
        if settings["reweight"] is False:
            pool = _direct(pool)
        reward, draws = pool.mean(total)
        columns: dict[str, tuple[np.ndarray, np.ndarray]] = {"reward": (reward, draws), "kl": pool.mean(kl)}
        columns["length"] = pool.mean(np.array([len(a.ids) for a in answers], dtype=float))
        if len(self.rewards) > 1:
            earned = {r.name: np.array([a.rewards[r.name] for a in answers], dtype=float) for r in self.rewards}
            columns |= {column_of(reward): pool.mean(values) for reward, values in earned.items()}
        known = pool.ess >= KNOWN
        alone = [grid.index(lam) for lam in ends[1:] if lam in grid]
        one = max(alone, key=lambda number: reward[number] if known[number] else -np.inf, default=None)
        for name, number in (("wins_aligned", one), ("wins_ref", grid.index(ends[0]) if ends[0] in grid else None)):
            if number is not None:
                columns[name] = pool.wins(total, number)
        if one is not None:
            columns["gain"] = reward - reward[one], draws - draws[:, [one]]
        curve = []
        bounds = {name: interval(each) for name, (_, each) in columns.items()}
        for number, lam in enumerate(grid):
            row: dict[str, Any] = {"lambda": lam, "ess": float(pool.ess[number]), "known": bool(known[number])}
            for name, (values, _) in columns.items():
                row[name] = float(values[number])
                row[f"{name}_ci"] = bounds[name][:, number].tolist()
            curve.append(row)
        if not known.any():
            raise DeraError("no λ has enough texts to say anything; give more --samples, or shorter texts")
        chosen = np.where(known, reward, -np.inf)
        best = int(np.argmax(chosen))
        where = _where_best(grid, np.where(known, draws, -np.inf))
        if several:
            reach = list(zip(*(grid[i] for i in np.flatnonzero(known)), strict=True))
            edge = any(x in (min(each), max(each)) for x, each in zip(grid[best], reach, strict=True))
        else:
            edge = best in (0, len(grid) - 1) or not known[max(best - 1, 0)] or not known[min(best + 1, len(grid) - 1)]
        answer: dict[str, Any] = {"lambda": grid[best], "interval": where, "at_the_edge": bool(edge)}
        if several:
            answer["log_ratio"] = self._log_ratio(grid[best])
            answer["gain_over"] = None if one is None else grid[one]
        answer["tells_apart"] = bool(np.ptp(reward[known]) > 0)
        answer |= {key: curve[best][key] for key in ("reward", "reward_ci", "kl", "ess")}
        if "gain" in columns:
            answer |= {"gain": curve[best]["gain"], "gain_ci": curve[best]["gain_ci"]}
            answer["more_than_noise"] = bool(curve[best]["gain_ci"][0] > 0)
        if (both := self._choices(weights)) is not None:
            answer["sampled"] = both
        settings = settings | {"failed": failed}
        if failed:
            warn(f"a reward failed on {failed} of {failed + len(answers)} texts, twice; they are left out")
        names = (self.pair.ref.source.name, self.pair.aligned_name)
        result = Sweep(*names, curve, self._points(weights), answer, settings, None, [], self.plain, self.store.answers)
        result.commands = _commands(result, self.pair, self.path) if answer["tells_apart"] else []
        return result

    def _log_ratio(self, lam: Vector) -> dict[str, Any] | None:
        """See `divergence.log_ratio`; over the texts of all processes."""
        parts = gathered([self._gram])
        tokens = sum(count for _, count in parts)
        return log_ratio(sum(total for total, _ in parts) / tokens, lam) if tokens else None

    def _choices(self, weights: Sequence[float]) -> dict[str, Any] | None:
        """Which of the λ that both were sampled at each of exact and merged would choose: mode → `lambda`, `interval`.

        The noise is theirs in common, and at the ends they are one model. None where there are fewer than three such λ.
        """
        ends = self.pair.ends()
        places = {mode: {a.lam for a in self.store.answers if a.mode == mode} for mode in ("exact", "merged")}
        common = sorted(places["exact"] & (places["merged"] | set(ends)))
        if len(common) < 3 or not places["merged"]:
            return None
        found: dict[str, Any] = {}
        for mode in ("exact", "merged"):
            mine = [a for a in self.store.answers if a.lam in common and a.mode == ("exact" if a.lam in ends else mode)]
            reward, draws = self._as_sampled(mine, common, self._totals(mine, weights))
            found[mode] = {"lambda": common[int(np.argmax(reward))], "interval": _where_best(common, draws)}
        return found

    def _as_sampled(
        self, answers: Sequence[Answer], lams: Sequence[Lam], total: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`Pool.mean` of these rewards, each for the λ that its text was drawn at; texts without one (NaN) are left out."""
        kept = ~np.isnan(total)
        answers = [a for a, k in zip(answers, kept, strict=True) if k]
        drawn, prompts = np.array([lams.index(a.lam) for a in answers]), np.array([a.prompt for a in answers])
        pool = Pool(np.array(lams), np.zeros((len(answers), len(lams))), drawn, prompts, self.seed)
        return _direct(pool).mean(total[kept])

    def _points(self, weights: Sequence[float]) -> list[dict[str, Any]]:
        """What was sampled, as it is: no weights."""
        points = []
        for mode in ("exact", "merged"):
            for lam in sorted({a.lam for a in self.store.answers if a.mode == mode}):
                mine = [a for a in self.store.answers if a.mode == mode and a.lam == lam]
                total = self._totals(mine, weights)
                kept = ~np.isnan(total)
                point: dict[str, Any] = {
                    "mode": mode, "lambda": lam, "texts": len(mine), "failed": int((~kept).sum()),
                    "length": float(np.mean([len(a.ids) for a in mine])), "distinct": _distinct([a.text for a in mine]),
                }  # fmt: skip
                if kept.any():
                    value, draws = self._as_sampled(mine, [lam], total)
                    point |= {"reward": float(value[0]), "reward_ci": interval(draws)[:, 0].tolist()}
                if mode == "merged":
                    point["kl"] = float(self._merged_kl(lam).mean())
                points.append(point)
        return points

    def _merged_kl(self, lam: Lam) -> np.ndarray:
        """KL of the merged model from the reference on each of its own texts at λ, nats; (texts,)."""
        if lam not in self._kls:
            texts = self._texts([a for a in self.store.answers if a.mode == "merged" and a.lam == lam])
            traces = [trace_of(self.exact.ref, texts), trace_of(self.merged(lam), texts)]
            _, kl = densities(traces, tokens_of(texts), [1.0], self.exact.config.vocab_size)
            self._kls[lam] = per_text(kl[:, 0], texts)
        return self._kls[lam]


def _direct(pool: Pool) -> Pool:
    """The same texts without reweighting: each stands for the λ that it was drawn at alone."""
    own = np.arange(len(pool.lams)) == pool.drawn[:, None]
    return Pool(pool.lams, np.where(own, 0.0, -np.inf), pool.drawn, pool.prompt_of, pool.seed)


def _distinct(texts: Sequence[str]) -> float:
    """Share of different ones among all pairs of neighbouring words."""
    pairs = [pair for text in texts for words in [text.split()] for pair in itertools.pairwise(words)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def column_of(reward: str) -> str:
    """What a reward is called in the curve, where some names have another meaning."""
    return f"{reward}_reward" if reward in COLUMNS else reward


def _next_point(means: dict[Lam, float], first: Sequence[Lam], seed: int) -> Lam | None:
    """Where to sample next without weights, knowing the mean reward of some λ; None where there is no more to tell apart.

    Half-way between the best λ of one aligned model and its farther neighbour; with several, where optuna's sampler (TPE)
    proposes within the box that the `first` λ span.

    Raises:
        DeraError: optuna is needed and not installed.
    """
    if isinstance(first[0], Vector):
        return _proposed(means, [(min(each), max(each)) for each in zip(*first, strict=True)], seed)
    lams = sorted(means)
    best = lams.index(max(means, key=means.__getitem__))
    gaps = [(lams[i + 1] - lams[i], i) for i in (best - 1, best) if 0 <= i < len(lams) - 1]
    width, left = max(gaps, default=(0.0, 0))
    return round(lams[left] + width / 2, 6) + 0.0 if width > FINEST * (max(first) - min(first)) > 0 else None


def _proposed(means: dict[Lam, float], box: list[tuple[float, float]], seed: int) -> Vector | None:
    try:
        import optuna
    except ImportError as error:
        raise DeraError("a search over several λ at once needs optuna: pip install 'dera-merge[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spread = {str(k): optuna.distributions.FloatDistribution(*each) for k, each in enumerate(box)}
    # Made anew each time, so that a resumed sweep makes the same proposals.
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(means)))
    for lam, value in means.items():
        params = {str(k): x for k, x in enumerate(lam)}
        if all(a <= x <= b for x, (a, b) in zip(lam, box, strict=True)):
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, value=value))
    asked = study.ask(spread)
    found = Vector(round(asked.params[str(k)], 4) + 0.0 for k in range(len(box)))
    return None if found in means else found


def _where_best(lams: Sequence[Lam], draws: np.ndarray) -> list[Any]:
    """95 % of the λ that are best in bootstrap draws (DRAWS, λ): two numbers, or of several aligned models two for each."""
    return np.quantile(np.array(lams)[np.argmax(draws, axis=1)], [0.025, 0.975], axis=0).T.tolist()


def _commands(result: Sweep, pair: ModelPair, path: Curve | None) -> list[str]:
    """What to run to ship the recommended λ."""
    import shlex

    lam, names = lambdas.name(result.best["lambda"]), [pair.ref.source.name, pair.aligned.source.name]
    names += [word for other in pair.others for word in ("--aligned", other.aligned.source.name)]
    words = ["dera-merge", "merge", *names, "-l", lam, "-o", "merged"]
    words += ["--path", path.name] if path else []
    check = ["dera-merge", "compare", *names, "-l", lam, "--approx", "merged", "-o", "report"]
    return [shlex.join(words), shlex.join(check), "dera-merge push merged USER/NAME --report report"]
