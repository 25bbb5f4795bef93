"""An optional mask for large λ: beyond 1 the mixture can lift tokens that neither model would say.

    keep v where p_aligned(v) ≥ α·max_w p_aligned(w)

The constraint is contrastive decoding's (Li et al., ACL 2023, eq. 3) with the aligned model as the expert;
Alignment-Aware Decoding (ICML 2026) is this with λ→∞. With it the output is no longer exact DeRa.
"""

from __future__ import annotations

import copy
import math

import torch
from transformers import LogitsProcessor


class PlausibilityMask(LogitsProcessor):
    """Sets to -∞ every token whose probability under the aligned model is below α times that of its best token.

    Args:
        alpha: α, from 0 (exclusive) to 1 (inclusive, which leaves only the aligned model's best token).

    Example:
        >>> exact.generate(**inputs, lam=3.0, logits_processor=LogitsProcessorList([PlausibilityMask(0.1)]))

    Raises:
        ValueError: α is not in (0, 1].
        RuntimeError: it is used with a model other than `DeraForCausalLM`, which alone shows it the aligned logits.
    """

    def __init__(self, alpha: float) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"α must be above 0 and at most 1, not {alpha}")
        self.alpha = alpha
        self._aligned: torch.Tensor | None = None

    def for_one_call(self) -> PlausibilityMask:
        """A copy that sees one call's logits only."""
        return copy.copy(self)

    def watch(self, aligned: torch.Tensor) -> None:
        """Take the aligned model's logits (rows, kept tokens, vocabulary) of the latest forward pass."""
        self._aligned = aligned
        self._next = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Masked scores (rows, vocabulary)."""
        if self._aligned is None:
            raise RuntimeError(
                "PlausibilityMask needs DeraForCausalLM.generate, which shows it the aligned model's logits"
            )
        aligned = self._aligned[:, self._next]  # speculation verifies several positions of one pass, in their order
        self._next = min(self._next + 1, self._aligned.shape[1] - 1)
        floor = aligned.amax(-1, keepdim=True) + math.log(self.alpha)
        return scores.masked_fill(aligned < floor, -torch.inf)
