"""Benchmarks at every λ of a grid: tasks of lm-evaluation-harness, for one reading of the two models.

A task of multiple choice or of perplexity asks for log-probabilities of given continuations. Of exact DeRa both models'
one reading gives these at every λ (`measuring/continuations.py`), so a curve over 33 λ costs two passes; a merge costs
one more for each λ. Tasks that generate are answered by greedy decoding at a few λ only.

Every block of continuations is kept as it is read, and every batch of answers; an interrupted run goes on from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DeraError
from ..files.room import check_space
from ..lambdas import is_end
from ..measuring.contexts import trace_at_once
from ..measuring.continuations import Continuations, own_scores, scores
from ..measuring.laboratory import Compute, Laboratory
from ..measuring.ledger import FOLDER, Ledger
from ..merging.path import Course, opened
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..processes import launched
from ..progress import Progress
from . import harness
from .anchors import grid_between
from .harness import READ, Pairs, Suite
from .scores import Bench, Setting, curve, headline, pareto

BLOCK_ROWS = 1 << 14  # scored tokens whose hidden states exist at a time
BLOCK_TOKENS = 1 << 18  # read between two steps of the ledger
ANSWERS = 32  # generated between two steps of the ledger, in batches of BATCH
BATCH = 8
PAGES = 4_000_000  # bytes of a report
MERGED = (0.5, 1.5)  # where merges are read, beside the ends of the range
Answers = dict[int, dict[Setting, Any]]  # id of a request → its answer under each setting, as the harness takes it


class BenchLab(Laboratory):
    """The models of one benchmark, and their answers, read back from the ledger where they are there already.

    Args:
        pair, compute, path, seed, tell: as for `Laboratory`.
        lams, merged: λ of exact DeRa and of merges.

    Attributes:
        ledger: of what is read and generated.
    """

    ledger: Ledger

    def __init__(
        self, pair: Pair, compute: Compute, path: Course | None, seed: int, tell: Progress | None,
        lams: Sequence[float], merged: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__(pair, compute, path, seed, tell)
        self.lams, self.merged_at = list(lams), list(merged)

    @property
    def settings(self) -> list[Setting]:
        """What continuations are read by."""
        return [*(("exact", lam) for lam in self.lams), *(("merged", lam) for lam in self.merged_at)]

    def read(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each continuation under each setting, and whether it is greedy's; (pairs, settings)."""
        longest: dict[tuple[int, ...], int] = {}
        for context, continuation in pairs:
            longest[context] = max(longest.get(context, 0), len(context) + len(continuation))
        # The longest first, all continuations of a context together.
        order = sorted(set(pairs), key=lambda pair: (-longest[pair[0]], pair[0], -len(pair[1]), pair[1]))
        place = {pair: number for number, pair in enumerate(order)}
        blocks = list(_blocks(order))
        columns = [self._step(blocks, "exact", self._read_exact)]
        self.let_go()
        columns += [self._step(blocks, f"merged-{lam:g}", partial(self._read_merged, lam)) for lam in self.merged_at]
        logp, greedy = (np.concatenate([column[n] for column in columns], 1) for n in (0, 1))
        rows = [place[pair] for pair in pairs]
        return logp[rows], greedy[rows]

    def _step(
        self, blocks: list[Pairs], what: str, work: Callable[[Pairs], dict[str, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `work` makes of all blocks, one after another."""
        title = "reading with both models" if what == "exact" else f"reading, {what.replace('-', ' at λ=', 1)}"
        done, whole, parts = 0, sum(map(_size, blocks)), []
        for block in blocks:
            self.tell(title, done, whole)
            key = hashlib.sha256(repr(block).encode()).hexdigest()[:16]
            parts.append(self.ledger.step(f"{what}-{key}", partial(work, block)))
            done += _size(block)
        self.tell(title, done, whole)
        return np.concatenate([part["logp"] for part in parts]), np.concatenate([part["greedy"] for part in parts])

    def _read_exact(self, block: Pairs) -> dict[str, np.ndarray]:
        """Both models' one reading, at all λ."""
        continuations = Continuations.of(block)
        sides = [trace_at_once(model, continuations.texts) for model in self.exact.sides]
        logp, greedy = scores(sides, continuations, self.lams, self.exact.config.vocab_size)
        return {"logp": logp, "greedy": greedy}

    def _read_merged(self, lam: float, block: Pairs) -> dict[str, np.ndarray]:
        """A merge's own reading."""
        continuations, model = Continuations.of(block), self.merged(lam)
        vocab_size = model.config.get_text_config(decoder=True).vocab_size
        logp, greedy = own_scores(trace_at_once(model, continuations.texts), continuations, vocab_size)
        return {"logp": logp[:, None], "greedy": greedy[:, None]}

    def generate(self, requests: Sequence[Any], settings: Sequence[Setting]) -> dict[Setting, list[str]]:
        """The answers to `generate_until` requests under each setting; greedy, where a task asks for nothing else."""
        found = {each: self._generated(requests, *each) for each in settings if each[0] == "exact"}
        self.let_go()
        return found | {each: self._generated(requests, *each) for each in settings if each[0] == "merged"}

    def _generated(self, requests: Sequence[Any], mode: str, lam: float) -> list[str]:
        """The answers of one model."""
        from lm_eval.models.huggingface import HFLM

        def work(some: Sequence[Any]) -> dict[str, np.ndarray]:
            model = self.exact if mode == "exact" else self.merged(lam)
            if mode == "exact":
                model.set_lam(lam)
            with harness.quiet():
                writer = HFLM(pretrained=model, tokenizer=self.pair.tokenizer, batch_size=BATCH)
            return {"texts": np.array(writer.generate_until(list(some), disable_tqdm=True), dtype=np.str_)}

        texts: list[str] = []
        for first in range(0, len(requests), ANSWERS):
            self.tell(f"generating, {mode} at λ={lam:g}", first, len(requests))
            arrays = partial(work, requests[first : first + ANSWERS])
            texts += self.ledger.step(f"generated-{mode}-{lam:g}-{first}", arrays)["texts"].tolist()
        return texts


def _size(block: Pairs) -> int:
    """Tokens of a block."""
    return sum(len(context) + len(continuation) for context, continuation in block)


def _blocks(pairs: Pairs) -> Iterator[Pairs]:
    """Pairs in blocks that are read at a time, in their order."""
    block: Pairs = []
    rows = size = 0
    for context, continuation in pairs:
        rows, size = rows + len(continuation), size + len(context) + len(continuation)
        if block and (rows > BLOCK_ROWS or size > BLOCK_TOKENS):
            yield block
            block, rows, size = [], len(continuation), len(context) + len(continuation)
        block.append((context, continuation))
    if block:
        yield block


def bench(
    pair: Pair,
    tasks: Sequence[str],
    lams: Sequence[float] | None = None,
    *,
    merged: Sequence[float] | None = None,
    generate_at: Sequence[float] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    chat: bool = False,
    path: str | os.PathLike[str] | Course | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """Tasks of lm-evaluation-harness at every λ: exact DeRa from one reading of both models, merges at a few.

    Args:
        pair: the two models.
        tasks: names of the harness's tasks, groups and tags.
        lams: of exact DeRa; default 33 from 0 to 2. 0 and 1 are always among them.
        merged: λ of merges to read, a pass each; default 0.5, 1.5 and the ends of `lams`; none: `[]`.
        generate_at: where tasks that generate are answered, by exact DeRa and the merge; default 0, 1 and `merged`.
        limit: items of each task, the first ones.
        num_fewshot: examples before each question, where a task does not forbid them; default: what each task says.
        include_path: a directory with task files of one's own.
        chat: put questions through the chat template.
        path: a path that `calibrate` learned, for merges.
        seed: of the bootstrap.
        device: where the models run.
        compute_dtype: in what they run.
        out: a directory in which to keep what is read until the result is saved.
        resume: go on with what an interrupted call with the same arguments left there.
        overwrite: throw away what an earlier call left there.
        progress: called as work goes on.

    Returns:
        A `Bench`. Intervals are 95 % (bootstrap over items, the same items for all λ).

    Raises:
        DeraError: lm-eval is missing, a task is not known, cannot be loaded or answered, or λ are unusable; another run
            is at work in `out`, or an earlier one left something there.
    """
    pair.only_pair("bench is")
    if launched()[1] > 1:
        raise DeraError("bench runs in one process; start it without accelerate launch or torchrun")
    harness.check()
    if not (names := list(dict.fromkeys(tasks))):
        raise DeraError("give a task or more, such as arc_easy")
    wanted = pair.known(lams) if lams is not None else grid_between([0.0, 2.0])
    grid = sorted({*wanted, 0.0, 1.0})
    if merged is None:
        merged = [lam for lam in {*MERGED, min(grid), max(grid)} if grid[0] <= lam <= grid[-1]]
    merged = sorted(lam for lam in {*pair.known(merged)} if not is_end(lam))
    written = sorted({0.0, 1.0, *merged} if generate_at is None else {0.0, 1.0, *pair.known(generate_at)})
    writing: list[Setting] = [("exact", lam) for lam in written]
    writing += [("merged", lam) for lam in written if not is_end(lam)]
    course = opened(path, pair, [*merged, *written])
    suite = Suite(names, None if include_path is None else Path(include_path), num_fewshot)
    lab = BenchLab(pair, Compute(device, compute_dtype), course, seed, progress, grid, merged)
    lm = harness.reader(pair, lab.read)
    suite.build(lm, limit, chat)
    if out is not None:
        check_space(Path(out), PAGES + 9 * len(lab.settings) * sum(len(suite.requests(kind)) for kind in READ))
    lab.ledger = Ledger(
        None if out is None else Path(out) / FOLDER,
        {"pair": fingerprint(pair), "lams": grid, "requests": suite.fingerprint(), "compute": str(compute_dtype),
         "path": course.sha256 if course else None},
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    with lab.ledger:
        answers = _answers(lab, lm, suite, writing)
    found = _figures(suite, answers, [*lab.settings, *(each for each in writing if each not in lab.settings)], seed)
    settings = {
        "tasks": names, "limit": limit, "num_fewshot": num_fewshot, "chat": chat, "seed": seed,
        "path": course.describe() if course else None,
        "compute_dtype": str(compute_dtype).removeprefix("torch."), "lm_eval": harness.installed(),
    }  # fmt: skip
    return Bench(pair.ref.source.name, pair.aligned.source.name, found, pareto(found), settings, lab.ledger)


def _answers(lab: BenchLab, lm: Any, suite: Suite, writing: Sequence[Setting]) -> Answers:
    """Every request answered."""
    answers: Answers = {}
    if requests := suite.requests("loglikelihood"):
        for request, (logp, greedy) in zip(requests, lm.loglikelihood(requests, disable_tqdm=True), strict=True):
            each = zip(lab.settings, logp.tolist(), greedy.tolist(), strict=True)
            answers[id(request)] = {setting: (value, top) for setting, value, top in each}
    if requests := suite.requests("loglikelihood_rolling"):
        for request, logp in zip(requests, lm.loglikelihood_rolling(requests, disable_tqdm=True), strict=True):
            answers[id(request)] = dict(zip(lab.settings, logp.tolist(), strict=True))
    if requests := suite.requests("generate_until"):
        texts = lab.generate(requests, writing)
        for number, request in enumerate(requests):
            answers[id(request)] = {setting: texts[setting][number] for setting in writing}
    return answers


def _figures(suite: Suite, answers: Answers, settings: Sequence[Setting], seed: int) -> list[dict[str, Any]]:
    """`Bench.tasks`: each task's, and of these each group's."""
    measured: dict[str, dict[str, Any]] = {}  # task → metric → (value, draws)
    entries: dict[str, dict[str, Any]] = {}
    under: dict[str, list[Setting]] = {}
    for number, (name, task) in enumerate(suite.tasks.items()):
        under[name] = [each for each in settings if all(each in answers[id(request)] for request in task.instances)]
        made_of = [suite.items(name, lambda request, each=each: answers[id(request)][each]) for each in under[name]]
        measured[name] = {
            metric: suite.score(name, metric, [items[metric] for items in made_of], seed + number)
            for metric in made_of[0] if metric != "bypass"
        }  # fmt: skip
        entries[name] = {"group": False, "items": len({request.doc_id for request in task.instances})}
    for name, group in suite.groups.items():
        members = [task.task_name for task in group.get_all_tasks()]
        under[name] = [each for each in settings if all(each in under[member] for member in members)]
        columns = {member: [under[member].index(each) for each in under[name]] for member in members}
        entries[name] = {"group": True, "items": sum(entries[member]["items"] for member in members)}
        measured[name] = {}
        for metric in dict.fromkeys(metric for member in members for metric in measured[member]):
            having = [member for member in members if metric in measured[member]]
            parts = [
                {m: (measured[m][metric][n][..., columns[m]], entries[m]["items"]) for m in having} for n in (0, 1)
            ]
            if (value := suite.group_score(name, metric, parts[0])) is not None:
                same = len({draws.shape for draws, _ in parts[1].values()}) == 1
                draws = suite.group_score(name, metric, parts[1]) if same else np.empty((0, len(value)))
                measured[name][metric] = value, draws
    found = []
    for name in [*suite.groups, *suite.tasks]:
        if not measured[name]:  # a group that has no score of its own
            continue
        metrics = [
            curve(metric, under[name], value, draws, suite.higher_is_better(name, metric))
            for metric, (value, draws) in measured[name].items()
        ]
        fewshot = None if entries[name]["group"] else suite.tasks[name].get_config("num_fewshot")
        part_of = suite.part_of.get(name)
        entry = {"task": name, **entries[name], "part_of": part_of if part_of and measured.get(part_of) else None}
        found.append(entry | {"fewshot": fewshot, "metric": headline([*measured[name]]), "metrics": metrics})
    return found
