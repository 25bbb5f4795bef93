"""What a model makes of given texts: last hidden states at the scored tokens, and the head for their logits.

Hidden states are small; distributions over the vocabulary are made from them a few tokens at a time. So many models can
be compared on the same texts, each having read them once, and nothing of size vocabulary × text exists.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..decoding.mix import on_new_rows
from ..errors import DeraError
from ..models import doors
from ..texts.images import Shown, beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..texts.prompts import Prompt

BATCH_TOKENS = 2048  # tokens that a model reads at a time
Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Text:
    """A completion to score, and the index of its prompt."""

    prompt: int
    ids: list[int]  # prompt and completion
    start: int  # where the completion begins
    shown: Shown = field(default_factory=dict, compare=False, repr=False)  # as of `Prompt`

    @classmethod
    def of(cls, number: int, prompt: Prompt, completion: Iterable[int]) -> Text:
        """A completion of prompt `number`."""
        return cls(number, [*prompt.ids, *completion], len(prompt.ids), prompt.shown)

    @property
    def completion(self) -> list[int]:
        """Its tokens."""
        return self.ids[self.start :]


@dataclass(frozen=True)
class Trace:
    """What a model makes of the texts: hidden states (scored tokens, hidden size), and its head, hidden → logits."""

    hidden: torch.Tensor
    head: Head
    known_rows: int | None = None  # of the vocabulary, in a reference that lacks tokens of ALIGNED's


def tokens_of(texts: Sequence[Text]) -> torch.Tensor:
    """The scored tokens of all texts, one after another, (scored tokens,)."""
    return torch.tensor([token for text in texts for token in text.completion])


def per_text(values: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
    """Per-token values (scored tokens, …) summed over each text: (texts, …)."""
    return np.add.reduceat(values, np.cumsum([0, *(len(text.completion) for text in texts)])[:-1])


def batches(texts: Sequence[Text], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices of texts in batches of about this many tokens, longest first, so that little is padding.

    A text that shows images is alone: their pixels have no batch axis in every class.
    """
    yield from ([index] for index, text in enumerate(texts) if text.shown)
    order = sorted(
        (index for index, text in enumerate(texts) if not text.shown), key=lambda index: -len(texts[index].ids)
    )
    while order:
        count = max(1, tokens // len(texts[order[0]].ids))
        yield order[:count]
        order = order[count:]


def padded(texts: Sequence[Text], device: torch.device, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (texts, longest + room).

    Padding is on the right, where a causal model does not see it: what it predicts depends on what came before.
    """
    width = max(len(text.ids) for text in texts) + room
    ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in texts])
    mask = torch.tensor([[1] * len(text.ids) + [0] * (width - len(text.ids)) for text in texts])
    return ids.to(device), mask.to(device)


def inputs_of(texts: Sequence[Text], model: PreTrainedModel, room: int = 0) -> dict[str, Any]:
    """What a model reads of a batch: ids and mask, both (texts, longest + room), and what the images are of a text.

    Raises:
        DeraError: an answer has the token that stands for a piece of an image, so that no pass can read it again.
    """
    ids, mask = padded(texts, model.device, room)
    stands = {getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")}
    if texts[0].shown and stands.intersection(texts[0].completion):
        raise DeraError(f"an answer to prompt {texts[0].prompt + 1}, which shows an image, has the token that stands "
                        "for images, so it cannot be read again; take another --seed or leave it out")  # fmt: skip
    return {"input_ids": ids, "attention_mask": mask, **beside(texts[0].shown, ids.shape[1], model)}


def scored(states: torch.Tensor, texts: Sequence[Text]) -> torch.Tensor:
    """Those of a decoder's states (texts, tokens, …) that predict completion tokens: (scored tokens, …)."""
    return torch.cat([row[text.start - 1 : len(text.ids) - 1] for row, text in zip(states, texts, strict=True)])


@torch.no_grad()
def trace_of(
    model: PreTrainedModel, texts: list[Text], heads: list[torch.nn.ModuleDict] | None = None, room: int = 0
) -> Trace:
    """Run a model's decoder over the texts, longest first, and keep the hidden states that predict completion tokens.

    Args:
        heads: for a model that will change: copies of heads that outlive the change. One that equals the model's is
            used again, so that a head which λ does not touch is held once. None: the model will not change.
        room: tokens of padding behind the longest text of each batch.

    Raises:
        DeraError: logits are not finite, or the model is no decoder followed by a head.
    """
    _, decoder = decoder_of(model)
    found: dict[int, torch.Tensor] = {}
    for batch in batches(texts):
        chosen = [texts[index] for index in batch]
        states = decoder(**inputs_of(chosen, model, room), use_cache=False)[0]
        sizes = [len(text.completion) for text in chosen]
        found |= dict(zip(batch, scored(states, chosen).split(sizes), strict=True))
    hidden, head = torch.cat([found[index] for index in range(len(texts))]), head_of(model, heads)
    if not _is_head(model, head, texts[0], hidden, 1):
        hidden, head = _tapped(model, texts, heads)
        if not _is_head(model, head, texts[0], hidden, 0):
            raise DeraError(f"{type(model).__name__} reads texts both ways, or makes its logits of more than one state "
                            "of its decoder, so compare cannot measure it")  # fmt: skip
    return Trace(hidden, head, getattr(model, "dera_known_rows", None))


def logits_of(sides: Sequence[Trace], chunk: slice, vocab_size: int) -> list[torch.Tensor]:
    """What exact DeRa mixes of the tokens in `chunk`: logits (tokens, vocabulary) of the reference and aligned models.

    Where ALIGNED's vocabulary grew, they are log-probabilities, as `mix.on_new_rows` defines.
    """
    logits = [side.head(side.hidden[chunk])[:, :vocab_size] for side in sides]
    if (rows := sides[0].known_rows) is not None:
        logits[:2] = on_new_rows(*logits[:2], rows)
    return logits


def decoder_of(model: PreTrainedModel) -> tuple[str, torch.nn.Module]:
    """What makes hidden states of tokens: its name in the model, and the module. All around it is the head.

    It is transformers' `get_decoder`; where that is the model itself (Llama 4), the child with most of the weights. Of
    a class that wraps a text decoder it is all that comes before the head, because that looks for images first, and
    likewise where the head is what bears the name (ModernBERT's decoder).
    """
    outputs = model.get_output_embeddings()
    wraps = model.config.get_text_config() is not model.config or model.get_decoder() is outputs
    decoder = model.base_model if wraps and model.base_model is not model else model.get_decoder()
    if decoder is model:
        children = [child for child in model.children() if child is not outputs]
        decoder = max(children, key=lambda child: sum(p.numel() for p in child.parameters()), default=model)
    return next(name for name, module in model.named_modules() if module is decoder), decoder


_OF_ANY_MODULE = frozenset(vars(torch.nn.Module()))


class _Output(BaseModelOutputWithPast):
    """A decoder's output, without caches, attentions, router logits, and whatever else a model asks of its own."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Replay(torch.nn.Module):
    """Stands in for a decoder: what comes in as `inputs_embeds` goes out as its last hidden state.

    It keeps what else a model asks of its decoder (a multiplier of the logits, in Falcon-H1), but no weights.
    """

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {name: value for name, value in vars(decoder).items() if name not in _OF_ANY_MODULE}

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        return _Output(last_hidden_state=inputs_embeds)


def head_of(model: PreTrainedModel, heads: list[torch.nn.ModuleDict] | None = None) -> Head:
    """The model without its decoder: hidden states (tokens, hidden size) → logits (tokens, vocabulary), float32.

    It is the model's own forward, so scaled or soft-capped logits (Gemma, Cohere, Granite) come out right. Each token
    is a sequence of its own there. `heads` as for `trace_of`.
    """
    doors.check("compare", model)
    name, decoder = decoder_of(model)
    *parents, last = name.split(".")
    # A chain of shallow copies down to the decoder's place; what stands beside it at each level is the head.
    copies = [copy.copy(model)]
    for parent in parents:
        copies.append(copy.copy(copies[-1]._modules[parent]))
    for own in copies:  # a method that was set on the model would keep it in memory
        own.__dict__ = {name: value for name, value in vars(own).items() if not isinstance(value, MethodType)}
    beside = {
        f"{level} {child}": module
        for level, (owner, way) in enumerate(zip(copies, [*parents, last], strict=True))
        for child, module in owner._modules.items()
        if child != way and module is not None
    }
    modules = torch.nn.ModuleDict(beside)
    modules = _outlasting(modules, heads)
    for level, (owner, way) in enumerate(zip(copies, [*parents, last], strict=True)):
        inner = copies[level + 1] if level < len(parents) else _Replay(decoder)
        owner._modules = {
            child: inner if child == way else modules[f"{level} {child}"] if module is not None else None
            for child, module in owner._modules.items()
        }

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return copies[0](inputs_embeds=hidden[:, None], use_cache=False).logits[:, 0].float()

    return logits


def _tapped(
    model: PreTrainedModel, texts: list[Text], heads: list[torch.nn.ModuleDict] | None
) -> tuple[torch.Tensor, Head]:
    """States and head as of `trace_of`, where a model calls its decoder otherwise: what enters the output embeddings.

    Each text is read alone, as such a model may want its padding elsewhere.
    """
    outputs = model.get_output_embeddings()
    if outputs is None:
        raise DeraError(f"{type(model).__name__} has no output embeddings, so compare cannot measure it")
    entered: list[torch.Tensor] = []
    tap = outputs.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    try:
        for text in texts:
            model(**inputs_of([text], model), use_cache=False)
            entered[-1] = scored(entered[-1], [text])
    finally:
        tap.remove()
    kept = _outlasting(torch.nn.ModuleDict({"outputs": outputs}), heads)
    return torch.cat(entered), lambda hidden: kept["outputs"](hidden).float()


def _outlasting(modules: torch.nn.ModuleDict, heads: list[torch.nn.ModuleDict] | None) -> torch.nn.ModuleDict:
    """The modules of a head, or one of `heads` that equals them, which gets a copy if none does."""
    if heads is None:
        return modules
    same = (
        kept for kept in heads
        if kept.keys() == modules.keys() and all(map(torch.equal, kept.parameters(), modules.parameters()))
    )  # fmt: skip
    kept = next(same, None)
    if kept is None:
        kept = copy.deepcopy(modules)
        heads.append(kept)
    return kept


def _is_head(model: PreTrainedModel, head: Head, text: Text, hidden: torch.Tensor, more: int) -> bool:
    """Whether `head` gives the whole model's logits of the first state, with `more` tokens of the completion read.

    Raises:
        DeraError: the logits are not finite.
    """
    begun = replace(text, ids=text.ids[: text.start + more])
    whole = model(**inputs_of([begun], model), use_cache=False).logits[0, text.start - 1].float()
    if not whole.isfinite().any():
        raise DeraError(f"{type(model).__name__} gives no finite logits; is λ too large, or an input broken?")
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        rebuilt = head(hidden[:1])[0]
        return torch.allclose(whole, rebuilt, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
    except (TypeError, IndexError, RuntimeError, AttributeError):  # it calls its decoder otherwise, or takes more of it
        return False
