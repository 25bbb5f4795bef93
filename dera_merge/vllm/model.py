"""Exact DeRa as one vLLM model: (1-λ)·h_ref + λ·h_aligned, mixed in float32 (Liu et al., ICML 2024).

A token's way: `forward` runs both models on the same tokens, each with a paged KV cache of its own, and returns their
hidden states side by side, with the λ of the token's request behind them. `compute_logits`, which vLLM calls for the
rows that it samples from and for the prompt's when their log-probabilities are asked for, makes both models' logits and
mixes them. λ travels with the row, so no row can meet another's, however vLLM batches, chunks, moves or preempts
requests.

Base and adapter are held once: see `vllm/shared.py`.
"""

# ruff: noqa: E402

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..models import doors

doors.check("exact DeRa in vLLM")  # before the imports of these names, which a rename would break without a reason

from vllm.config import MultiModalConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import init_vllm_registered_model

from ..decoding.mix import mix, shares_of
from ..errors import DeraError
from ..models.kinds import config_of
from ..models.pair import Pair
from ..models.side import Side
from ..models.source import Source
from ..models.trust import Trust
from .lambdas import Lambdas
from .shared import load_shared, share
from .states import model_state

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class DeraForCausalLM(nn.Module):
    """Two models of any architecture that vLLM knows, over the same tokens; vLLM makes one from a DeRa directory."""

    get_model_state_cls = staticmethod(model_state)  # what Model Runner V2 asks for
    supports_mrope = True  # asked for where the pair's config has three positions for each token

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        doors.check("exact DeRa in vLLM", self, vllm_config.compilation_config)
        model_config = vllm_config.model_config
        if vllm_config.speculative_config is not None:
            raise DeraError("exact DeRa does not run with vLLM's speculative decoding; leave --speculative-config out")
        config, trust = model_config.hf_config, Trust(code=model_config.trust_remote_code)
        folder = Source.locate(model_config.model, model_config.revision, trust).folder
        self.pair: Pair = config.open_pair(folder, trust)
        self.pair.only_pair("exact DeRa in vLLM is")
        self.lambdas = Lambdas.of(vllm_config)
        self.default = torch.tensor([float(config.lam)], device=vllm_config.device_config.device)

        configs = [config_of(side.base.folder, trust) for side in self.pair.sides]
        self.width = [inner.get_text_config().hidden_size for inner in configs]

        def build(name: str, inner: PreTrainedConfig) -> nn.Module:
            own = vllm_config if inner.get_text_config() is inner else _without_towers(vllm_config, inner)
            return init_vllm_registered_model(own, hf_config=inner, prefix=f"{prefix}.{name}".lstrip("."))

        self.ref = build("ref", configs[0])
        self.held_once = self.pair.shared_base
        if self.held_once:
            with torch.device("meta"):  # its weights will be the reference's
                self.aligned = build("aligned", configs[1])
            share(self.ref, self.aligned)
        else:
            self.aligned = build("aligned", configs[1])
        if any(getattr(model, "is_hybrid", False) for model in (self.ref, self.aligned)):
            raise DeraError("exact DeRa runs models with attention only here; this architecture has other state too")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Part of vLLM's interface; exact DeRa reads tokens, as the two models embed them differently."""
        raise DeraError("exact DeRa takes tokens, not embeddings")

    def get_mrope_input_positions(self, input_tokens: list[int], *_: Any, **__: Any) -> tuple[torch.Tensor, int]:
        """The three positions of each token of a text, (3, tokens), which are one; later tokens lag behind by 0."""
        return torch.arange(len(input_tokens)).expand(3, -1), 0

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        lams: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states of the reference, of the aligned model, and the bits of λ: (tokens, width), the models' dtype.

        Args:
            input_ids, positions: (tokens,), the tokens of all requests one after another.
            lams: (tokens,), float32, where the runner knows it (V2).
        """
        if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
            raise DeraError("exact DeRa takes tokens, and runs in one pipeline stage")
        ref = self.ref(input_ids=input_ids, positions=positions, **kwargs)
        aligned = self.aligned(input_ids=input_ids, positions=positions, **kwargs)
        if lams is None:
            lams = self._lams(len(input_ids))
        # Bits, not a value: 0.3 in bfloat16 would be another λ.
        return torch.cat([ref, aligned.to(ref.dtype), lams.contiguous()[:, None].view(ref.dtype)], dim=-1)

    def _lams(self, tokens: int) -> torch.Tensor:
        """λ of each token, from where each request begins in the pass (V1)."""
        metadata = get_forward_context().attn_metadata
        if not metadata:  # a pass that measures memory
            return self.default.repeat(tokens)
        if isinstance(metadata, list):
            raise DeraError("exact DeRa does not run with vLLM's microbatches; leave --enable-dbo out")
        if self.lambdas is None:
            raise DeraError(
                "vLLM has not loaded dera-merge's logits processor, so no request's λ is known; if VLLM_PLUGINS is "
                "set, serve with --logits-processors dera_merge.vllm.lambdas:LambdaProcessor"
            )
        by_layer = (getattr(layer, "query_start_loc", None) for layer in metadata.values())
        starts = next((starts for starts in by_layer if starts is not None), None)
        if starts is None:
            raise DeraError(
                "this attention backend does not say where requests begin; use --attention-backend FLASH_ATTN"
            )
        token = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
        row = torch.searchsorted(starts[1:], token, right=True)
        return self.lambdas.rows[row.clamp(max=len(self.lambdas.rows) - 1)]  # behind the last request comes padding

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor | None:
        """Mixed logits of rows that `forward` returned, (rows, vocabulary), float32; None on other ranks."""
        ref, aligned = self.width
        lams = hidden_states[:, ref + aligned :].contiguous().view(torch.float32)[:, 0]
        ref_logits = self.ref.compute_logits(hidden_states[:, :ref], *args)
        aligned_logits = self.aligned.compute_logits(hidden_states[:, ref : ref + aligned], *args)
        if ref_logits is None or aligned_logits is None:
            return None
        return mix([ref_logits[:, None], aligned_logits[:, None]], shares_of(lams))[:, 0]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load both models from the pair's own files; what vLLM found in the directory is not looked at."""
        loaded = {f"ref.{name}" for name in self.ref.load_weights(_stored(self.pair.ref))}
        if self.held_once:
            with torch.device("cpu"):
                load_shared(self.pair, self.ref, self.aligned)
            return loaded | {name for name, _ in self.named_parameters()}
        return loaded | {f"aligned.{name}" for name in self.aligned.load_weights(_stored(self.pair.aligned))}


def _without_towers(vllm_config: VllmConfig, inner: PreTrainedConfig) -> VllmConfig:
    """The engine's config for a class that wraps a text decoder: what it sees images with is not made."""
    vllm_config, model_config = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
    model_config.multimodal_config = MultiModalConfig(language_model_only=True)
    model_config.hf_config = inner  # vLLM takes from there whether embeddings are tied
    vllm_config.model_config = model_config
    return vllm_config


def _stored(side: Side) -> Iterable[tuple[str, torch.Tensor]]:
    """The base's tensors as they are stored, one after another."""
    for name in side.checkpoint.tensors:
        with torch.device("cpu"):  # vLLM loads under a default device of its own
            tensor = side.checkpoint.read_whole(name)
        yield name, tensor
