"""Who writes texts: a model of transformers, two with one drafting, or a server elsewhere; all are used alike.

Texts are at temperature 1, without any warper. Where noise belongs to a stream, two samplers of one seed are coupled:
the texts of one stream part only where distributions do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from transformers import set_seed

from ..decoding.speculation import Speculation
from ..lambdas import Lam
from .batches import SAMPLED, Batches
from .sampling import decode_batch, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..decoding.exact import DeraForCausalLM
    from .prompts import Prompt


class Sampler(Protocol):
    """Writes a text to each prompt."""

    at_once: int  # texts that are best asked for together

    def sample(
        self, prompts: Sequence[Prompt], lams: Sequence[Lam], streams: Sequence[int], *, max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """One text a prompt.

        Args:
            prompts: to answer.
            lams: λ of each.
            streams: which noise each gets, where noise can be chosen.
            max_new_tokens: length limit, in tokens.
            progress: called with the number of texts done.

        Returns:
            The new tokens of each, an end token included, nothing after it.
        """
        ...


@dataclass(frozen=True)
class ModelSampler:
    """A model, or one for each λ, with noise that belongs to (seed, stream), whatever else is in the batch.

    Attributes:
        model_at: λ → the model; one that takes λ with each call is asked for once.
        takes_lam: whether it does.
        vocab_size: as for `GumbelNoise`.
        batches: how many texts it samples at a time.
    """

    model_at: Callable[[Lam], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    seed: int
    vocab_size: int
    takes_lam: bool = False
    at_once: int = SAMPLED
    batches: Batches = field(default_factory=Batches)

    def sample(
        self, prompts: Sequence[Prompt], lams: Sequence[Lam], streams: Sequence[int], *, max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "seed": self.seed, "vocab_size": self.vocab_size, "progress": progress,
            "batches": self.batches,
        }  # fmt: skip
        if not prompts:
            return []
        if self.takes_lam:
            return self._sample(lams[0], prompts, streams=streams, lams=lams, **options)
        texts: dict[int, list[int]] = {}
        for lam in dict.fromkeys(lams):
            at_lam = [number for number, text_lam in enumerate(lams) if text_lam == lam]
            asked, noise = ([values[number] for number in at_lam] for values in (prompts, streams))
            texts |= dict(zip(at_lam, self._sample(lam, asked, streams=noise, **options), strict=True))
        return [texts[number] for number in range(len(prompts))]

    def _sample(self, lam: Lam, prompts: Sequence[Prompt], **options: Any) -> list[list[int]]:
        ids, shown = [prompt.ids for prompt in prompts], [prompt.shown for prompt in prompts]
        return sample(self.model_at(lam), self.tokenizer, ids, shown=shown, **options)


@dataclass(frozen=True)
class DraftedSampler:
    """Exact DeRa, one text at a time, with another model drafting. Drafts use up noise, so it is coupled with no other.

    Attributes:
        draft_at: λ → the model that drafts.
    """

    exact: DeraForCausalLM
    draft_at: Callable[[Lam], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    seed: int
    at_once: int = SAMPLED

    def sample(
        self, prompts: Sequence[Prompt], lams: Sequence[Lam], streams: Sequence[int], *, max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        texts: list[list[int]] = []
        for prompt, lam, stream in zip(prompts, lams, streams, strict=True):
            draft = self.draft_at(lam)
            set_seed((self.seed * 1_000_003 + stream) % 2**32)
            texts += decode_batch(
                self.exact, self.tokenizer, [prompt.ids], do_sample=True, temperature=1.0, top_k=0, top_p=1.0, lam=lam,
                max_new_tokens=max_new_tokens, assistant_model=draft, speculation=Speculation(),
            )  # fmt: skip
            if progress:
                progress(len(texts))
        return texts
