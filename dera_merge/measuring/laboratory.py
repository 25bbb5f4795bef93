"""The models of one measurement, each loaded when it is first asked for, and this process's share of the work.

Comparisons, sweeps and studies of retraining all work with it: the same models, samplers and shares. Who goes on to
other models lets the ones before go, so that no more are held than one step needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..decoding.exact import DeraForCausalLM
from ..decoding.load import each_side, forget
from ..lambdas import Lam
from ..merging.live import live
from ..merging.path import Course
from ..models.pair import Pair
from ..processes import launched
from ..progress import Progress, unheard
from ..texts.batches import MOST_SAMPLED, SAMPLED, Batches
from ..texts.offload import offloaded_exact
from ..texts.samplers import ModelSampler, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Compute:
    """Where and in what models run, and on how many texts at a time.

    Attributes:
        offload: exact DeRa takes its weights from the files in every pass.
        room: bytes that it may take then; None: what is free.
    """

    device: str | torch.device = "cpu"
    dtype: torch.dtype | str = torch.float32
    batches: Batches = field(default_factory=Batches)
    offload: bool = False
    room: int | None = None

    @property
    def narrow(self) -> bool:
        """Whether models have 16 bits, so that every merge is rounded."""
        return self.dtype in (torch.bfloat16, torch.float16, "bfloat16", "float16")


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
        self._merged: PreTrainedModel | None = None
        self._at: Any = None  # which λ, stored how, it is turned to

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of `items`: of n processes, each takes every n-th."""
        return items[self.process :: self.processes]

    @cached_property
    def exact(self) -> DeraForCausalLM:
        """Exact DeRa."""
        make = offloaded_exact if self.compute.offload else DeraForCausalLM.from_pair
        return make(self.pair, dtype=self.compute.dtype, device=self.compute.device)

    def of_each_side(self, work: Callable[[PreTrainedModel], T]) -> list[T]:
        """What `work` makes of the reference and of each aligned model.

        Where `exact` is not held, they are loaded for this, one after another if they do not share their weights, and
        are not kept.
        """
        if "exact" in self.__dict__:
            return [work(model) for model in self.exact.sides]
        return list(each_side(self.pair, self.compute.dtype, self.compute.device, work))

    def of_ref(self, work: Callable[[PreTrainedModel], T]) -> T:
        """What `work` makes of the reference; it is loaded alone for this where `exact` is not held."""
        if "exact" in self.__dict__:
            return work(self.exact.ref)
        return next(each_side(self.pair, self.compute.dtype, self.compute.device, work))

    def merged(self, lam: Lam, **how: Any) -> PreTrainedModel:
        """The merged model at λ. There is one, turned in place: what an earlier call returned is the same object.

        Args:
            how: arguments of `live`; default: along the path, not rounded.
        """
        how, model = {"path": self.path, **how}, self._merged
        if model is None or self._at != (lam, how):
            self._at = None  # at no λ, should this break off half-way
            compute = {"device": self.compute.device, "compute_dtype": self.compute.dtype}
            self._merged = live(self.pair, lam, onto=model, **compute, **how)
            self._at = (lam, how)
        return self._merged

    def let_go(self) -> None:
        """Forget all models, so that others have their memory; each is loaded anew when it is next asked for."""
        held = [model for model in (self.__dict__.pop("exact", None), self._merged) if model is not None]
        self._merged = self._at = None
        forget(held)

    @property
    def exact_sampler(self) -> Sampler:
        """Writes exact DeRa's texts: the engine, or the model."""
        if self.engine is not None:
            return self.engine
        return self.sampler(lambda _: self.exact, takes_lam=True)

    @property
    def merged_sampler(self) -> Sampler:
        """Writes the merged model's texts."""
        return self.sampler(self.merged)

    def sampler(self, model_at: Callable[[Lam], PreTrainedModel], takes_lam: bool = False) -> ModelSampler:
        """A sampler of other models; arguments as for `ModelSampler`."""
        batches, on_cpu = self.compute.batches, torch.device(self.compute.device).type == "cpu"
        at_once = batches.size or (SAMPLED if on_cpu else MOST_SAMPLED)
        return ModelSampler(
            model_at, self.pair.tokenizer, self.seed, self.pair.vocab_size, takes_lam, at_once, batches
        )
