"""Train a path on KL(exact‖path) over the whole range of λ at once."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ..decoding.mix import mix, shares_of
from ..decoding.rows import Strength
from ..measuring.ledger import Ledger
from ..measuring.traces import Head, Heads, batches, head_of, longest_first, padded, scored, trace_of
from ..progress import Progress
from ..texts.batches import Batches
from .layers import Bent, read_states
from .lessons import Arrays, Lesson, as_array

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..decoding.exact import DeraForCausalLM

STEP_TOKENS = 128  # tokens of texts in one step of the optimiser: one or two texts
LOOKED_AT = 2048  # tokens held out of which there are distributions at a time
STEPS = 800  # of the optimiser, on an accelerator: of more texts, it takes more in one step
LEARNING = "learning"  # the step of the ledger
KEEP_SECONDS, KEEP_SHARE = 20, 0.02  # between two times that the state is kept, or more: what share of time it may take
GAIN, PROFILE = 0.1, 0.5  # how large the numbers of gains and of profiles are expected to become
_POWER = 1.5  # kl is weighted with |λ(1-λ)| to minus this, so that no part of the range drowns the others


@dataclass(frozen=True)
class Teacher:
    """What both models make of the lessons: exact DeRa at any λ. Held are the heads alone; the lessons have the states.

    Attributes:
        ref, aligned: heads, hidden states (tokens, hidden size) → logits.
        rows: of the vocabulary.
    """

    lessons: list[Lesson]
    ref: Head
    aligned: Head
    rows: int

    @classmethod
    def of(cls, exact: DeraForCausalLM, lessons: list[Lesson], heads: Heads = None) -> Teacher:
        """Raises DeraError where `compare` could not measure these models. `heads`: as for `head_of`."""
        trace_of(exact.ref, [lessons[0].text], heads)  # refuses a model that is no decoder followed by a head
        return cls(lessons, head_of(exact.ref, heads), head_of(exact.aligned, heads), exact.config.vocab_size)

    def states(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Both models' states of these lessons' scored tokens, (tokens, hidden size), on the host."""
        lessons = [self.lessons[i] for i in chosen]
        return torch.cat([lesson.ref for lesson in lessons]), torch.cat([lesson.aligned for lesson in lessons])

    @torch.no_grad()
    def logits(self, ref: torch.Tensor, aligned: torch.Tensor, lams: torch.Tensor) -> torch.Tensor:
        """h_λ of these states, (tokens, vocabulary), with λ for each token."""
        sides = ((self.ref, ref), (self.aligned, aligned))
        logits = [head(hidden.to(lams.device))[:, None, : self.rows] for head, hidden in sides]
        return mix(logits, shares_of(lams))[:, 0]


@dataclass(frozen=True)
class _Seen:
    """A state on the way, on the lessons held out: the mean that is minimised, and mean kl on each side of λ = 1."""

    state: str
    goal: float
    kl: dict[str, float]


class Trainer:
    """Adam on the mean of kl(λ)/|λ(1-λ)|^1.5 over scored tokens; it learns from the first `trained` lessons.

    Args:
        heads: as for `head_of`.
        together: of how many tokens there are distributions over the vocabulary at a time; they are made again for the
            gradient. None: of all of a step, which are kept.
    """

    def __init__(
        self, student: PreTrainedModel, layers: dict[str, Bent], teacher: Teacher, trained: int, learning_rate: float,
        room: Batches | None = None, heads: Heads = None, together: int | None = None,
    ) -> None:  # fmt: skip
        self.student, self.teacher = student, teacher
        self.trained = range(trained)  # which of the teacher's lessons to learn from; the others are held out
        self.held_out = range(trained, len(teacher.lessons))
        self.seen: list[_Seen] = []
        self.best: list[torch.Tensor] = []
        self.head: Head = head_of(student, heads)
        self.together = together
        self.strength: Strength = student.dera_strength
        self.room = room or Batches()
        self.learning_rate = learning_rate
        # A step of Adam moves every number by about the rate, so each has the rate in units of what it should become.
        self.sizes = [(layer.gain, GAIN) for layer in layers.values()]
        for layer in layers.values():
            if layer.rank:
                self.sizes.append((layer.down, 1 / math.sqrt(layer.down.shape[1])))
                self.sizes.append((layer.up, layer.scale / math.sqrt(layer.rank)))
                self.sizes.append((layer.profile, PROFILE))
        self.parameters = [parameter for parameter, _ in self.sizes]

    def kl(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(exact‖path) of the lessons' scored tokens (tokens,) in nats, and the λ of each."""
        lessons = [self.teacher.lessons[i] for i in chosen]
        texts = [lesson.text for lesson in lessons]
        device = self.student.device
        lams = torch.tensor([lesson.lam for lesson in lessons], dtype=torch.float32, device=device)
        token_lams = lams.repeat_interleave(torch.tensor([len(text.completion) for text in texts], device=device))
        states = scored(read_states(self.student, *padded(texts, device), lams), texts)
        rows = [states, *self.teacher.states(chosen), token_lams]
        learns = torch.is_grad_enabled()
        together = self.together or (len(states) if learns else LOOKED_AT)
        parts = zip(*(values.split(together) for values in rows), strict=True)
        if self.together and learns:
            kl = [checkpoint(self._kl, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            kl = [self._kl(*part) for part in parts]
        return torch.cat(kl), token_lams

    def _kl(
        self, states: torch.Tensor, ref: torch.Tensor, aligned: torch.Tensor, lams: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """KL(exact‖path) of some tokens, of last hidden states of the student and of both models, at λ of each."""
        log_p = torch.log_softmax(self.teacher.logits(ref, aligned, lams), -1)
        with self.strength.of(lams, 1):
            log_q = torch.log_softmax(self.head(states)[:, : self.teacher.rows], -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    @torch.no_grad()
    def look(self, what: str) -> None:
        """Measure this state on the lessons held out, and remember it if none was better; `what` is its name."""
        texts = [self.teacher.lessons[i].text for i in self.held_out]
        order = [self.held_out[j] for j in longest_first(texts)]
        portions = self.room.portions("reading", order, self._read_together, self.kl)
        parts = [figures for _, figures in portions]
        kl, lams = (torch.cat(values).double() for values in zip(*parts, strict=True))
        sides = {
            name: float(kl[side].mean()) for name, side in (("inner", lams <= 1), ("outer", lams > 1)) if side.any()
        }
        self.seen.append(_Seen(what, float((kl * _weight(lams)).mean()), sides))
        if self.seen[-1].goal <= min(seen.goal for seen in self.seen):
            self.best = [parameter.detach().clone() for parameter in self.parameters]

    def keep_best(self) -> dict[str, Any]:
        """Go back to the best state. Returns what a path's recipe says of it."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
        line, best = self.seen[0], min(self.seen, key=lambda seen: seen.goal)
        beyond = sum(self.teacher.lessons[i].lam > 1 for i in self.held_out)
        texts = {"inner": len(self.held_out) - beyond, "outer": beyond}
        sides = {name: {"texts": texts[name], "line": line.kl[name], "path": best.kl[name]} for name in line.kl}
        return {"held_out": sides, "kept": best.state, "objective": {"line": line.goal, "path": best.goal}}

    def _read_together(self, lesson: int) -> int:
        return self.room.read(self.student, len(self.teacher.lessons[lesson].text.ids))

    def batches(self, passes: int) -> list[list[int]]:
        """The lessons to learn from, in the batches of one pass: as many texts as were asked for, or so many tokens."""
        texts = [self.teacher.lessons[i].text for i in self.trained]
        if (size := self.room.size) is not None:
            order = longest_first(texts)
            return [order[start : start + size] for start in range(0, len(order), size)]
        tokens = sum(len(text.ids) for text in texts)
        return list(batches(texts, step_tokens(tokens, passes, self.student.device.type == "cpu")))

    def run(self, passes: int, dice: random.Random, tell: Progress, ledger: Ledger) -> None:
        """Train, and look at the line and at a few states on the way; the ledger keeps how far it is."""
        steps: list[list[int]] = []
        for _ in range(passes):
            order = self.batches(passes)
            dice.shuffle(order)
            steps += order
        rate = self.learning_rate * self._rate_of(steps)
        warm = max(1, len(steps) // 20)
        optimiser = torch.optim.Adam([{"params": [p], "lr": rate * size} for p, size in self.sizes])
        looks = {max(1, round(len(steps) * share)) for share in (0.6, 1.0)}
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        begun = self._recall(optimiser, ledger.recall(LEARNING)) if ledger.has(LEARNING) else 0
        if not begun:
            self.look("line")
        due = time.monotonic() + KEEP_SECONDS
        with _no_denormals(), torch.enable_grad():
            for number, chosen in enumerate(steps[begun:], begun + 1):
                share = min(number / warm, max(0.02, (len(steps) - number + 1) / (len(steps) - warm + 1)))
                for group, (_, size) in zip(optimiser.param_groups, self.sizes, strict=True):
                    group["lr"] = share * rate * size
                self._backward(chosen, optimiser)
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                if number in looks:
                    self.look(f"step {number}")
                if time.monotonic() >= due:
                    writing = time.monotonic()
                    ledger.keep(LEARNING, self._state(optimiser, number))
                    due = time.monotonic() + max(KEEP_SECONDS, (time.monotonic() - writing) / KEEP_SHARE)
                tell("learning", number, len(steps))

    def _rate_of(self, steps: Sequence[Sequence[int]]) -> float:
        """The learning rate of these batches relative to that of the usual ones.

        Adam's goes with the root of their size (Malladi et al., 2022).
        """
        texts = [self.teacher.lessons[i].text for i in self.trained]
        usual = len(texts) / sum(1 for _ in batches(texts, STEP_TOKENS))
        mean = sum(map(len, steps)) / len(steps)
        return 1.0 if self.room.size is None and self.student.device.type == "cpu" else math.sqrt(mean / usual)

    def _backward(self, chosen: Sequence[int], optimiser: torch.optim.Optimizer) -> None:
        """The gradient of one step; in parts where memory does not hold it whole."""
        tokens = sum(len(self.teacher.lessons[i].text.completion) for i in chosen)

        def work(size: int) -> None:
            optimiser.zero_grad(set_to_none=True)  # of what broke off
            for start in range(0, len(chosen), size):
                part = chosen[start : start + size]
                kl, lams = self.kl(part)
                loss = kl * _weight(lams)
                (loss.mean() if len(part) == len(chosen) else loss.sum() / tokens).backward()

        self.room.fitting("learning from", len(chosen), work)

    def _state(self, optimiser: torch.optim.Adam, number: int) -> Arrays:
        """Everything that step `number` left and that the next ones need."""
        moments = [optimiser.state[parameter] for parameter in self.parameters]
        lists = {
            "value": self.parameters, "best": self.best, "mean": [moment["exp_avg"] for moment in moments],
            "square": [moment["exp_avg_sq"] for moment in moments],
        }  # fmt: skip
        arrays = {f"{kind}-{i}": x.detach().cpu().numpy() for kind, list_ in lists.items() for i, x in enumerate(list_)}
        return arrays | {"number": np.array(number), "seen": as_array([asdict(seen) for seen in self.seen])}

    def _recall(self, optimiser: torch.optim.Adam, arrays: Arrays) -> int:
        """Go back to a `_state`; returns its number."""
        number = int(arrays["number"])

        def tensors(kind: str) -> list[torch.Tensor]:
            return [torch.from_numpy(arrays[f"{kind}-{i}"]).to(p.device) for i, p in enumerate(self.parameters)]

        with torch.no_grad():
            for parameter, value in zip(self.parameters, tensors("value"), strict=True):
                parameter.copy_(value)
        state = {
            i: {"step": torch.tensor(float(number)), "exp_avg": mean, "exp_avg_sq": square}
            for i, (mean, square) in enumerate(zip(tensors("mean"), tensors("square"), strict=True))
        }
        optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
        self.best, self.seen = tensors("best"), [_Seen(**seen) for seen in json.loads(arrays["seen"].tobytes())]
        return number


def step_tokens(tokens: int, passes: int, on_cpu: bool) -> int:
    """Tokens of a step, of so many that are gone over so often."""
    return STEP_TOKENS if on_cpu else max(STEP_TOKENS, passes * tokens // STEPS)


def _weight(lams: torch.Tensor) -> torch.Tensor:
    """What kl at each λ counts."""
    return (lams * (1 - lams)).abs() ** -_POWER


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Take denormal numbers for 0: Adam's state fills with them, and processors are a hundred times slower then."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
