"""The texts of a sweep: sampled, scored, and read by both models."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .. import lambdas
from ..errors import DeraError
from ..lambdas import Lam
from ..measuring.divergence import densities, gram
from ..measuring.laboratory import Compute, Laboratory
from ..measuring.traces import Text, Trace, per_text, tokens_of, trace_of
from ..merging.path import Course
from ..models.pair import Pair
from ..processes import gathered
from ..progress import Progress
from ..statistics.summary import log_ratio
from ..texts.exchanges import Exchange, in_words
from ..texts.prompts import Prompt
from ..texts.rewards import Reward
from ..texts.samplers import DraftedSampler, Sampler
from .answers import Answer, Asked, Kind, Store

OFFSETS = 9973  # streams of noise that λ may have of its own
TELLING = 8  # texts of a later batch that cannot all be at fault
KEPT = 1 << 30  # bytes of hidden states that are kept, so that texts need not be read again at another λ


class SweepLab(Laboratory):
    """The models of one sweep, its texts with their rewards, and what exact DeRa makes of each.

    Args:
        pair, compute, path, seed, tell: as for `Laboratory`.
        asked: what is sampled.
        store: keeps the texts.

    Attributes:
        kind: whose texts answer the question.
    """

    def __init__(
        self,
        pair: Pair,
        compute: Compute,
        path: Course | None,
        seed: int,
        tell: Progress | None,
        asked: Asked,
        store: Store,
    ) -> None:
        super().__init__(pair, compute, path, seed, tell)
        self.asked, self.store = asked, store
        self.prompts: list[Prompt] = asked.prompts
        self.rewards: list[Reward] = asked.rewards
        self.kind: Kind = "merged" if asked.mode == "merged" else "exact"
        self.rivals: dict[int, str] = {}  # the aligned model's own answer to each prompt, where a judge wants it
        # Of each of exact DeRa's texts, log π_λ and KL from the reference, in nats: λ → number.
        self._known: dict[int, dict[Lam, tuple[float, float]]] = defaultdict(dict)
        # Of each text that this process read, what each model made of it; and the models' heads.
        self._states: dict[int, list[torch.Tensor]] = {}
        self._heads: list[Trace] = []
        self._kls: dict[Lam, np.ndarray] = {}  # KL of the merged model from the reference on its own texts
        # Of all texts that were read with several aligned models: `gram` times tokens, and tokens.
        self._gram: tuple[Any, int] = (0.0, 0)

    # Texts

    @property
    def exact_sampler(self) -> Sampler:
        """Writes exact DeRa's texts, with the merged model drafting where that was asked for."""
        if self.asked.mode != "speculative":
            return super().exact_sampler
        draft = self.merged
        if self.exact.rows is not None and self.path is None:  # an adapter pair drafts with the weights that it has
            dial = self.exact.dial()
            draft = lambda lam: dial  # noqa: E731
        return DraftedSampler(self.exact, draft, self.pair.tokenizer, self.seed)

    def sample(self, mode: Kind, lams: Sequence[Lam]) -> None:
        """Sample the texts at each λ that are missing; exact DeRa's share batches, whatever their λ."""
        sampled = {(a.mode, a.lam, a.prompt, a.sample) for a in self.store.answers}
        tasks = [
            (lam, prompt, number) for lam in lams for prompt in range(len(self.prompts))
            for number in range(self.asked.samples) if (mode, lam, prompt, number) not in sampled
        ]  # fmt: skip
        sampler = self.exact_sampler if mode == "exact" else self.merged_sampler
        if mode == "exact" and self.asked.mode != "speculative":
            groups = [sorted(tasks, key=lambda task: len(self.prompts[task[1]].ids))]
        else:  # one λ at a time
            ordered = sorted(tasks, key=lambda task: (task[0], len(self.prompts[task[1]].ids)))
            groups = [
                [task for task in ordered if task[0] == lam] for lam in dict.fromkeys(task[0] for task in ordered)
            ]
        done, together = 0, sampler.at_once * self.processes
        for batch in (group[start : start + together] for group in groups for start in range(0, len(group), together)):
            share = self.share(batch)
            fresh = gathered(self._answers(mode, sampler, share) if share else [])
            place = {task: number for number, task in enumerate(batch)}
            self.store.add(sorted(fresh, key=lambda a: place[a.lam, a.prompt, a.sample]))
            done += len(batch)
            self.tell(f"sampling from {'exact DeRa' if mode == 'exact' else 'the merged model'}", done, len(tasks))

    def sample_rivals(self) -> None:
        """Let the aligned model answer each prompt once by itself, where a judge compares with that."""
        there = {a.prompt for a in self.store.answers if a.mode == "rival"}
        wanted = range(len(self.prompts)) if any(reward.compares for reward in self.rewards) else ()
        missing = sorted(set(wanted) - there, key=lambda p: len(self.prompts[p].ids))
        sampler, aligned = self.merged_sampler if self.kind == "merged" else self.exact_sampler, self.pair.ends()[1]
        together = sampler.at_once * self.processes
        for start in range(0, len(missing), together):
            share, fresh = self.share(missing[start : start + together]), []
            if share:
                streams = [p + len(self.prompts) * self.asked.samples * OFFSETS for p in share]  # no other text's
                new, texts = self._written(sampler, share, [aligned] * len(share), streams)
                fresh = [Answer("rival", aligned, p, 0, *both, {}) for p, *both in zip(share, new, texts, strict=True)]
            self.store.add(sorted(gathered(fresh), key=lambda a: a.prompt))
            self.tell("sampling what judges compare with", start, len(missing))
        self.rivals |= {a.prompt: a.text for a in self.store.answers if a.mode == "rival"}

    def _answers(self, mode: Kind, sampler: Sampler, batch: Sequence[tuple[Lam, int, int]]) -> list[Answer]:
        """An answer for each (λ, prompt, sample), with its rewards."""
        # Both modes have the same noise: their texts part only where distributions do. So have all λ, unless texts of
        # several λ are pooled: then each λ has noise of its own, so that its texts say something new.
        pooled = self.asked.reweight
        offsets = {lam: zlib.crc32(lambdas.name(lam).encode()) % OFFSETS if pooled else 0 for lam, _, _ in batch}
        streams = [p + len(self.prompts) * (n + self.asked.samples * offsets[lam]) for lam, p, n in batch]
        new, texts = self._written(sampler, [p for _, p, _ in batch], [lam for lam, _, _ in batch], streams)
        rows = self._scored([
            self._exchange(p, text, ids) for (_, p, _), text, ids in zip(batch, texts, new, strict=True)
        ])  # fmt: skip
        return [Answer(mode, lam, p, n, ids, text, row)
                for (lam, p, n), ids, text, row in zip(batch, new, texts, rows, strict=True)]  # fmt: skip

    def _written(
        self, sampler: Sampler, prompts: Sequence[int], lams: Sequence[Lam], streams: Sequence[int]
    ) -> tuple[list[list[int]], list[str]]:
        """A text to each of these prompts: its tokens, and what they say."""
        asked = [self.prompts[p] for p in prompts]
        new = sampler.sample(asked, lams, streams, max_new_tokens=self.asked.max_new_tokens)
        return new, [self.pair.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def _exchange(self, prompt: int, text: str, ids: list[int]) -> Exchange:
        """An answer to a prompt, as rewards see it."""
        return Exchange(self.prompts[prompt].asked, text, self.prompts[prompt].columns, ids, self.rivals.get(prompt))

    def _scored(self, texts: list[Exchange]) -> list[dict[str, float | None]]:
        """The rewards of each text. Raises DeraError where one fails on a whole batch."""
        rows: list[dict[str, float | None]] = [{} for _ in texts]
        for reward in self.rewards:
            for row, value in zip(rows, self._values(reward, texts), strict=True):
                row[reward.name] = value
        return rows

    def _values(self, reward: Reward, texts: list[Exchange]) -> list[float | None]:
        values = reward.score(texts)
        # One text may be at fault, a whole batch is not.
        whole = not self.store.answers or len(texts) >= TELLING
        if whole and all(value is None for value in values) and (why := reward.why_not(texts[0])):
            kept = "; the texts before are kept: mend it and go on with --resume" if self.store.answers else ""
            raise DeraError(f"the reward {reward.name} fails on every text: {why}{kept}")
        return values

    def take(self, scored: Sequence[dict[str, Any]]) -> None:
        """Store texts of `read_scored`, with rewards that they lack worked out. Raises DeraError where one is unfit."""
        places = self._places()
        answers: list[Answer] = []
        counts: dict[tuple[Lam, int], int] = {}
        for number, entry in enumerate(scored, 1):
            asked = entry["prompt"] if "prompt" in entry else in_words(entry["messages"])
            prompt = asked if isinstance(asked, int) else places.get(asked)
            if prompt is None or not 0 <= prompt < len(self.prompts):
                raise DeraError(
                    f"scored text {number} answers a prompt that is not among the {len(self.prompts)} given"
                )
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
        there = {(a.lam, a.prompt, a.sample) for a in self.store.answers}
        answers = [a for a in answers if (a.lam, a.prompt, a.sample) not in there]
        aligned = self.pair.ends()[1]
        self.rivals |= {a.prompt: a.text for a in answers if a.lam == aligned and a.sample == 0}
        for reward in self.rewards:
            lacking = [a for a in answers if reward.name not in a.rewards]
            values = (
                self._values(reward, [self._exchange(a.prompt, a.text, a.ids) for a in lacking]) if lacking else []
            )
            for answer, value in zip(lacking, values, strict=True):
                answer.rewards[reward.name] = value
        self.store.add(answers)

    def _places(self) -> dict[str, int]:
        """Which prompt a text is: a prompt in words, or the last turn of one conversation alone."""
        last = [in_words(p.asked if isinstance(p.asked, str) else p.asked[-1:]) for p in self.prompts]
        alone = {text: number for number, text in enumerate(last) if last.count(text) == 1}
        return alone | {text: number for number, text in enumerate(self.asked.plain)}

    def _place(self, lam: Lam, number: int) -> Lam:
        """The λ of scored text `number`; 0 and 1 of several aligned models are the reference and the first of them."""
        if self.pair.models > 1 and lam in lambdas.ends():
            return self.pair.ends()[int(lam)]
        try:
            return self.pair.known([lam])[0]
        except (TypeError, ValueError) as error:
            raise DeraError(f"scored text {number}: {error}") from None

    def _tokens(self, completion: str) -> list[int]:
        """A text as tokens, with an end token if it is shorter than `max_new_tokens`."""
        ids, end = (
            self.pair.tokenizer(completion, add_special_tokens=False)["input_ids"],
            self.pair.tokenizer.eos_token_id,
        )
        return ids if end is None or len(ids) >= self.asked.max_new_tokens else [*ids, end]

    # What the models make of them

    def texts(self, answers: Sequence[Answer]) -> list[Text]:
        """Answers after their prompts, to be read by a model."""
        return [Text.of(a.prompt, self.prompts[a.prompt], a.ids) for a in answers]

    def densities(self, lams: Sequence[Lam]) -> tuple[list[Answer], np.ndarray, np.ndarray]:
        """The texts that answer, and log π_λ and KL from the reference of each at each λ, (texts, λ) in nats."""
        answers = [a for a in self.store.answers if a.mode == self.kind]
        if self.kind == "merged":
            return answers, *self._own_densities(answers, lams)
        lacking: dict[tuple[Lam, ...], list[int]] = defaultdict(list)
        for i in range(len(answers)):
            if lack := tuple(lam for lam in lams if lam not in self._known[i]):
                lacking[lack].append(i)
        for lack, fresh in lacking.items():
            share = self.share(fresh)
            rows = self._read(share, answers, lack) if share else []
            for i, row in gathered(list(zip(share, rows, strict=True))):
                self._known[i] |= row
        figures = np.array([[self._known[i][lam] for lam in lams] for i in range(len(answers))])
        return answers, figures[..., 0], figures[..., 1]

    def _own_densities(self, answers: Sequence[Answer], lams: Sequence[Lam]) -> tuple[np.ndarray, np.ndarray]:
        """KL from the reference of the merged model's texts, at the λ of each; they say nothing of other λ."""
        kl, column = np.zeros((len(answers), len(lams))), {lam: number for number, lam in enumerate(lams)}
        for lam in sorted({a.lam for a in answers}):
            kl[[a.lam == lam for a in answers], column[lam]] = self.merged_kl(lam)
        return np.zeros_like(kl), kl

    def _read(
        self, share: Sequence[int], answers: Sequence[Answer], lams: Sequence[Lam]
    ) -> list[dict[Lam, tuple[float, float]]]:
        """log π_λ and KL from the reference of some of the texts at each λ; models read those that are new to them."""
        self._make_states([i for i in share if i not in self._states], answers)
        texts = self.texts([answers[i] for i in share])
        traces = [replace(model, hidden=torch.cat([self._states[i][side] for i in share]))
                  for side, model in enumerate(self._heads)]  # fmt: skip
        per_token = densities(traces, tokens_of(texts), lams, self.exact.config.vocab_size)
        logp, kl = (per_text(values, texts) for values in per_token)
        if sum(part.nbytes for parts in self._states.values() for part in parts) > KEPT:
            self._states.clear()
        return [{lam: (logp[row, c], kl[row, c]) for c, lam in enumerate(lams)} for row in range(len(texts))]

    def _make_states(self, fresh: Sequence[int], answers: Sequence[Answer]) -> None:
        """Let both models read these texts."""
        if not fresh:
            return
        texts, traces = self.texts([answers[i] for i in fresh]), []
        for number, model in enumerate(self.exact.sides):
            self.tell("reading the texts", number, len(self.exact.sides))
            traces.append(trace_of(model, texts, batches=self.compute.batches))
        self.tell("reading the texts", len(traces), len(traces))
        if self.pair.models > 1:
            count = len(traces[0].hidden)
            self._gram = (self._gram[0] + count * gram(traces, self.exact.config.vocab_size), self._gram[1] + count)
        sizes = [len(text.completion) for text in texts]
        of_each = zip(*(trace.hidden.split(sizes) for trace in traces), strict=True)
        self._states |= dict(zip(fresh, map(list, of_each), strict=True))
        self._heads = [replace(trace, hidden=trace.hidden[:0]) for trace in traces]

    def let_go(self) -> None:
        """As `Laboratory.let_go`; what the models made of texts goes with their heads."""
        self._states.clear()
        self._heads.clear()
        super().let_go()

    def merged_kl(self, lam: Lam) -> np.ndarray:
        """KL of the merged model from the reference on each of its own texts at λ, nats; (texts,)."""
        if lam not in self._kls:
            fresh = [a for a in self.store.answers if a.mode == "merged" and a.lam not in self._kls]
            texts = {lam: self.texts([a for a in fresh if a.lam == lam]) for lam in sorted({a.lam for a in fresh})}
            few = self.compute.batches
            refs = self.of_ref(lambda ref: [trace_of(ref, own, batches=few) for own in texts.values()])
            for (at, own), ref in zip(texts.items(), refs, strict=True):
                _, kl = densities(
                    [ref, trace_of(self.merged(at), own, batches=few)], tokens_of(own), [1.0], self.pair.vocab_size
                )
                self._kls[at] = per_text(kl[:, 0], own)
        return self._kls[lam]

    def log_ratio(self, lam: Lam) -> dict[str, Any] | None:
        """See `summary.log_ratio`; over the texts of all processes. None where none was read."""
        parts = gathered([self._gram])
        tokens = sum(count for _, count in parts)
        return log_ratio(sum(total for total, _ in parts) / tokens, lam) if tokens else None
