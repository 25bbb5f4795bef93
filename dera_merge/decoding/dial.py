"""θ_ref + λΔ over one set of weights, with a λ for each row of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import DeraError
from . import caches
from .hooks import Sides, sees
from .lambda_model import Lam, LambdaModel, Passes, causal_output
from .rows import Strength


class DialForCausalLM(LambdaModel):
    """θ_ref + λΔ over one set of base weights, with a λ for each sequence of the batch.

    One model serves many λ in one forward pass: `generate(**inputs, lam=[0.0, 0.5, 2.0])`. It computes
    W·x + λ·scale·B·A·x where `ModelPair.merged` computes (W + λ·scale·B·A)·x; nothing is rounded to a storage dtype.

    Args:
        rows: from `rows.in_rows`; `ModelPair.dial` makes one.
        lam: the default λ.
        vocab_size: rows of the vocabulary that are given.
        models: how many aligned models `rows` has.
    """

    def __init__(
        self, rows: PreTrainedModel, lam: float | Sequence[float] = 1.0, vocab_size: int | None = None, models: int = 1
    ) -> None:
        super().__init__(rows, lam, vocab_size or rows.config.get_text_config(decoder=True).vocab_size, models)
        self.rows = rows
        self._passes = Passes(rows)
        self.eval()

    @property
    def asked(self) -> PreTrainedModel:
        return self.rows

    @property
    def towers(self) -> tuple[PreTrainedModel, ...]:
        return (self.rows,)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        lam: Lam | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of θ_ref + λΔ, (batch, kept tokens, vocabulary), in the model's dtype. Arguments as for any model."""
        strength: Strength = self.rows.dera_strength
        cache = caches.given(cache, past_key_values)
        if sees(kwargs) and self.rows.dera_sees_apart:
            raise DeraError("the adapter changes how images are seen, which a dial cannot do by row; decode exactly")
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "use_cache": use_cache, "logits_to_keep": logits_to_keep,
        }  # fmt: skip
        lams = self._lams(lam, len(input_ids)).to(input_ids.device)
        more = {key: value[0] if isinstance(value, Sides) else value for key, value in kwargs.items()}
        with strength.of(lams, input_ids.shape[1]):
            output = self._passes.run(given, more, cache)
        logits, past = output.logits[..., : self.config.vocab_size], output.get(caches.CACHE)
        return causal_output(logits, past, labels, return_dict, self._passes.state(output))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.rows.get_input_embeddings()
