"""The models of one comparison, and each step that needs them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..decoding.load import load_model
from ..errors import DeraError, warn
from ..lambdas import Lam
from ..merging.path import Course
from ..merging.storage import Storage
from ..models.pair import Pair
from ..processes import gathered
from ..progress import Progress
from ..statistics.prediction import PROBES
from ..texts.batches import Batches
from ..texts.offload import counted_passes
from ..texts.prompts import Prompt
from ..texts.samplers import Sampler
from . import attribution, yardstick
from .divergence import divergences
from .in_step import wide_trace
from .laboratory import Compute, Laboratory
from .ledger import Ledger
from .precision import available
from .traces import Text, Trace, tokens_of, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALONE = 4  # texts that the reference reads once more, each alone
ROOM = 8  # tokens of padding
Approximations = dict[Lam, tuple[Path, dict[str, Any]]]  # λ → a merged directory, and its recipe


@dataclass(frozen=True)
class Measured:
    """What is compared with exact DeRa, and on which texts.

    Attributes:
        prompts: with a completion each, or without any.
        samples: texts for each prompt, where they are sampled.
        max_new_tokens: their length, in tokens.
        storage: how the merged model is stored.
        approximations: merged directories that are measured in its place.
    """

    prompts: list[Prompt]
    samples: int
    max_new_tokens: int
    storage: Storage
    approximations: Approximations = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """Texts to score, and the λ at which to compare on them.

    Attributes:
        label: begins the names of its steps in the ledger.
        line: compare θ_ref + λΔ, not rounded, alone; else all that `ComparisonLab.measured` names.
    """

    lams: Sequence[Lam]
    texts: list[Text]
    label: str = ""
    line: bool = False

    def step(self, lam: Lam) -> str:
        """The step of the ledger that keeps the figures at λ."""
        return f"{self.label}tokens-{lam:g}"


class ComparisonLab(Laboratory):
    """Each step of a comparison: read back from the ledger where it is done already.

    Args:
        pair, compute, path, seed, tell: as for `Laboratory`.
        what: what is measured, and on which texts.
        rounds: whether storing rounds, so that kl has two parts.
        ledger: of finished steps.
    """

    most_heads = 1 << 30  # bytes of merged models' heads that are held at a time, or one λ's

    def __init__(
        self, pair: Pair, compute: Compute, path: Course | None, seed: int, tell: Progress | None, what: Measured,
        rounds: bool, ledger: Ledger,
    ) -> None:  # fmt: skip
        super().__init__(pair, compute, path, seed, tell)
        self.what, self.rounds, self.ledger = what, rounds, ledger
        self.prompts, self.approximations = what.prompts, what.approximations
        self._sampled: dict[tuple[str, Lam], list[Text]] = {}

    def stored(self, lam: Lam) -> PreTrainedModel:
        """The model to measure at λ."""
        if lam in self.approximations:
            return load_model(self.approximations[lam][0], self.compute.dtype, self.compute.device)
        storage = self.what.storage
        dtype = "auto" if storage.dtype is None else storage.dtype
        return self.merged(lam, dtype=dtype, rounding=storage.rounding, seed=storage.seed)

    def line(self, lam: Lam) -> PreTrainedModel:
        """θ_ref + λΔ, not rounded, whatever path is measured."""
        return self.merged(lam, path=None)

    def knows_path(self, lam: Lam) -> bool:
        """Whether what is measured lies on `path`, or on the line, so that rounding can be told apart."""
        if self.compute.narrow:  # no model is held without rounding
            return False
        return lam not in self.approximations or self.approximations[lam][1].get("path", "line") == "line"

    @property
    def merged_sampler(self) -> Sampler:
        """Writes the texts of the model that is measured."""
        return self.sampler(self.stored)

    # Texts

    def given(self) -> list[Text]:
        """The prompts with their completions."""
        return [Text.of(i, p, p.completion or []) for i, p in enumerate(self.prompts)]

    def sampled(self, whose: str, lam: Lam) -> list[Text]:
        """Texts of exact DeRa or of the merged model, with noise that depends on (seed, prompt, sample) only."""
        if (whose, lam) not in self._sampled:
            self.sample(whose, [lam])
        return self._sampled[whose, lam]

    def sample(self, whose: str, lams: Sequence[Lam]) -> None:
        """Sample what `sampled` will be asked for: λ after λ, or, where each pass reads all weights anew, together."""
        streams = [(i, s) for i in range(len(self.prompts)) for s in range(self.what.samples)]
        keys = {lam: f"texts-{whose}-{lam:g}" for lam in lams}
        missing = [lam for lam in keys if not self.ledger.has(keys[lam])]
        together = self.compute.offload and whose == "exact" and self.engine is None
        found: dict[Lam, dict[str, np.ndarray]] = {}
        for asked in [missing] if together and missing else [[lam] for lam in missing]:
            drawn = self._sample(whose, asked, streams, together)
            for lam in asked:
                rows = [drawn[lam, stream] for stream in streams]
                found[lam] = {"tokens": np.concatenate([np.array(row, dtype=np.int64) for row in rows]),
                              "lengths": np.array([len(row) for row in rows])}  # fmt: skip
                self.ledger.keep(keys[lam], found[lam])
        if together:
            self.let_go()  # what is read next is read from the files
        for lam, key in keys.items():
            arrays = found[lam] if lam in found else self.ledger.recall(key)
            rows = np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1])
            texts = zip(streams, rows, strict=True)
            self._sampled[whose, lam] = [Text.of(i, self.prompts[i], row.tolist()) for (i, _), row in texts]

    def _sample(
        self, whose: str, lams: Sequence[Lam], streams: Sequence[tuple[int, int]], together: bool
    ) -> dict[tuple[Lam, tuple[int, int]], list[int]]:
        """New tokens for each λ and stream, a prompt and its sample's number, made by all processes."""
        share = [(lam, stream) for lam in lams for stream in self.share(streams)]
        prompts = [self.prompts[i] for _, (i, _) in share]
        at = f" at λ={lams[0]:g}" if len(lams) == 1 else f" at {len(lams)} λ"
        title = f"sampling from {'exact DeRa' if whose == 'exact' else 'the merged model'}{at}"
        new_tokens = self.what.max_new_tokens
        sampler = self.exact_sampler if whose == "exact" else self.merged_sampler
        with ExitStack() as stack:
            tell: Callable[[int], None] | None = lambda done: self.tell(title, done, len(share))  # noqa: E731
            if together:
                longest = max(len(prompt.ids) for prompt in prompts) + new_tokens
                free = self.compute.room or available(self.compute.device)
                size = self.compute.batches.sampled(self.exact, longest, len(self.pair.sides), free)
                sampler, tell = replace(sampler, batches=Batches(size)), None  # what is told are passes
                counted = counted_passes(
                    self.exact, self.pair, len(share), math.ceil(len(share) / size), new_tokens,
                    lambda done, passes: self.tell(title, done, passes),
                )  # fmt: skip
                stack.enter_context(counted)
            new = sampler.sample(
                prompts, [lam for lam, _ in share], [i + s * len(self.prompts) for _, (i, s) in share],
                max_new_tokens=new_tokens, progress=tell,
            )  # fmt: skip
        return dict(gathered(list(zip(share, new, strict=True))))

    # Figures of each token

    def measured(self, lam: Lam) -> Iterator[tuple[str, PreTrainedModel]]:
        """Each model to compare at λ, after the name of its kl: as stored, not rounded, and on the straight line."""
        stored = self.rounds or lam in self.approximations
        if stored:
            yield "kl", self.stored(lam)
        if self.knows_path(lam) or not stored:
            yield "kl_nonlinearity" if stored else "kl", self.merged(lam)
        if self.path is not None:
            yield "kl_line", self.line(lam)

    def measure(self, readings: Sequence[Reading]) -> list[dict[Lam, dict[str, np.ndarray]]]:
        """Of each reading, per-token figures at its λ, and `resolution` (1,).

        The reference and each aligned model read all texts before a merged model is made: of what is held at a time,
        one or two are whole models, and of the others there are hidden states and heads.

        Raises:
            DeraError: there are fewer texts than processes.
        """
        missing = [
            replace(reading, lams=[lam for lam in reading.lams if not self.ledger.has(reading.step(lam))])
            for reading in readings
        ]
        wanted = [reading for reading in missing if reading.lams]
        if few := [len(reading.texts) for reading in wanted if len(reading.texts) < self.processes]:
            raise DeraError(f"{few[0]} texts are fewer than the {self.processes} processes; start fewer")
        fresh = self._measure(wanted) if wanted else {}
        keys = [{lam: reading.step(lam) for lam in reading.lams} for reading in readings]
        return [
            {lam: fresh[key] if key in fresh else self.ledger.recall(key) for lam, key in row.items()} for row in keys
        ]

    def _measure(self, readings: Sequence[Reading]) -> dict[str, dict[str, np.ndarray]]:
        """What `measure` finds, by step of the ledger: each process reads its share, and gets all figures."""
        chosen = [list(self.share(reading.texts)) for reading in readings]
        passes = 1 + (self.rounds or bool(self.approximations)) + (self.path is not None)
        steps = sum(len(self.pair.sides) + len(each.lams) * (1 if each.line else passes) for each in readings)
        done = itertools.count(1)

        def read(model: PreTrainedModel, texts: list[Text], heads: list[torch.nn.ModuleDict]) -> Trace:
            trace = trace_of(model, texts, heads, self.compute.batches)
            self.tell("scoring", next(done), steps)
            return trace

        resolutions: list[float] = []
        own: list[torch.nn.ModuleDict] = []  # the sides' heads; an adapter mostly leaves them alone, and all have one

        def read_all(side: PreTrainedModel) -> list[Trace]:
            traces = [read(side, texts, own) for texts in chosen]
            if not resolutions:  # it is the reference
                for trace, texts in zip(traces, chosen, strict=True):
                    alone = [
                        trace_of(side, [text], room=ROOM * (trace.one_by_one or bool(text.shown))).hidden
                        for text in texts[:ALONE]
                    ]
                    others = [Trace(torch.cat(alone), trace.head)]
                    seen = any(text.shown for text in texts[:ALONE])
                    if self.compute.narrow and not seen:  # 16 bits are noise of their own, the same in every batch
                        try:
                            others.append(wide_trace(self.pair, texts[:ALONE], self.compute.device))
                        except DeraError as error:
                            warn(f"the resolution is without the noise of 16 bits: {error}")
                    resolutions.append(max(resolution_of(trace, other) for other in others))
            return traces

        sides = list(zip(*self.of_each_side(read_all), strict=True))
        self.let_go()

        def at(number: int, lam: Lam, heads: list[torch.nn.ModuleDict]) -> dict[str, Trace]:
            models = [("kl", self.line(lam))] if readings[number].line else self.measured(lam)
            return {name: read(model, chosen[number], heads) for name, model in models}

        return self.compared(readings, chosen, sides, resolutions, own, at)

    def compared(
        self, readings: Sequence[Reading], chosen: Sequence[list[Text]], sides: Sequence[Sequence[Trace]],
        resolutions: Sequence[float], own: list[torch.nn.ModuleDict],
        at: Callable[[int, Lam, list[torch.nn.ModuleDict]], dict[str, Trace]],
    ) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
        """Figures of each reading at each of its λ, by step of the ledger, which keeps them.

        Args:
            chosen: this process's texts of each reading.
            sides: traces of the reference and each aligned model, of each reading.
            resolutions: of each.
            own: the sides' heads.
            at: (number of a reading, λ, heads that may be used again) → what is compared there.
        """
        found: dict[str, dict[str, np.ndarray]] = {}
        for number, (reading, texts) in enumerate(zip(readings, chosen, strict=True)):
            heads = list(own)  # turning λ may change the head, so traces keep the one they had
            traces: list[tuple[Lam, dict[str, Trace]]] = []
            for lam in reading.lams:
                traces.append((lam, at(number, lam, heads)))
                if lam != reading.lams[-1] and _bytes(heads[len(own) :]) < self.most_heads:
                    continue
                for done, figures in self._figures(sides[number], traces, texts, resolutions[number]).items():
                    found[reading.step(done)] = figures
                    self.ledger.keep(reading.step(done), figures)
                heads, traces = list(own), []
        return found

    def _figures(
        self, exact: Sequence[Trace], traces: Sequence[tuple[Lam, dict[str, Trace]]], texts: list[Text],
        resolution: float,
    ) -> dict[Lam, dict[str, np.ndarray]]:  # fmt: skip
        """Per-token figures of all processes' texts at some λ, and the resolution, from the traces of this one's."""
        per_token = divergences(exact, traces, tokens_of(texts), self.pair.vocab_size)
        sizes = np.cumsum([len(text.completion) for text in texts])[:-1]
        rows = {lam: {key: np.split(values, sizes) for key, values in row.items()} for lam, row in per_token.items()}
        # Of n processes each read every n-th text.
        every = gathered([(self.process + n * self.processes,
                           {lam: {k: v[n] for k, v in row.items()} for lam, row in rows.items()}, resolution)
                          for n in range(len(texts))])  # fmt: skip
        every.sort(key=lambda entry: entry[0])
        worst = np.array([max(entry[2] for entry in every)])
        return {
            lam: {key: np.concatenate([entry[1][lam][key] for entry in every]) for key in row} | {"resolution": worst}
            for lam, row in rows.items()
        }

    # Scales and sources of the error, on the texts of a few prompts

    def _pooled(self, few: dict[Lam, list[Text]]) -> tuple[list[Text], dict[Lam, slice]]:
        """The texts of all λ in one list, given texts once, and which tokens of it belong to each λ."""
        distinct: dict[int, slice] = {}
        texts: list[Text] = []
        places, start = {}, 0
        for lam, chosen in few.items():
            if id(chosen[0]) not in distinct:
                size = sum(len(text.completion) for text in chosen)
                distinct[id(chosen[0])] = slice(start, start + size)
                texts += chosen
                start += size
            places[lam] = distinct[id(chosen[0])]
        return texts, places

    def floor(self, few: dict[Lam, list[Text]]) -> dict[Lam, float]:
        """What bfloat16 alone costs exact DeRa at each λ, nats per token."""
        texts, places = self._pooled(few)
        count = itertools.count(1)

        def work() -> dict[str, np.ndarray]:
            self.let_go()
            tell = lambda: self.tell("measuring bfloat16", next(count), 2 * len(self.pair.sides))  # noqa: E731
            kl = yardstick.noise_floor(self.pair, texts, list(few), self.compute.device, tell)
            return {f"{lam:g}": values for lam, values in kl.items()}

        kl_of = self.ledger.step("floor", work)
        return {lam: float(kl_of[f"{lam:g}"][places[lam]].mean()) for lam in few}

    def ladder(self, few: dict[Lam, list[Text]]) -> dict[int, dict[Lam, float]]:
        """What quantisation costs exact DeRa: bits → λ → nats per token."""
        texts, places = self._pooled(few)
        count = itertools.count(1)

        def work() -> dict[str, np.ndarray]:
            self.let_go()
            steps = len(self.pair.sides) * (len(yardstick.BITS) + 1)
            tell = lambda: self.tell("quantising", next(count), steps)  # noqa: E731
            rungs = yardstick.ladder(self.pair, texts, list(few), self.compute.device, tell)
            return {f"{bits} {lam:g}": values for bits, row in rungs.items() for lam, values in row.items()}

        kl_of = self.ledger.step("ladder", work)
        return {
            bits: {lam: float(kl_of[f"{bits} {lam:g}"][places[lam]].mean()) for lam in few} for bits in yardstick.BITS
        }

    def probes(self, lams: Sequence[float]) -> list[float]:
        """Where the merge is measured to predict the rest of the range."""
        return [*PROBES, *([max(lams)] if max(lams) > 1 else [])]

    def layers(self, texts: list[Text], lam: float) -> dict[str, Any]:
        """Where the error at λ comes from: shares by tensor, by layer and by kind, and the features' gap by layer."""

        def work() -> dict[str, np.ndarray]:
            self.let_go()
            title = f"looking into the layers at λ={lam:g}"
            device, tell = self.compute.device, lambda done, total: self.tell(title, done, total)
            shares = attribution.attribute(self.pair, texts, lam, device, tell)
            ref, aligned = self.of_each_side(lambda side: attribution.features(side, texts))
            gaps = attribution.feature_gaps(ref, aligned, attribution.features(self.line(lam), texts), lam)
            return {"names": np.array(list(shares)), "shares": np.array(list(shares.values())), "gaps": np.array(gaps)}

        arrays = self.ledger.step(f"layers-{lam:g}", work)
        shares = dict(zip(arrays["names"].tolist(), arrays["shares"].tolist(), strict=True))
        return attribution.by_layer(shares, arrays["gaps"].tolist())


def _bytes(modules: Sequence[torch.nn.Module]) -> int:
    """How much the parameters of these modules hold."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


@torch.no_grad()
def resolution_of(trace: Trace, other: Trace) -> float:
    """The largest kl that the reference shows against itself, read in another way: noise, in nats.

    Args:
        trace: the reference's.
        other: of the first texts, read in batches of another shape, or in float32.
    """
    batched = trace.hidden[: len(other.hidden)]
    worst = 0.0
    for together, apart in zip(batched.split(16), other.hidden.split(16), strict=True):
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (trace.head(together), other.head(apart)))
        worst = max(worst, float((p.exp() * (p - q)).sum(-1).abs().max()))
    return max(worst, 1e-12)
