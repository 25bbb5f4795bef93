"""The merged model drafts, exact DeRa verifies: speculative decoding with oneself.

θ_ref + λΔ is close to exact DeRa (its total variation is what `compare` reports), so most of its tokens are those that
exact DeRa would have chosen. It writes a block, both models read the block in one pass each, and transformers' assisted
generation keeps what exact DeRa agrees with (Leviathan et al., ICML 2023, algorithm 1): the output is exact DeRa's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CandidateGenerator

from . import caches
from .dial import DialForCausalLM

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

    from .caches import PairCache, RowsCache

_SURE = 0.1  # a lead of the draft's best token over its second, in probability, that exact DeRa seldom overturns


@dataclass
class Speculation:
    """How to draft, and, after `generate`, what came of it.

    Attributes:
        max_draft: most tokens drafted at a time.
        verification_cost: time of a verification, in units of that of a drafted token. A fixed figure and no
            stop-watch, so that the same call always drafts the same blocks.
        drafted, accepted: tokens.
        verifications: blocks verified.
    """

    max_draft: int = 16
    verification_cost: float = 4.0
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafted tokens that were kept; None before the first draft."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_verification(self) -> float | None:
        """Tokens gained by a verification: the accepted ones and the one that it adds itself."""
        return (self.accepted + self.verifications) / self.verifications if self.verifications else None


class MergedDraft(CandidateGenerator):
    """Drafts for one call of `DeraForCausalLM.generate`; one sequence.

    The draft's cache is never filled by reading: keys and values of θ_ref + λΔ are, to first order in Δ, (1-λ) times
    the reference's plus λ times the aligned model's, which the pair's cache has. What that leaves wrong costs
    acceptance, not exactness. Where the caches do not correspond (another architecture, a window that has slid), the
    draft reads as usual.

    Args:
        draft: the merged model, or any other over the same tokens.
        speculation: settings; the counts are added to.
        generation_config: of the call.
        logits_processor: what the draft's scores go through, as the call's do.
        past: the pair's cache.
        attention_mask: (1, tokens) of the prompt, or None.
        lam: λ, for a draft that takes it with each call; (1,), or with several aligned models (1, models).
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        speculation: Speculation,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        past: PairCache | RowsCache,
        attention_mask: torch.Tensor | None,
        lam: torch.Tensor,
    ) -> None:
        self.draft = draft
        self.speculation = speculation
        self.past = past
        self.lam = lam
        self.takes_lam = isinstance(draft, DialForCausalLM)
        self.do_sample = generation_config.do_sample
        self.max_length = generation_config.max_length
        ends = generation_config.eos_token_id
        self.ends = set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())
        self.processors = logits_processor
        self.padding = 0 if attention_mask is None else int((attention_mask[0] == 0).sum())
        self.cache: Cache = DynamicCache(config=draft.config)
        self.cache_name = caches.name_among(caches.arguments_of(draft)) or caches.CACHE
        self.cache.activate_past_recording()
        # Of the drafted tokens that exact DeRa judged: [kept, all], where the draft was unsure and where it was sure.
        self.judged = {False: [8.0, 10.0], True: [99.0, 100.0]}
        self.sure: list[bool] = []

    @torch.no_grad()
    def get_candidates(
        self, input_ids: torch.LongTensor, **kwargs: Any
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """The tokens so far and a draft after them, (1, tokens + drafted), and the draft's scores when sampling.

        A block costs its length k and a verification, and gains 1 + a₁ + a₁a₂ + … tokens, where aᵢ is the chance that
        the i-th is kept. It grows for as long as one more token is expected to lower the cost per token.
        """
        known = input_ids.shape[1] - 1  # tokens whose keys and values the pair has
        longest = min(self.speculation.max_draft, self.max_length - known - 2)
        self.sure = []
        if longest < 1 or self.past.get_seq_length() < known:  # the pair has not read the prompt: nothing to build on
            return input_ids, None
        self._follow(known)
        ids, scores, gained, reached = input_ids.to(self.draft.device), [], 1.0, 1.0
        kept, judged = (sum(column) for column in zip(*self.judged.values(), strict=True))
        while len(scores) < longest:
            if scores and reached * kept / judged <= gained / (len(scores) + self.speculation.verification_cost):
                break
            scores.append(self._next(ids))
            probabilities = scores[-1].softmax(-1)
            token = torch.multinomial(probabilities, 1) if self.do_sample else scores[-1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], -1)
            if self.ends and int(token) in self.ends:
                break
            best, second = probabilities.topk(2).values[0].tolist()
            self.sure.append(best - second > _SURE)
            rate = self.judged[self.sure[-1]]
            reached *= rate[0] / rate[1]
            gained += reached
        return ids, torch.stack(scores, 1) if self.do_sample else None

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        """Scores (1, vocabulary) of the token after `ids`."""
        start, stop = self.cache.get_seq_length(), ids.shape[1]
        extra: dict[str, Any] = {"lam": self.lam} if self.takes_lam else {}
        if self.padding:
            mask = torch.ones_like(ids)
            mask[:, : self.padding] = 0
            extra |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, start:stop]}
        extra |= {self.cache_name: self.cache}
        logits = self.draft(input_ids=ids[:, start:], use_cache=True, logits_to_keep=1, **extra)
        scores = logits.logits[:, -1].float()
        return self.processors(ids, scores)

    def _follow(self, known: int) -> None:
        """Bring the draft's cache to the tokens that were kept."""
        cached = self.cache.get_seq_length()
        if cached:
            self.cache.crop(min(0, known - cached))
        if (cached := min(cached, known)) == known or len(self.cache) != self.past.depth:
            return
        if any(getattr(layer, "keys", None) is None for layer in self.past.layers):  # a recurrent state, say
            return
        layers = [self.past.sides(layer) for layer in range(self.past.depth)]
        heads = getattr(self.draft.config.get_text_config(), "num_key_value_heads", None)
        if any(keys[0].shape[-2] != known or keys[0].shape[1] != heads for keys, _ in layers):
            return
        target = {"device": self.draft.device, "dtype": self.draft.dtype}
        lams = self.lam.flatten().tolist()
        for number, kinds in enumerate(layers):
            mixed = []
            for ref, *aligned in kinds:  # keys, then values
                total = (1 - sum(lams)) * ref[..., cached:, :]
                for lam, side in zip(lams, aligned, strict=True):
                    total = total + lam * side[..., cached:, :].to(ref.device)
                mixed.append(total.to(**target))
            self.cache.update(*mixed, number)

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Count what came of a draft."""
        drafted, accepted = scores.shape[1] - 1, int(num_matches)
        if drafted == 0:
            return
        for place, sure in enumerate(self.sure[: accepted + 1]):
            self.judged[sure][0] += place < accepted
            self.judged[sure][1] += 1
        self.speculation.drafted += drafted
        self.speculation.accepted += accepted
        self.speculation.verifications += 1
