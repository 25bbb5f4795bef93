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
from ..texts.batches import READ_TOKENS, Batches
from ..texts.images import Shown, beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..texts.prompts import Prompt

Head = Callable[[torch.Tensor], torch.Tensor]
Heads = list[torch.nn.ModuleDict] | None  # copies of heads that may be used again


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
    one_by_one: bool = False  # whether each text was read alone, however many fit


def tokens_of(texts: Sequence[Text]) -> torch.Tensor:
    """The scored tokens of all texts, one after another, (scored tokens,)."""
    return torch.tensor([token for text in texts for token in text.completion])


def per_text(values: np.ndarray, texts: Sequence[Text]) -> np.ndarray:
    """Per-token values (scored tokens, …) summed over each text: (texts, …)."""
    return np.add.reduceat(values, np.cumsum([0, *(len(text.completion) for text in texts)])[:-1])


def longest_first(texts: Sequence[Text]) -> list[int]:
    """Indices of texts in the order in which they are read, so that little of a batch is padding; images come first."""
    return sorted(range(len(texts)), key=lambda index: (not texts[index].shown, -len(texts[index].ids)))


def batches(texts: Sequence[Text], tokens: int = READ_TOKENS) -> Iterator[list[int]]:
    """Indices of texts in batches of about this many tokens, longest first.

    A text that shows images is alone: their pixels have no batch axis in every class.
    """
    order = longest_first(texts)
    while order and texts[order[0]].shown:
        yield [order.pop(0)]
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


def plain_inputs(texts: Sequence[Text], device: torch.device) -> dict[str, torch.Tensor]:
    """What a model reads of a batch of texts that show no images."""
    ids, mask = padded(texts, device)
    return {"input_ids": ids, "attention_mask": mask}


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


def states_of(
    decoder: torch.nn.Module, texts: Sequence[Text], inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """What a decoder makes of one batch: of each text its states that predict completion tokens."""
    states = decoder(**inputs, use_cache=False)[0]
    return scored(states, texts).split([len(text.completion) for text in texts])


@torch.no_grad()
def trace_of(
    model: PreTrainedModel, texts: list[Text], heads: list[torch.nn.ModuleDict] | None = None,
    batches: Batches | None = None, wide_head: bool = True, room: int = 0,
) -> Trace:  # fmt: skip
    """Run a model's decoder over the texts, longest first, and keep the hidden states that predict completion tokens.

    Args:
        heads: for a model that will change: copies of heads that outlive the change. One that equals the model's is
            used again, so that a head which λ does not touch is held once. None: the model will not change.
        batches: how many texts to read at a time; default: what fits.
        wide_head: as for `head_of`.
        room: tokens of padding behind the longest text of each batch. Where texts are read one by one and padding may
            be misread, a text stands beside itself in its place: that, too, is a batch of another shape.

    Raises:
        DeraError: logits are not finite, or the model is no decoder followed by a head.
    """
    _, decoder = decoder_of(model)
    batches = batches or Batches()

    def read(batch: list[int]) -> tuple[torch.Tensor, ...]:
        chosen = [texts[index] for index in batch]
        return states_of(decoder, chosen, inputs_of(chosen, model, room))

    def count(index: int) -> int:
        return 1 if texts[index].shown else batches.read(model, len(texts[index].ids))

    found: dict[int, torch.Tensor] = {}
    for batch, states in batches.portions("reading", longest_first(texts), count, read):
        found |= dict(zip(batch, states, strict=True))
    hidden, head = torch.cat([found[index] for index in range(len(texts))]), head_of(model, heads, wide_head)
    tapped = not is_head(model, head, first_logits(model, texts[0], 1), hidden)
    if tapped:
        hidden, head = _tapped(model, texts, heads, wide_head, room)
        if not is_head(model, head, first_logits(model, texts[0], 0), hidden):
            raise DeraError(f"{type(model).__name__} reads texts both ways, or makes its logits of more than one state "
                            "of its decoder, so compare cannot measure it")  # fmt: skip
    return Trace(hidden.to(model.device), head, getattr(model, "dera_known_rows", None), tapped)


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


_OF_ANY_MODULE = frozenset(dir(torch.nn.Module()))


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


def head_of(
    model: PreTrainedModel, heads: list[torch.nn.ModuleDict] | None = None, wide_head: bool = True
) -> Head:
    """The model without its decoder: hidden states (tokens, hidden size) → logits (tokens, vocabulary), float32.

    It is the model's own forward, so scaled or soft-capped logits (Gemma, Cohere, Granite) come out right. Each token
    is a sequence of its own there.

    Args:
        heads: as for `trace_of`.
        wide_head: compute in float32 where the model has 16 bits: its logits would be off by as much as many a merge.
    """
    doors.check("compare", model)
    name, decoder = decoder_of(model)
    *parents, last = name.split(".")
    # A chain of shallow copies down to the decoder's place; what stands beside it at each level is the head.
    copies = [copy.copy(model)]
    for parent in parents:
        copies.append(copy.copy(copies[-1]._modules[parent]))
    for own in copies:  # a method that was set on the model, by hooks between devices say, would call it and keep it
        own.__dict__ = {name: value for name, value in vars(own).items() if not isinstance(value, MethodType)
                        and not (name in _OF_ANY_MODULE and callable(value))}  # fmt: skip
    beside = {
        f"{level} {child}": module
        for level, (owner, way) in enumerate(zip(copies, [*parents, last], strict=True))
        for child, module in owner._modules.items()
        if child != way and module is not None
    }
    modules = torch.nn.ModuleDict(beside)
    wide_head = wide_head and model.dtype.itemsize == 2
    modules = _outlasting(modules, heads, wide_head)
    for level, (owner, way) in enumerate(zip(copies, [*parents, last], strict=True)):
        inner = copies[level + 1] if level < len(parents) else _Replay(decoder)
        owner._modules = {
            child: inner if child == way else modules[f"{level} {child}"] if module is not None else None
            for child, module in owner._modules.items()
        }

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.float() if wide_head else hidden
        return copies[0](inputs_embeds=hidden[:, None], use_cache=False).logits[:, 0].float().to(hidden.device)

    return logits


def _tapped(
    model: PreTrainedModel, texts: list[Text], heads: list[torch.nn.ModuleDict] | None, wide_head: bool, room: int
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
            beside_itself = [text] * (2 if room and not text.shown else 1)
            model(**inputs_of(beside_itself, model, room if text.shown else 0), use_cache=False)
            entered[-1] = scored(entered[-1][:1], [text])
    finally:
        tap.remove()
    wide_head = wide_head and model.dtype.itemsize == 2
    kept = _outlasting(torch.nn.ModuleDict({"outputs": outputs}), heads, wide_head)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return kept["outputs"](hidden.float() if wide_head else hidden).float().to(hidden.device)

    return torch.cat(entered), logits


def _outlasting(
    modules: torch.nn.ModuleDict, heads: list[torch.nn.ModuleDict] | None, wide_head: bool
) -> torch.nn.ModuleDict:
    """The modules of a head, or one of `heads` that equals them, which gets a copy if none does; float32 if wide."""
    if heads is None and not wide_head:
        return modules
    known = [] if heads is None else heads
    kept = next((kept for kept in known if kept.keys() == modules.keys() and _equal(kept, modules)), None)
    if kept is None:
        # A head of rows goes on taking its strengths from the pass that the model is in.
        strengths = [module.strength for module in modules.modules() if hasattr(module, "strength")]
        kept = copy.deepcopy(modules, {id(strength): strength for strength in strengths})
        kept = kept.float() if wide_head else kept
        known.append(kept)
    return kept


def _equal(kept: torch.nn.Module, modules: torch.nn.Module) -> bool:
    """Whether these have the same weights, whatever their dtypes; one that an adapter changes has more of them."""
    ours, theirs = ([*each.parameters(), *each.buffers()] for each in (kept, modules))
    return len(ours) == len(theirs) and all(
        torch.equal(one, other.to(one)) for one, other in zip(ours, theirs, strict=True)
    )


def first_logits(model: PreTrainedModel, text: Text, more: int, inputs: dict[str, Any] | None = None) -> torch.Tensor:
    """The whole model's logits (vocabulary,) for a text's first scored token, float32, `more` tokens of it read too.

    Args:
        inputs: what it reads; default: as of `inputs_of`.
    """
    begun = replace(text, ids=text.ids[: text.start + more])
    inputs = inputs_of([begun], model) if inputs is None else inputs
    return model(**inputs, use_cache=False).logits[0, text.start - 1].float()


def is_head(model: PreTrainedModel, head: Head, whole: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether `head` makes the whole model's logits of the first state.

    Raises:
        DeraError: the logits are not finite.
    """
    if not whole.isfinite().any():
        raise DeraError(f"{type(model).__name__} gives no finite logits; is λ too large, or an input broken?")
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    try:
        rebuilt = head(hidden[:1])[0]
        return torch.allclose(whole, rebuilt, rtol=tolerance, atol=tolerance * float(whole.abs().max()))
    except (TypeError, IndexError, RuntimeError, AttributeError):  # it calls its decoder otherwise, or takes more of it
        return False
