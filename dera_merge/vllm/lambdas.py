"""A λ for each request, from `SamplingParams.extra_args["lambda"]` (over HTTP: `"vllm_xargs": {"lambda": 0.5}`).

vLLM has two model runners, each with its own interface for logits processors. `LambdaProcessor` is one of either, and
finds out which from how it is constructed. It changes no logits: the model mixes them where it computes them, so that
log-probabilities, of the prompt too, are the mixture's. The processor checks λ when a request comes in (a bad one is
HTTP 400) and, under the runner of V1, keeps the λ of each row of the batch. Runner V2 has its own place for that:
`vllm/states.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.sample.logits_processor import MoveDirectionality

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2
except ImportError:  # before Model Runner V2

    class ProcessorV2:  # type: ignore[no-redef]
        """Stands in for the interface that this vLLM does not have."""


if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate

KEY = "lambda"
LARGEST = torch.finfo(torch.float32).max
_PLACE = "dera_merge.lambdas"  # key in the engine's registry of what its forward passes look up


def lam_of(params: SamplingParams, default: float) -> float:
    """A request's λ.

    Raises:
        ValueError: it is not a finite number.
    """
    value = (params.extra_args or {}).get(KEY, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST:
        raise ValueError(f"{KEY} must be a finite number, not {value!r:.40}")
    return float(value)


class Lambdas:
    """λ by row of the batch, on the device: (max_num_seqs,), float32. One for each engine."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.default: float = vllm_config.model_config.hf_config.lam
        self.rows = torch.full((vllm_config.scheduler_config.max_num_seqs,), self.default, device=device)
        vllm_config.compilation_config.static_forward_context[_PLACE] = self

    @staticmethod
    def of(vllm_config: VllmConfig) -> Lambdas | None:
        """What the engine of this config has, if its processor made one."""
        return vllm_config.compilation_config.static_forward_context.get(_PLACE)


class LambdaProcessor(ProcessorV1, ProcessorV2):
    """Checks and keeps the λ of requests; neutral for other models than DeRa."""

    def __init__(self, vllm_config: VllmConfig, *state: Any) -> None:
        """Runner V1 calls with (config, device, whether to pin memory), V2 with (config, state of requests)."""
        self.lambdas: Lambdas | None = None
        if len(state) == 2 and vllm_config.model_config.hf_config.model_type == "dera":
            self.lambdas = Lambdas(vllm_config, state[0])
            self.host = [self.lambdas.default] * len(self.lambdas.rows)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for a bad λ, when a request comes in."""
        lam_of(sampling_params, 0.0)

    def is_argmax_invariant(self) -> bool:
        return True  # it changes nothing

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: before each pass, take in which requests came and which moved; those that left need nothing."""
        if self.lambdas is None or batch_update is None:
            return
        for row, params, _, _ in batch_update.added:
            self.host[row] = lam_of(params, self.lambdas.default)
        for source, target, direction in batch_update.moved:
            if direction == MoveDirectionality.SWAP:
                self.host[source], self.host[target] = self.host[target], self.host[source]
            else:
                self.host[target] = self.host[source]
        self.lambdas.rows.copy_(torch.tensor(self.host))

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False  # V2: no logits to change

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        return logits
