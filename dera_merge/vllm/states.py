"""λ of each token under vLLM's Model Runner V2, which asks a model for a state of its own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..models import doors
from .lambdas import lam_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState


@cache
def model_state() -> type:
    """The class, made when the runner asks, because an engine of V1 must not import this."""
    doors.check("Model Runner V2")
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class DeraModelState(DefaultModelState):
        """Keeps λ of each request's slot, and gives `forward` the λ of each token."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.default: float = self.model_config.hf_config.lam
            self.lams = torch.full((self.max_num_reqs,), self.default, device=self.device)
            # Always the same memory: CUDA graphs read it when they are replayed.
            self.by_token = torch.full((self.max_num_tokens,), self.default, device=self.device)

        def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
            super().add_request(req_index, new_req_data)
            self.lams[req_index] = lam_of(new_req_data.sampling_params, self.default)

        def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
            token = torch.arange(input_batch.num_tokens, device=self.device, dtype=torch.int32)
            ends = input_batch.query_start_loc[1 : input_batch.num_reqs + 1]
            row = torch.searchsorted(ends, token, right=True)
            self.by_token[: len(token)] = self.lams[input_batch.idx_mapping[row].long()]
            lams = self.by_token[: input_batch.num_tokens_after_padding]
            return {**super().prepare_inputs(input_batch, req_states), "lams": lams}

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            return {**super().prepare_dummy_inputs(num_reqs, num_tokens), "lams": self.by_token[:num_tokens]}

    return DeraModelState
