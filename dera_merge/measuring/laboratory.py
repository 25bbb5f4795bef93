"""The models of one measurement, each loaded when it is first asked for, and this process's share of the work.

Comparisons, sweeps and studies of retraining all work with it: the same models, samplers and shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..decoding.exact import DeraForCausalLM
from ..lambdas import Lam
from ..merging.live import live
from ..merging.path import Course
from ..models.pair import Pair
from ..processes import launched
from ..progress import Progress, unheard
from ..texts.samplers import ModelSampler, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Compute:
    """Where and in what models run."""

    device: str | torch.device = "cpu"
    dtype: torch.dtype | str = torch.float32


class Laboratory:
    """The models of one pair.

    Args:
        pair: the reference and its aligned models.
        compute: where and in what they run.
        path: what merged models follow in the place of the straight line.
        seed: of all sampling.
        tell: called as work goes on.

    Attributes:
        process, processes: the number of this process, and how many there are; each does the same with its own share.
        engine: what samples exact DeRa's texts in the place of `exact`, where there is one.
    """

    def __init__(
        self, pair: Pair, compute: Compute, path: Course | None = None, seed: int = 0, tell: Progress | None = None
    ) -> None:
        self.pair, self.compute, self.path, self.seed = pair, compute, path, seed
        self.tell: Progress = tell or unheard
        self.process, self.processes = launched()
        self.engine: Sampler | None = None
        self._turned: dict[str, tuple[Lam | None, Any]] = {}  # models whose λ turns in place, each at its λ

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of `items`: of n processes, each takes every n-th."""
        return items[self.process :: self.processes]

    @cached_property
    def exact(self) -> DeraForCausalLM:
        """Exact DeRa."""
        return DeraForCausalLM.from_pair(self.pair, dtype=self.compute.dtype, device=self.compute.device)

    def merged(self, lam: Lam, what: str = "path", **how: Any) -> PreTrainedModel:
        """A merged model at λ: one for each `what`, turned to λ in place.

        Args:
            what: a name for these `how`, under which the model is kept.
            how: arguments of `live`; default: along the path, not rounded.
        """
        at, model = self._turned.get(what, (None, None))
        if model is None:
            how = {"path": self.path, **how}
            model = live(self.pair, lam, device=self.compute.device, compute_dtype=self.compute.dtype, **how)
        elif at != lam:
            self._turned[what] = (None, model)  # at no λ, should this break off half-way
            model.set_lam(lam)
        self._turned[what] = (lam, model)
        return model

    @property
    def exact_sampler(self) -> Sampler:
        """Writes exact DeRa's texts: the engine, or the model."""
        if self.engine is not None:
            return self.engine
        return ModelSampler(lambda _: self.exact, self.pair.tokenizer, self.seed, self.pair.vocab_size, takes_lam=True)

    @property
    def merged_sampler(self) -> Sampler:
        """Writes the merged model's texts."""
        return ModelSampler(self.merged, self.pair.tokenizer, self.seed, self.pair.vocab_size)
