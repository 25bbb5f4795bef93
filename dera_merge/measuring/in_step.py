"""Several models of one architecture that pass a layer together, so that no model is ever held whole.

One hollow model stands for all of them. What reads texts with it runs in a thread of its own, the model's own code, and
stops wherever the model comes to a unit: a layer, the embeddings, the last norm. When all have come to one, each
model's weights of that unit are made in turn, put in place, and those threads that belong to that model go on, one at a
time, to the next unit. So any architecture's code runs as it is, experts included. What is held is one unit's weights,
what the files have of it and of the next one, which is read meanwhile, and all threads' hidden states. What the files
have of a head is held from its first use on, so that each byte is read once, whether embeddings are tied to it or not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from ..errors import DeraError
from ..files.ahead import Ahead, Source
from ..files.buffers import give_back
from ..merging.hollow import Unit, hollow, lacking, units
from ..merging.parameters import Parameters
from ..merging.storage import Storage
from ..models.pair import Pair
from .traces import Text, Trace, decoder_of, head_of, plain_inputs, states_of
from .unmerged import Sums, added

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Stopped(BaseException):
    """Ends a thread whose result nobody waits for any more."""


@dataclass(eq=False)
class _Reader:
    """A thread that reads texts with one of the models."""

    model: int
    work: Callable[[], Any]
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    at: Unit | None = None  # where it waits
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    stopped: bool = False


class InStep:
    """A hollow model that is several; a context, at whose end nothing of the files is held any longer.

    Args:
        model: with parameters on the meta device.
        weights: of each of the models that it stands for, all of one pair.
        device: where they run.
        sums: number of a model → what stays beside its weights.

    Attributes:
        decoder: of the model, see `decoder_of`; all around it is the head.
    """

    def __init__(
        self, model: PreTrainedModel, weights: Sequence[Parameters], device: torch.device | str = "cpu",
        sums: Mapping[int, Sums] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.weights, self.device, self._sums = model, weights, torch.device(device), sums or {}
        part, self.decoder = decoder_of(model)
        tensors = lacking(model, weights[0])
        self._head = [name for name in tensors if not name.startswith(f"{part}.")]
        self._units = list(units(model, tensors))
        self._ahead = Ahead()
        self._here = threading.local()
        self._back = threading.Semaphore(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._ahead.close()

    def run(self, work: Sequence[tuple[int, Callable[[], Any]]]) -> list[Any]:
        """What each function returns; it may call the model, or any part of it, as the one of that number.

        Raises:
            DeraError: the model reaches weights without passing through the module that has them.
        """
        readers = [_Reader(model, function) for model, function in work]
        hooks = [unit.module.register_forward_pre_hook(self._stop_at(unit)) for unit in self._units]
        done: list[Unit] = []
        threads = [threading.Thread(target=self._read, args=(reader,), daemon=True) for reader in readers]
        try:
            for thread, reader in zip(threads, readers, strict=True):
                thread.start()
                self._go_on(reader)
            while waiting := [reader for reader in readers if not reader.done]:
                unit = next(unit for unit in self._units if any(reader.at is unit for reader in waiting))
                here = [reader for reader in waiting if reader.at is unit]
                with self._at_hand(unit, done):
                    for number in dict.fromkeys(reader.model for reader in here):
                        layers = dict.fromkeys(name.rpartition(".")[0] for name in unit.tensors)
                        beside = added(self.model, layers, self._sums.get(number, {}), self.device)
                        with self._filled(unit, self.weights[number]), beside:
                            for reader in here:
                                if reader.model == number:
                                    self._go_on(reader)
        finally:
            for reader in readers:
                if reader.at is not None:
                    reader.stopped = True
                    self._go_on(reader)
            for hook in hooks:
                hook.remove()
        return [reader.result for reader in readers]

    @contextmanager
    def with_head(self, number: int) -> Iterator[None]:
        """All weights but the decoder's, of the model of that number, for as long as this lasts."""
        self._ahead.hold(self._sources(self._head))
        with self._filled(Unit(self.model, self._head), self.weights[number]):
            yield

    # What the files have

    def _sources(self, tensors: Iterable[str]) -> dict[Source, None]:
        known = [name for name in tensors if name in self.weights[0]]
        return dict.fromkeys(source for weights in self.weights for source in weights.sources(known))

    @contextmanager
    def _at_hand(self, unit: Unit, done: list[Unit]) -> Iterator[None]:
        """What a unit is made of, read for all models while this lasts; and what follows is read meanwhile."""
        done.append(unit)
        own, stay = self._sources(unit.tensors), self._sources(self._head)
        self._ahead.hold(own)
        coming = (each for each in self._units[self._units.index(unit) :] if each not in done)
        if following := next(coming, None):
            self._ahead.begin(self._sources(following.tensors))
        try:
            yield
        finally:
            self._ahead.let_go(own.keys() - stay.keys())

    # One thread at a time

    def _go_on(self, reader: _Reader) -> None:
        """Let a reader run until it waits at a unit, or is done."""
        reader.turn.release()
        self._back.acquire()
        if reader.error is not None:
            error, reader.error = reader.error, None
            raise error

    def _read(self, reader: _Reader) -> None:
        self._here.reader = reader
        reader.turn.acquire()
        try:
            if not reader.stopped:
                with torch.no_grad():
                    reader.result = reader.work()
        except _Stopped:
            pass
        except BaseException as error:
            reader.error = error
            if isinstance(error, RuntimeError) and "meta" in str(error):  # what torch says of tensors without data
                reader.error = DeraError(
                    f"{type(self.model).__name__} reaches weights without passing through the module that has them, "
                    f"so it cannot be read layer by layer ({str(error).splitlines()[0]:.120})"
                )
        reader.done = True
        self._back.release()

    def _stop_at(self, unit: Unit) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any) -> None:
            reader = getattr(self._here, "reader", None)
            if reader is None:  # not one of ours: all weights are there
                return
            reader.at = unit
            self._back.release()
            reader.turn.acquire()
            reader.at = None
            if reader.stopped:
                raise _Stopped

        return hook

    @contextmanager
    def _filled(self, unit: Unit, weights: Parameters) -> Iterator[None]:
        """Put weights in their places, and take them out again."""
        made: dict[str, torch.Tensor] = {}
        places = [self._place(name) for name in unit.tensors]
        before = [owner[key] for owner, key in places]
        for (owner, key), name, empty in zip(places, unit.tensors, before, strict=True):
            if name not in weights:
                raise DeraError(f"{name} is nowhere in the files, so the model cannot be read layer by layer")
            if name not in made:
                made[name] = weights[name].to(self.device, empty.dtype)
            owner[key] = torch.nn.Parameter(made[name], False) if isinstance(empty, torch.nn.Parameter) else made[name]
        try:
            yield
        finally:
            for (owner, key), empty in zip(places, before, strict=True):
                owner[key] = empty
            made.clear()
            give_back()  # each of a score of threads keeps what its layer took, else

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        return (module._parameters if key in module._parameters else module._buffers), key


@torch.no_grad()
def wide_trace(pair: Pair, texts: list[Text], device: torch.device | str) -> Trace:
    """What the reference makes of texts in float32, a layer of which is held at a time."""
    weights = Parameters.at(pair, pair.ends()[0], Storage.of(pair.names, torch.float32, None, 0))
    model, place = hollow(pair, torch.float32), torch.device(device)

    def read(text: Text) -> torch.Tensor:
        return states_of(in_step.decoder, [text], plain_inputs([text], place))[0]

    with InStep(model, [weights], place) as in_step:
        states = in_step.run([(0, lambda text=text: read(text)) for text in texts])
        with in_step.with_head(0):
            return Trace(torch.cat(states), head_of(model, []))
