"""Several models of one architecture that pass a layer together, so that no model is ever held whole.

One hollow model stands for all of them. What reads texts with it runs in a thread of its own, the model's own code, and
stops wherever the model comes to a unit: a layer, the embeddings, the last norm. When all have come to one, each
model's weights of that unit are made from the files in turn, put in place, and those threads that belong to that model
go on, one at a time, to the next unit. So any architecture's code runs as it is, experts included, and what is held is
one unit's weights and all threads' hidden states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import DeraError
from ..merging.hollow import Unit, hollow, lacking, units
from ..merging.parameters import Parameters
from ..merging.storage import Storage
from ..models.pair import Pair
from .traces import Text, Trace, decoder_of, head_of, plain_inputs, states_of

Weights = Mapping[str, torch.Tensor]  # name in memory → tensor, made when it is asked for


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
    """A hollow model that is several.

    Args:
        model: with parameters on the meta device.
        weights: of each of the models that it stands for.
        device: where they run.
    """

    def __init__(self, model: torch.nn.Module, weights: Sequence[Weights], device: torch.device | str = "cpu") -> None:
        self.model, self.weights, self.device = model, weights, torch.device(device)
        self._tensors = lacking(model, weights[0])
        self._units = list(units(model, self._tensors))
        self._here = threading.local()
        self._back = threading.Semaphore(0)

    def run(self, work: Sequence[tuple[int, Callable[[], Any]]]) -> list[Any]:
        """What each function returns; it may call the model, or any part of it, as the one of that number.

        Raises:
            DeraError: the model reaches weights without passing through the module that has them.
        """
        readers = [_Reader(model, function) for model, function in work]
        hooks = [unit.module.register_forward_pre_hook(self._stop_at(unit)) for unit in self._units]
        threads = [threading.Thread(target=self._read, args=(reader,), daemon=True) for reader in readers]
        try:
            for thread, reader in zip(threads, readers, strict=True):
                thread.start()
                self._go_on(reader)
            while waiting := [reader for reader in readers if not reader.done]:
                unit = next(unit for unit in self._units if any(reader.at is unit for reader in waiting))
                for number in dict.fromkeys(reader.model for reader in waiting if reader.at is unit):
                    with self._filled(unit, self.weights[number]):
                        for reader in waiting:
                            if reader.model == number and reader.at is unit:
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
    def filled_beside(self, part: str, number: int) -> Iterator[None]:
        """All weights but those of a part, of the model of that number, for as long as the context lasts."""
        names = [name for name in self._tensors if not name.startswith(f"{part}.")]
        with self._filled(Unit(self.model, names), self.weights[number]):
            yield

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
    def _filled(self, unit: Unit, weights: Weights) -> Iterator[None]:
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

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        return (module._parameters if key in module._parameters else module._buffers), key


@torch.no_grad()
def wide_trace(pair: Pair, texts: list[Text], device: torch.device | str) -> Trace:
    """What the reference makes of texts in float32, a layer of which is held at a time."""
    weights = Parameters(pair, pair.ends()[0], Storage.of(pair.names, torch.float32, None, 0))
    model = hollow(pair, torch.float32)
    in_step, (part, decoder) = InStep(model, [weights], device), decoder_of(model)
    place = torch.device(device)

    def read(text: Text) -> torch.Tensor:
        return states_of(decoder, [text], plain_inputs([text], place))[0]

    states = in_step.run([(0, lambda text=text: read(text)) for text in texts])
    with in_step.filled_beside(part, 0):
        return Trace(torch.cat(states), head_of(model, []))
