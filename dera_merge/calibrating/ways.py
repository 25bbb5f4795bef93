"""How a path is learned where memory is short: what learning takes, and the way that fits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from ..decoding.rows import Strength
from ..errors import DeraError
from ..measuring.precision import available
from ..models.pair import Pair
from ..texts.batches import READ_TOKENS, cached
from .layers import AXES
from .lessons import MEASURED_TOKENS, SAMPLED_TOGETHER
from .training import LOOKED_AT, step_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
OTHER = 0.3e9  # bytes of what is not counted: buffers, what libraries allocate as they work
KEPT = 4.5  # bytes that layers keep of a token for their gradient, for each of `ends`; 16 bits have copies in float32
DISTRIBUTIONS = 40  # bytes for each token and row of the vocabulary while kl is made and differentiated
TOGETHER = 64  # tokens of which there are distributions at a time, where memory is short
FOUR_BITS = 0.53  # bytes of a weight in nf4, with its share of a scale
HELD_OUT = 0.1  # share of the prompts that nothing is learned from
LoadIn = Literal["4bit"] | None
FEWEST = 8  # texts that an accelerator should have room for when it samples; it takes more where there is room


@dataclass(frozen=True)
class Size:
    """What decides how much memory learning takes; of weights and tokens, how many.

    Attributes:
        linear: weights of linear layers, the head left out, of all models that are held.
        other: all other weights, of embeddings and heads mostly.
        heads: weights of heads that have a float32 copy where models have 16 bits.
        ends: what all linear layers take and give, of one token.
        layers: of the model.
        hidden: size of its states.
        vocabulary: its rows.
        cache: keys and values of one token.
        learned: numbers of a path.
        axes: numbers of the coordinates in which it is learned.
        sampled: texts that are sampled together.
        text: tokens of the longest text.
        step: tokens of a step of training.
        looked: tokens held out of which there are distributions together.
        kept: tokens of all texts whose states lie where the models do.
        measured: tokens that the straight line reads in one batch before anything is learned.
        one_base: whether both models stand on one base, which may then be held in 4 bits.
    """

    linear: int
    other: int
    heads: int
    ends: int
    layers: int
    hidden: int
    vocabulary: int
    cache: int
    learned: int
    axes: int
    sampled: int
    text: int
    step: int
    looked: int
    kept: int
    measured: int
    one_base: bool

    @classmethod
    def of(
        cls, pair: Pair, names: dict[str, str], rank: int, texts: int, longest: int, max_new_tokens: int, passes: int,
        batch_size: int | None, device: torch.device | str,
    ) -> Size:  # fmt: skip
        """Of learning a path of this rank (0: gains) of these layers' weights, from so many texts."""
        architecture, models = pair.architecture, 1 if pair.shared_base else 2
        config = architecture.model.config.get_text_config(decoder=True)
        shapes = [architecture.shapes[f"{module}.weight"] for module in architecture.linear]
        linear = sum(map(math.prod, shapes))
        bent = {module: pair.tensors[name].shape for module, name in names.items()}
        inputs = sum(shape[module not in architecture.transposed] for module, shape in bent.items())
        # PEFT's copy of what an adapter brings, and the one in rows.
        brought = 2 * sum(info.numel for adapter in (a for side in pair.sides for a in side.adapters)
                          for info in adapter.checkpoint.tensors.values())  # fmt: skip
        on_cpu, held_out = torch.device(device).type == "cpu", max(2, round(HELD_OUT * texts))
        read = batch_size or (max(1, READ_TOKENS // longest) if on_cpu else held_out)
        step = batch_size * longest if batch_size else step_tokens(texts * longest, passes, on_cpu)
        return cls(
            linear=models * linear,
            other=models * (sum(info.numel for info in pair.tensors.values()) - linear) + brought,
            heads=(1 if models == 1 else 4) * config.vocab_size * config.hidden_size,
            ends=models * sum(map(sum, shapes)),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            cache=cached(config),
            learned=rank * sum(map(sum, bent.values())),
            axes=AXES * inputs if rank else 0,
            sampled=batch_size or min(texts, SAMPLED_TOGETHER if on_cpu else FEWEST),
            text=longest,
            step=max(step, longest),
            looked=min(LOOKED_AT, min(held_out, read) * max_new_tokens),
            kept=texts * longest if on_cpu else 0,
            measured=min(MEASURED_TOKENS, texts * longest) if rank else 0,
            one_base=models == 1,
        )

    def held(self, dtype: torch.dtype, load_in: LoadIn = None) -> float:
        """Bytes of the models, and of their states of the texts where these lie beside them."""
        width = dtype.itemsize
        models = (FOUR_BITS if load_in else width) * self.linear + width * self.other
        heads = 4 * self.heads if width == 2 else 0
        return models + heads + 2 * width * self.kept * self.hidden

    def takes(self, dtype: torch.dtype, recomputed: bool = False, load_in: LoadIn = None) -> float:
        """Bytes at most, computed in `dtype`.

        Args:
            recomputed: layers and distributions are made again for their gradients.
            load_in: what linear layers are quantised to, if at all.
        """
        width = dtype.itemsize
        one = self.text * (self.cache + self.hidden) * width + 8 * 4 * self.vocabulary
        sampling = 2 * self.sampled * one
        kept = KEPT * self.ends
        if recomputed:
            kept = 2 * kept / self.layers + self.layers * self.hidden * width
        of_step, looked = (min(count, TOGETHER) if recomputed else count for count in (self.step, self.looked))
        learning = self.step * kept + DISTRIBUTIONS * self.vocabulary * of_step
        reading = DISTRIBUTIONS * self.vocabulary * looked
        measuring = 2 * 4 * self.measured * self.ends / self.layers
        training = 5 * 4 * self.learned + 4 * self.axes + max(learning, reading, measuring)
        return self.held(dtype, load_in) + max(sampling, training) + OTHER


@dataclass(frozen=True)
class Way:
    """How a path is learned.

    Attributes:
        dtype: in which models compute.
        recomputed: keep of each layer's pass only what came in, and of distributions nothing.
        room: bytes that batches may take; None: what is free.
    """

    dtype: torch.dtype
    recomputed: bool = False
    room: int | None = None

    @property
    def together(self) -> int | None:
        """Tokens of which there are distributions at a time; None: of all."""
        return TOGETHER if self.recomputed else None

    def __str__(self) -> str:
        how = "activations checkpointed" if self.recomputed else "all activations kept"
        return f"in {str(self.dtype).removeprefix('torch.')} with {how}"


def way(
    size: Size, dtype: torch.dtype | str, device: torch.device | str, limit: int | None = None,
    load_in: LoadIn = None,
) -> Way:  # fmt: skip
    """The first way that fits: all activations kept, or checkpointed; of `"auto"`, in float32, else in bfloat16.

    A line says which was taken and why, unless it is the first and nothing was asked for.

    Args:
        size: of what is to be learned.
        dtype: as asked for.
        device: where.
        limit: bytes that may be taken; None: what is free.
        load_in: what linear layers are quantised to, if at all.

    Raises:
        DeraError: none fits.
    """
    auto = (torch.float32, torch.bfloat16)
    kinds = auto if dtype == "auto" else [getattr(torch, dtype) if isinstance(dtype, str) else dtype]
    ways = [Way(kind, recomputed) for kind in kinds for recomputed in (False, True)]
    room = available(device) if limit is None else limit
    if room is None:
        return ways[0]
    there = f"{room / 1e9:.1f} GB are free on {device}" if limit is None else f"--max-memory is {limit / 1e9:.1f} GB"
    needs = [size.takes(one.dtype, one.recomputed, load_in) for one in ways]
    fits = next((number for number, need in enumerate(needs) if need <= room), None)
    if fits is None:
        least = min(range(len(ways)), key=needs.__getitem__)
        others: dict[str, LoadIn] = {"--compute-dtype bfloat16": load_in}
        others |= {"--load-in 4bit": "4bit"} if size.one_base else {}
        smaller = {name: size.takes(torch.bfloat16, True, kind) for name, kind in others.items()}
        out = next((f"{name} would take {need / 1e9:.1f} GB" for name, need in smaller.items() if need <= room),
                   "shorter texts, a smaller --rank and --batch-size take less")  # fmt: skip
        insist = ", --max-memory SIZE insists" if limit is None else ""
        raise DeraError(f"{ways[least]} a path takes about {needs[least] / 1e9:.1f} GB, {there}; {out}{insist}")
    if fits or limit is not None or load_in:
        why = f" (it would be {needs[fits - 1] / 1e9:.1f} GB {ways[fits - 1]})" if fits else ""
        held = ", the base in 4 bits" if load_in else ""
        log.info(f"calibrating {ways[fits]}{held}: about {needs[fits] / 1e9:.1f} GB, {there}{why}")
    left = None if limit is None else int(limit - size.held(ways[fits].dtype, load_in))
    return Way(ways[fits].dtype, ways[fits].recomputed, left)


def keep_gradients(model: torch.nn.Module) -> None:
    """Let layers in 4 bits have a gradient: in evaluation mode some processors get them in a layout that has none."""
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train()


def recompute(student: PreTrainedModel) -> None:
    """Keep of each layer's pass with gradients only what came in, and run the layer again when they are due."""
    for layer in _layers(student.base_model):
        layer.forward = _again(layer.forward, student.dera_strength)


def _layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The elements of a model's lists of layers; of lists in such elements, none."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _again(forward: Callable[..., Any], strength: Strength) -> Callable[..., Any]:
    """A layer's forward that is run twice where there is a gradient.

    The second time is after the pass, and may be in another thread, so it brings the pass's λ along.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        rows, tokens = strength.rows, strength.tokens

        def at_lam(*args: Any, **kwargs: Any) -> Any:
            with strength.of(rows, tokens):
                return forward(*args, **kwargs)

        return checkpoint(at_lam, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
