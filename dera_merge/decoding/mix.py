"""The formula of exact DeRa, on logits (Liu et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def shares_of(lam: torch.Tensor) -> torch.Tensor:
    """How much of each model λ takes: 1 - Σ λ_k of the reference, and λ_k of the aligned ones; they add up to 1.

    Args:
        lam: (batch,), or with several aligned models (batch, models).

    Returns:
        (batch, 1 + models).
    """
    lam = lam if lam.ndim == 2 else lam[:, None]
    return torch.cat([1 - lam.sum(1, keepdim=True), lam], 1)


def on_new_rows(
    ref: torch.Tensor, aligned: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is mixed where ALIGNED's vocabulary grew: log-probabilities, ALIGNED's standing on its new rows.

    The paper's mixture says nothing of tokens that the reference cannot write: π_ref = 0 gives them no mass below λ=1
    and is undefined above, and raw logits have a free constant in each model. So this is a definition of ours. With V
    the rows that REF has: log π_ref is over V, log π_aligned over all; on V they are mixed, on the new rows
    log π_aligned stands at every λ, and the softmax over all rows renormalises. λ=1 is ALIGNED.

    Args:
        ref, aligned: logits (…, at least `rows`) and (…, all rows), any float dtype.
        rows: how many REF has.

    Returns:
        Two of the shape of `aligned`, float32 (float64 where the logits are), to be mixed like logits.
    """
    wide = torch.promote_types(aligned.dtype, torch.float32)
    log_aligned = aligned.to(wide).log_softmax(-1)
    log_ref = ref[..., :rows].to(wide).log_softmax(-1)
    return torch.cat([log_ref, log_aligned[..., rows:].to(log_ref.device)], -1), log_aligned


def mix(logits: Sequence[torch.Tensor], shares: torch.Tensor) -> torch.Tensor:
    """Σ c_k·h_k in float32: exact DeRa where the c_k are `shares_of` λ.

    Args:
        logits: of each model, the reference first, (batch, tokens, vocabulary), any float dtype and device. The rows of
            the vocabulary that all have are mixed.
        shares: c_k, which add up to 1, (batch, models), on the first logits' device.

    Returns:
        (batch, tokens, rows), on that device.
    """
    rows = min(side.shape[-1] for side in logits)
    first, *others = logits
    first = first[..., :rows].float()
    shares = shares[:, :, None, None]
    mixed, same = shares[:, 0] * first, None
    for share, other in zip(shares[:, 1:].unbind(1), others, strict=True):
        other = other[..., :rows].to(first.device).float()  # one copy, in the dtype that they came in
        mixed = mixed.addcmul_(share, other)
        same = first == other if same is None else same & (first == other)
    # Equal logits stay equal at every λ, infinite ones included (a token that all models mask).
    return torch.where(same, first, mixed)
