"""Both forms of one pair, held once and asked by many sessions; each brings its λ along."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..decoding.exact import DeraForCausalLM
from ..lambdas import Lam
from ..merging.live import live
from ..models.pair import Pair


class Both:
    """Exact DeRa and the merged model of a pair.

    Args:
        pair: the reference and its aligned models.
        device: where they run.
        dtype: in what; default float32 on a CPU, else the checkpoint's dtype.

    Attributes:
        exact: takes λ with each call.

    Raises:
        DeraError: the models cannot be loaded.
    """

    def __init__(self, pair: Pair, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None) -> None:
        self.pair = pair
        self.device = torch.device(device)
        self._dtype = dtype or (torch.float32 if self.device.type == "cpu" else "auto")
        self.exact = DeraForCausalLM.from_pair(pair, dtype=self._dtype, device=self.device)
        self._dial = None
        if self.exact.rows is not None:
            self._dial = self.exact.dial()
            self._dial.generation_config = self.exact.generation_config
        self._turning = threading.RLock()
        self._live: PreTrainedModel | None = None
        self._at: Lam | None = None

    @contextmanager
    def merged(self, lam: Lam) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
        """θ_ref + λΔ, and what a call of it has to bring along.

        Adapters over one base are a dial: λ goes with the call, and the weights are exact DeRa's. Any other pair has a
        third model, turned to λ in place, which one thread has at a time.

        Raises:
            DeraError: the pair has no weight-space form.
        """
        if self._dial is not None:
            yield self._dial, {"lam": lam}
            return
        with self._turning:
            if self._live is None:
                self._live = live(self.pair, lam, device=self.device, compute_dtype=self._dtype)
            elif self._at != lam:
                self._at = None  # at no λ, should this break off half-way
                self._live.set_lam(lam)
            self._at = lam
            yield self._live, {}
