"""How many texts a model takes at a time: as many as were asked for, or as fit; fewer once memory ran out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
SAMPLED = 32  # texts that a CPU samples at a time: more are no faster there
READ_TOKENS = 2048  # tokens that a CPU reads at a time
MOST_SAMPLED, MOST_READ = 512, 1 << 16  # the same of an accelerator, however much memory it has
SHARE = 0.5  # of free memory, that one batch may take by our estimate


class Batches:
    """The sizes of one measurement's batches; what memory turned out not to hold is remembered.

    Args:
        size: texts at a time; None: as many as fit.
        room: bytes that a batch may take on an accelerator, where less than what is free.
    """

    def __init__(self, size: int | None = None, room: int | None = None) -> None:
        self.size, self.room = size, room
        self._most: dict[str, int] = {}  # what is done → the most that fitted when more did not

    def sampled(self, model: PreTrainedModel, tokens: int, models: int = 1, free: int | None = None) -> int:
        """How many texts of `tokens` tokens, prompt included, to sample at a time.

        Args:
            models: how many have a cache and logits for each text.
            free: bytes of memory to reckon with; default: what is free on the model's device, if that is CUDA.
        """
        free = self._free(model.device) if free is None else free
        if self.size or free is None:
            return self.size or SAMPLED
        config = model.config.get_text_config(decoder=True)
        cache = tokens * cached(config) * model.dtype.itemsize
        text = models * (cache + 8 * 4 * config.vocab_size)  # logits in several forms, float32
        return min(MOST_SAMPLED, max(1, int(SHARE * free / text)))

    def read(self, model: PreTrainedModel, tokens: int) -> int:
        """How many texts of at most `tokens` tokens to read at a time, no cache and no logits kept."""
        if self.size:
            return self.size
        budget = READ_TOKENS
        if (free := self._free(model.device)) is not None:
            config = model.config.get_text_config(decoder=True)
            inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
            token = (16 * config.hidden_size + 6 * inner) * model.dtype.itemsize
            budget = min(MOST_READ, max(READ_TOKENS, int(SHARE * free / token)))
        return max(1, budget // tokens)

    def _free(self, device: torch.device) -> int | None:
        """Bytes that a batch may take; None where nothing says."""
        free = free_memory(device)
        return free if free is None or self.room is None else min(free, self.room)

    def portions(
        self, what: str, order: Sequence[int], count: Callable[[int], int], work: Callable[[list[int]], T]
    ) -> Iterator[tuple[list[int], T]]:
        """Work on items in portions, in this order; where memory runs out, on half as many from then on.

        Args:
            what: is done, for the message and for what is remembered.
            order: the items.
            count: an item → how many, from that one on, to take together.
            work: gets the items of a portion; it must do no harm if it breaks off and is called with fewer.

        Yields:
            The items of each portion, and what came of them.
        """
        left = list(order)
        while left:
            take = min(len(left), count(left[0]), self._most.get(what, len(left)))
            made = self._tried(what, take, work, left[:take])
            if made is not None:
                yield left[:take], made[0]
                left = left[take:]

    def fitting(self, what: str, size: int, work: Callable[[int], T]) -> T:
        """`work(size)`; where memory runs out, the same with half the size, and so on down to 1.

        Args:
            what, work: as for `portions`.
        """
        while True:
            take = min(size, self._most.get(what, size))
            made = self._tried(what, take, work, take)
            if made is not None:
                return made[0]

    def _tried(self, what: str, size: int, work: Callable[[Any], T], given: Any) -> tuple[T] | None:
        """What came of it; None where memory ran out, and fewer are to be tried."""
        try:
            return (work(given),)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Here the error is gone, and with it what its frames held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not self._most:
            warn(f"memory ran out while {what} {size} texts at a time; going on with fewer (--batch-size sets it)")
        self._most[what] = size // 2
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
    return known or should_reduce_batch_size(error)


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a CUDA device has left, what PyTorch holds unused included; None of other devices."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cached(config: Any) -> int:
    """Numbers that all layers keep of a token as keys and values, by what a text decoder's config says."""
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size
