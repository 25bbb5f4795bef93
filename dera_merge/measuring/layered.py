"""A comparison of models that are larger than the memory: all pass a layer together, which is read once for all λ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import DeraError
from ..lambdas import Lam
from ..merging.hollow import hollow
from ..merging.parameters import Parameters
from ..merging.storage import Storage
from .in_step import InStep
from .steps import ALONE, ComparisonLab, Reading, resolution_of
from .traces import Text, Trace, first_logits, head_of, is_head, longest_first, plain_inputs, states_of
from .unmerged import unmerged


class LayeredLab(ComparisonLab):
    """`ComparisonLab` for given texts, without any whole model: held are one unit's weights, heads, and hidden states.

    Low-rank sums of an adapter's side are computed as in PEFT's forward, which `ComparisonLab` runs; any other adapter
    is in the side's weights.
    """

    most_heads = 1  # those of one λ, where λ changes them at all

    def _weights_at(self, lam: Lam, line: bool) -> dict[str, Parameters]:
        """As `measured`: what to compare at λ, after the name of its kl."""
        plain = Storage.of(self.pair.names, torch.float32, None, 0)
        if line:
            return {"kl": Parameters(self.pair, lam, plain)}
        found = {"kl": Parameters(self.pair, lam, self.what.storage, self.path)} if self.rounds else {}
        if self.knows_path(lam) or not found:
            found["kl_nonlinearity" if found else "kl"] = Parameters(self.pair, lam, plain, self.path)
        if self.path is not None:
            found["kl_line"] = Parameters(self.pair, lam, plain)
        return found

    def _measure(self, readings: Sequence[Reading]) -> dict[str, dict[str, np.ndarray]]:
        chosen = [list(self.share(reading.texts)) for reading in readings]
        dtype = self.compute.dtype
        model = hollow(self.pair, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        sides = [unmerged(self.pair, number, model) for number in range(len(self.pair.sides))]
        weights = [side for side, _ in sides]
        merges: dict[tuple[int, Lam, str], int] = {}
        for number, reading in enumerate(readings):
            for lam in reading.lams:
                for name, own in self._weights_at(lam, reading.line).items():
                    merges[number, lam, name] = len(weights)
                    weights.append(own)
        with InStep(model, weights, self.compute.device, dict(enumerate(sums for _, sums in sides))) as in_step:
            return self._in_step(in_step, readings, chosen, merges)

    def _in_step(
        self, in_step: InStep, readings: Sequence[Reading], chosen: Sequence[list[Text]],
        merges: dict[tuple[int, Lam, str], int],
    ) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
        """As `measured`.

        Args:
            in_step: the sides, and then what is compared with them.
            chosen: this process's texts of each reading.
            merges: of a reading: λ, name → the number of the model in `in_step`.
        """
        model, device, count = in_step.model, in_step.device, len(self.pair.sides)

        # Which texts each model reads: (its number, the number of the reading, the texts of a batch).
        tasks = [(side, number, batch) for side in range(count) for number, texts in enumerate(chosen)
                 for batch in self._batches(model, texts)]  # fmt: skip
        tasks += [(own, number, batch) for (number, _, _), own in merges.items()
                  for batch in self._batches(model, chosen[number])]  # fmt: skip
        alone = [(number, text) for number, texts in enumerate(chosen) for text in range(min(ALONE, len(texts)))]
        done, steps = itertools.count(1), len(tasks) + len(alone) + 1

        def of_batch(number: int, batch: Sequence[int]) -> tuple[torch.Tensor, ...]:
            texts = [chosen[number][i] for i in batch]
            states = states_of(in_step.decoder, texts, plain_inputs(texts, device))
            self.tell("scoring layer by layer", next(done), steps)
            return states

        work = [(own, lambda number=number, batch=batch: of_batch(number, batch)) for own, number, batch in tasks]
        work += [(0, lambda number=number, text=text: of_batch(number, [text])[0]) for number, text in alone]
        first = chosen[0][0]
        begun = replace(first, ids=first.ids[: first.start + 1])
        work += [(0, lambda: first_logits(model, first, 1, plain_inputs([begun], device)))]
        *results, whole = in_step.run(work)
        hidden: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        for (own, number, batch), states in zip(tasks, results, strict=False):
            hidden.setdefault((own, number), {}).update(zip(batch, states, strict=True))
        apart: dict[int, list[torch.Tensor]] = {}
        for (number, _), states in zip(alone, results[len(tasks) :], strict=True):
            apart.setdefault(number, []).append(states)
        del results

        def trace(own: int, number: int, heads: list[torch.nn.ModuleDict]) -> Trace:
            states = hidden[own, number]
            with in_step.with_head(own):
                head = head_of(model, heads)
            known = self.pair.ref.vocabulary_rows if own == 0 and self.pair.brings_tokens else None
            return Trace(torch.cat([states[i] for i in range(len(states))]), head, known)

        kept: list[torch.nn.ModuleDict] = []
        traces = [[trace(side, number, kept) for side in range(count)] for number in range(len(readings))]
        with torch.no_grad():
            if not is_head(model, traces[0][0].head, whole, traces[0][0].hidden):
                raise DeraError(f"{type(model).__name__} is not a decoder followed by a head, so it cannot be compared "
                                "layer by layer")  # fmt: skip
        others = [Trace(torch.cat(apart[number]), sides[0].head) for number, sides in enumerate(traces)]
        resolutions = [resolution_of(sides[0], other) for sides, other in zip(traces, others, strict=True)]

        def at(number: int, lam: Lam, heads: list[torch.nn.ModuleDict]) -> dict[str, Trace]:
            here = [(name, own) for (which, there, name), own in merges.items() if (which, there) == (number, lam)]
            return {name: trace(own, number, heads) for name, own in here}

        return self.compared(readings, chosen, traces, resolutions, kept, at)

    def _batches(self, model: torch.nn.Module, texts: Sequence[Text]) -> list[list[int]]:
        """As `trace_of` takes texts."""
        left, found = longest_first(texts), []
        while left:
            count = self.compute.batches.read(model, len(texts[left[0]].ids))
            found.append(left[:count])
            left = left[count:]
        return found
