"""Learn a path θ(λ) that follows exact DeRa more closely than the straight line; see `curve.py` for its form.

Texts are sampled from exact DeRa at λ all over the range. One model whose λ differs from row to row of the batch, the tree
of `rows.py` with a `Bent` on each linear layer that Δ changes, is then trained on KL(exact‖path) over the whole range at
once, from the straight line on. One curve serves all λ, and what is learned beyond λ = 1, where the error is large, helps
below, where it is ten times smaller.

A few hundred texts suffice if every step has the right length, and the inputs of a layer vary a thousand times more in
some directions than in others. So the curve's right factor is learned in coordinates in which they vary less, the left one
in units of what Δ itself does (`_measure`). Coordinates in which inputs were white would be too much of it: where they
hardly vary, mostly noise would be learned.

A share of the prompts is held out; of the line and the states on the way, the one that does best on them is kept.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from . import prompts as prompt_files
from .curve import Curve, Part, along, fingerprint
from .errors import DeraError
from .exact import mix
from .pair import ModelPair
from .rows import LowRankRows, MixedRows, Strength, in_rows, shares_of
from .sampling import decode_batch
from .traces import BATCH_TOKENS, Head, Text, Trace, batches, head_of, padded, scored, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .exact import DeraForCausalLM

Kind = Literal["curve", "gains"]
Progress = Callable[[str, int, int], None]


MARGIN = 0.1  # no texts are sampled at λ nearer than this to 0 or 1, where every path is exact
SAMPLED_TOGETHER = 48  # texts decoded in one batch
STEP_TOKENS = 128  # tokens of texts in one step of the optimiser: one or two texts
MEASURED_TOKENS = 2048  # tokens of texts on which inputs of layers are measured
AXES = 64  # directions of a layer's input that are scaled one by one
EVENED = 0.5  # power of their variances that is divided out of their variances: 0 nothing, 1 all
RIDGE = 0.01  # of their mean variance: no variance is taken for smaller
SINKS = 4  # first tokens of a text, whose huge activations would rule all measurements
HELD_OUT = 0.1  # share of the prompts
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # sampling without a warper
GAIN, PROFILE = 0.1, 0.5  # how large the numbers of gains and of profiles are expected to become
_POWER = 1.5  # kl is weighted with |λ(1-λ)| to minus this, so that no part of the range drowns the others
PROMPT_TOKENS = 32  # of a prompt that the pair writes itself


@dataclass(frozen=True)
class Lesson:
    """A text to learn from, the λ that it was sampled at, and both models' states that predict it, (tokens, hidden size)."""

    text: Text
    lam: float
    ref: torch.Tensor
    aligned: torch.Tensor


@dataclass(frozen=True)
class Evener:
    """A linear map W for vectors whose variance is far larger in some directions: of W·x it is less uneven, its mean 1.

    Attributes:
        axes: the directions of the largest variances, (size, n), orthonormal.
        stretch: for each of these, what it is scaled with over what the others are, less 1, (n,).
        unit: what the others are scaled with.
    """

    axes: torch.Tensor
    stretch: torch.Tensor
    unit: torch.Tensor

    @classmethod
    def of(cls, vectors: torch.Tensor) -> Evener:
        """From a sample of vectors (count, size), any float dtype."""
        vectors = vectors.float()
        total = vectors.square().sum(0).mean() / len(vectors)  # mean variance, of one direction
        _, sigma, axes = torch.svd_lowrank(vectors, q=min(AXES + 8, *vectors.shape), niter=2)
        sigma, axes = sigma[:AXES], axes[:, :AXES]
        variances = sigma.square() / len(vectors)
        others = len(axes) - len(sigma)
        rest = (total * len(axes) - variances.sum()) / others if others else variances.min()
        floor = (RIDGE * total).clamp(min=1e-30)
        rest, variances = rest.clamp(min=floor), variances.clamp(min=floor)
        scale = (rest / variances) ** (EVENED / 2)
        unit = ((scale.square() * variances).sum() + others * rest).div(len(axes)).rsqrt()
        return cls(axes, scale - 1, unit)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows·W, (rows, size)."""
        return (rows + (rows @ self.axes * self.stretch) @ self.axes.T) * self.unit


class Bent(torch.nn.Module):
    """A linear layer of `rows.py` with a gain in the place of λ, and a low-rank curve.

    Args:
        module: its name in the model.
        inner: `LowRankRows`, or `MixedRows` of linear layers.
        strength: λ of the rows.
        rank: of the curve; 0 leaves it out.

    Attributes:
        evener: of the layer's inputs; the right factor of the curve is `down` in its coordinates.
        scale: what Δ adds to the output, root mean square.
    """

    def __init__(self, module: str, inner: LowRankRows | MixedRows, strength: Strength, rank: int) -> None:
        super().__init__()
        self.module = module
        self.inner = inner
        self.strength = strength
        inner.strength = _Gained(self)
        into, out = _sizes(inner)
        self.gain = torch.nn.Parameter(torch.zeros(2))
        self.down = torch.nn.Parameter(torch.randn(rank, into) / math.sqrt(into))
        self.up = torch.nn.Parameter(torch.zeros(out, rank))
        self.profile = torch.nn.Parameter(torch.zeros(rank, 2))
        self.evener: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
        self.scale = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    def gains(self) -> torch.Tensor:
        """g(λ) of the rows, (rows,)."""
        lam = self.strength.rows
        c, d = self.gain
        return lam + lam * (1 - lam) * (c + d * lam)

    def right(self) -> torch.Tensor:
        """The right factor of the curve, (rank, in)."""
        return self.evener(self.down)

    def moved(self, x: torch.Tensor) -> torch.Tensor:
        """Δ·x: what the layer makes of its input as the aligned model's, less what it makes of it as the reference's."""
        ends = []
        for lam in (torch.zeros, torch.ones):
            with self.strength.of(lam(len(self.strength.rows), device=x.device), self.strength.tokens):
                ends.append(self.inner(x))
        return ends[1] - ends[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.strength.rows is None or not self.rank:
            return y
        right = self.right()
        t = torch.nn.functional.linear(x.to(right.dtype), right)
        t = t * self.strength.spread(along(self.profile, self.strength.rows), t)
        return y + torch.nn.functional.linear(t, self.up).to(y.dtype)


class _Gained:
    """What a bent layer's inner module asks for its strengths: the gains."""

    def __init__(self, layer: Bent) -> None:
        self._layer = layer

    @property
    def rows(self) -> torch.Tensor | None:
        return None if self._layer.strength.rows is None else self._layer.gains()

    @property
    def shares(self) -> torch.Tensor:
        return shares_of(self._layer.gains())

    def spread(self, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self._layer.strength.spread(rows, values)


def _sizes(inner: LowRankRows | MixedRows) -> tuple[int, int]:
    if isinstance(inner, LowRankRows):
        return inner.down.shape[1], inner.up.shape[1]
    weight = inner.ref.weight
    base = inner.ref.get_base_layer() if hasattr(inner.ref, "get_base_layer") else inner.ref
    return tuple(weight.shape) if isinstance(base, Conv1D) else (weight.shape[1], weight.shape[0])


def calibrate(
    pair: ModelPair,
    lams: Sequence[float],
    prompts: Sequence[str | dict[str, Any]] | None = None,
    *,
    kind: Kind = "curve",
    rank: int = 16,
    texts: int = 256,
    max_new_tokens: int = 48,
    passes: int = 3,
    learning_rate: float = 0.02,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    progress: Progress | None = None,
) -> Curve:
    """Learn a path through the two models that follows exact DeRa, over the range of `lams` at once.

    Args:
        pair: the two models.
        lams: the path is learned for λ from the smallest to the largest of these, both at least 0.
        prompts: what to learn on; default: prompts that the reference writes itself (a chat model continues an open
            user's turn).
        kind: `"curve"`: a gain and a low-rank curve for each layer; `"gains"`: the gains alone.
        rank: of the curve.
        texts: how many to sample from exact DeRa, in all.
        max_new_tokens: their length, in tokens.
        passes: how often to go over the texts, 1 or more.
        learning_rate: Adam's, at its peak, relative to the size that what it changes is expected to have.
        seed: of everything random.
        device, compute_dtype: where and in what the models run.
        progress: called as work goes on.

    Returns:
        The path; `recipe["held_out"]` says what it does to texts of prompts that it was not trained on, and that chose
        which state is kept: mean kl of the straight line and of the path, in nats per token, on each side of λ = 1.

    Raises:
        DeraError: the pair has no weight-space form, there is nothing to learn, or prompts are unusable.
    """
    pair.only_pair("a path is learned")
    lams = pair.known(lams)
    low, high = min(lams), max(lams)
    if low < 0:
        raise DeraError(f"λ={low:g}: paths are learned for λ from 0 on; below 0 the straight line is all there is")
    sides = (max(low, MARGIN), min(high, 1 - MARGIN)), (max(low, 1 + MARGIN), high)
    wanted = [(start, stop) for start, stop in sides if start <= stop]
    if not wanted:
        raise DeraError(f"λ from {low:g} to {high:g} leaves nothing to learn: at 0 and 1 every path is exact")
    if passes < 1:
        raise DeraError(f"passes={passes}: nothing would be learned; give 1 or more")
    if texts < 16:
        raise DeraError(f"--texts {texts} are too few to learn from and to check on; give 16 or more")
    tell = progress or (lambda what, done, total: None)
    set_seed(seed)

    names = _bendable(pair)
    if len({side.config.get("vocab_size") for side in pair.sides}) > 1:
        raise DeraError("the two vocabularies are padded differently; paths are learned for pairs of one size only")
    exact = pair.exact(dtype=compute_dtype, device=device)
    student = exact.rows or in_rows(exact.ref, exact.ref, exact.aligned)
    if student is None:
        raise DeraError("this pair cannot have a λ for each row of a batch (experts, say), so that no path is learned")

    entries = prompt_files.encode(prompts, pair.tokenizer) if prompts is not None else None
    if entries is None:
        entries = prompt_files.encode(own_prompts(pair, exact.ref, math.ceil(texts / len(wanted)), tell), pair.tokenizer)
    ids = [prompt.ids for prompt in entries]
    dice = random.Random(seed)
    # Every prompt for both sides of λ = 1, so that one that is held out is held out for both.
    at = [(number // len(wanted) % len(ids), wanted[number % len(wanted)]) for number in range(texts)]
    used = sorted({prompt for prompt, _ in at})
    if len(used) < 2:
        raise DeraError(f"{len(used)} prompts are too few to hold one out; give more")
    prompt_files.check_lengths(entries, max_new_tokens, pair.context_length)
    unseen = set(dice.sample(used, max(1, round(HELD_OUT * len(used)))))
    drawn = [dice.uniform(*span) for _, span in at]
    lessons = _sampled(pair, exact, ids, [prompt for prompt, _ in at], drawn, unseen, max_new_tokens, tell)
    order = [lesson for lesson in lessons if lesson.text.prompt not in unseen]
    dice.shuffle(order)
    held_out = [lesson for lesson in lessons if lesson.text.prompt in unseen]
    teacher = _Teacher.of(exact, [*order, *held_out])
    student.requires_grad_(False)
    layers = _bend(student, names, rank if kind == "curve" else 0, device)
    if kind == "curve":
        tell("measuring the layers", 0, 1)
        _measure(student, layers, _few(order, dice))
        tell("measuring the layers", 1, 1)
    trainer = _Trainer(student, layers, teacher, len(order), learning_rate)
    trainer.run(passes, dice, tell)
    figures = trainer.keep_best()
    parts = _learned(pair, layers)
    recipe = {
        "ref": pair.ref.source.name, "aligned": pair.aligned.source.name, "kind": kind,
        "rank": rank if kind == "curve" else None, "texts": texts, "max_new_tokens": max_new_tokens, "passes": passes,
        "learning_rate": learning_rate, "seed": seed,
        "prompts": "written by the reference" if prompts is None else len(ids), **figures,
    }  # fmt: skip
    return Curve((low, high), fingerprint(pair), parts, recipe)


def _few(lessons: Sequence[Lesson], dice: random.Random) -> list[Lesson]:
    """Some of the lessons, about `MEASURED_TOKENS` tokens."""
    found: list[Lesson] = []
    tokens = 0
    for lesson in dice.sample(lessons, len(lessons)):
        if tokens >= MEASURED_TOKENS:
            break
        found.append(lesson)
        tokens += len(lesson.text.ids)
    return found


# What is learned from


def own_prompts(
    pair: ModelPair, ref: PreTrainedModel, count: int, tell: Progress = lambda *_: None
) -> list[str | dict[str, Any]]:
    """Prompts that the reference writes at temperature 1: user's turns, or beginnings of texts without a chat template.

    Args:
        count: how many to try for; empty ones and repeats are left out.
    """
    tokenizer = pair.tokenizer
    mark = "\u2063"
    chat = bool(tokenizer.chat_template)
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True)
        opening = tokenizer(text.partition(mark)[0], add_special_tokens=False)["input_ids"]
    else:
        opening = tokenizer("")["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
    found: dict[str, None] = {}
    for done in range(0, count, SAMPLED_TOGETHER):
        rows = [opening] * min(SAMPLED_TOGETHER, count - done)
        for new in decode_batch(ref, tokenizer, rows, max_new_tokens=PROMPT_TOKENS, **PLAIN):
            if text := tokenizer.decode(new, skip_special_tokens=True).strip():
                found[text] = None
        tell("writing prompts", done + len(rows), count)
    if len(found) < 2:
        raise DeraError("the reference writes no prompts of its own; give some with --prompts")
    return [{"messages": [{"role": "user", "content": text}]} if chat else text for text in found]


def _sampled(
    pair: ModelPair, exact: DeraForCausalLM, prompts: list[list[int]], chosen: list[int], lams: list[float],
    unseen: set[int], max_new_tokens: int, tell: Progress,
) -> list[Lesson]:  # fmt: skip
    """One text of exact DeRa for each chosen prompt, each at its own λ.

    What both models make of a prompt comes for nothing, so there is something to learn from it too, from where prompts
    differ; of those that are not to be learned from (`unseen`) the answer alone counts.
    """
    differ = (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    opening = max(1, next(differ, min(map(len, prompts))))
    lessons: list[Lesson] = []
    order = sorted(range(len(chosen)), key=lambda i: len(prompts[chosen[i]]))
    for start in range(0, len(order), SAMPLED_TOGETHER):
        batch = order[start : start + SAMPLED_TOGETHER]
        rows = [prompts[chosen[i]] for i in batch]
        with _recording(exact) as states:
            how = {"max_new_tokens": max_new_tokens, "lam": [lams[i] for i in batch], **PLAIN}
            drawn = decode_batch(exact, pair.tokenizer, rows, **how)
        width = max(map(len, rows))
        for i, ids, new, ref, aligned in zip(batch, rows, drawn, *states(), strict=True):
            first = len(ids) if chosen[i] in unseen else opening
            text = Text(chosen[i], [*ids, *new], first)
            begin = width - len(ids) + first - 1  # prompts are padded on the left
            kept = slice(begin, begin + len(text.completion))
            lessons.append(Lesson(text, lams[i], ref[kept].clone(), aligned[kept].clone()))
        tell("sampling from exact DeRa", len(lessons), len(order))
    return lessons


@contextmanager
def _recording(exact: DeraForCausalLM) -> Iterator[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Keep what both decoders make of every token while they generate, so that the texts need not be read again.

    Gives a function that returns the two models' states (sequences, tokens, hidden size).
    """
    models = [exact.ref, exact.aligned] if exact.rows is None else [exact.rows]
    kept: list[list[torch.Tensor]] = [[] for _ in models]
    hooks = [
        model.base_model.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0]))
        for model, seen in zip(models, kept, strict=True)
    ]

    def states() -> tuple[torch.Tensor, torch.Tensor]:
        joined = [torch.cat(seen, 1) for seen in kept]
        return tuple(joined) if len(joined) == 2 else joined[0].chunk(2)

    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Teacher:
    """What both models make of the lessons: exact DeRa at any λ."""

    lessons: list[Lesson]
    ref: Trace
    aligned: Trace
    rows: int  # of the vocabulary
    starts: list[int] = field(init=False)  # where each lesson's scored tokens begin

    def __post_init__(self) -> None:
        self.starts = [0]
        for lesson in self.lessons:
            self.starts.append(self.starts[-1] + len(lesson.text.completion))

    @classmethod
    def of(cls, exact: DeraForCausalLM, lessons: list[Lesson]) -> _Teacher:
        trace_of(exact.ref, [lessons[0].text])  # refuses a model that is no decoder followed by a head
        sides = (
            Trace(torch.cat([getattr(lesson, side) for lesson in lessons]), head_of(getattr(exact, side)))
            for side in ("ref", "aligned")
        )
        return cls(lessons, *sides, exact.config.vocab_size)

    @torch.no_grad()
    def logits(self, chosen: Sequence[int], lams: torch.Tensor) -> torch.Tensor:
        """h_λ of these lessons' scored tokens, (tokens, vocabulary), with λ for each token."""
        where = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in chosen]).to(self.ref.hidden.device)
        ref, aligned = (side.head(side.hidden[where])[:, : self.rows] for side in (self.ref, self.aligned))
        return mix(ref[:, None], aligned[:, None], lams)[:, 0]


# Learning


def _bendable(pair: ModelPair) -> dict[str, str]:
    """Linear modules that Δ changes → the name of their weight in θ(λ)."""
    tensors = pair.tensors
    found = {}
    for module in pair.architecture.linear:
        name = pair.architecture.stored_name(f"{module}.weight", tensors)
        if name is not None and not pair.is_same(name):
            found[module] = name
    if not found:
        raise DeraError("no linear layer differs between the two; there is no path to learn")
    return found


def _bend(
    student: PreTrainedModel, names: dict[str, str], rank: int, device: str | torch.device
) -> dict[str, Bent]:
    """Put a `Bent` on each of these modules; returns them by the name of their weight."""
    layers = {}
    for module, name in names.items():
        inner = student.get_submodule(module)
        if isinstance(inner, LowRankRows | MixedRows):
            layers[name] = Bent(module, inner, student.dera_strength, rank).to(device)
            student.set_submodule(module, layers[name])
    return layers


@torch.no_grad()
def _measure(student: PreTrainedModel, layers: dict[str, Bent], lessons: Sequence[Lesson]) -> None:
    """Let the straight line read these texts, all in one batch, for each layer's evener and scale."""
    texts = [lesson.text for lesson in lessons]
    ids, mask = padded(texts, student.device)
    lam = torch.tensor([lesson.lam for lesson in lessons], device=student.device)
    kept = mask.bool()
    if ids.shape[1] > SINKS:
        kept[:, :SINKS] = False
    last: list[Any] = [None, None]  # an input and its evener: queries, keys and values have one input

    def look(layer: Bent, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if last[0] is not args[0]:
            last[:] = args[0], Evener.of(args[0][kept])
        layer.evener = last[1]
        layer.scale = float(layer.moved(args[0])[kept].float().square().mean().sqrt())

    hooks = [layer.register_forward_hook(look) for layer in layers.values()]
    try:
        _read(student, ids, mask, lam)
    finally:
        for hook in hooks:
            hook.remove()


def _learned(pair: ModelPair, layers: dict[str, Bent]) -> dict[str, Part]:
    """What the layers have learned, by tensor of θ(λ)."""
    parts: dict[str, Part] = {}
    for name, layer in layers.items():
        parts[name] = _part(layer, layer.module in pair.architecture.transposed)
        bias = pair.architecture.stored_name(f"{layer.module}.bias", pair.tensors)
        if bias is not None and not pair.is_same(bias):  # the gain is that of the whole layer
            parts[bias] = Part(parts[name].gain)
    return parts


def _part(layer: Bent, transposed: bool) -> Part:
    gain, up, down, profile = (
        value.detach().float().cpu() for value in (layer.gain, layer.up, layer.right(), layer.profile)
    )
    if not layer.rank:
        return Part(gain)
    return Part(gain, down.T.contiguous(), up.T.contiguous(), profile) if transposed else Part(gain, up, down, profile)


def _read(student: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, lams: torch.Tensor) -> torch.Tensor:
    """Last hidden states of these texts (texts, tokens, hidden size), each at its own λ (texts,)."""
    how = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(student.base_model.forward).parameters:
        # A position for each token of each row, as learned ones differ between rows with λ.
        how["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    with student.dera_strength.of(lams, ids.shape[1]):
        return student.base_model(**how)[0]


@dataclass(frozen=True)
class _Seen:
    """A state on the way, on the lessons held out: the mean that is minimised, and mean kl on each side of λ = 1."""

    what: str
    goal: float
    kl: dict[str, float]


class _Trainer:
    """Adam on the mean of kl(λ)/|λ(1-λ)|^1.5 over scored tokens."""

    def __init__(
        self, student: PreTrainedModel, layers: dict[str, Bent], teacher: _Teacher, trained: int, learning_rate: float
    ) -> None:
        self.student, self.teacher = student, teacher
        self.trained = range(trained)  # which of the teacher's lessons to learn from; the others are held out
        self.held_out = range(trained, len(teacher.lessons))
        self.seen: list[_Seen] = []
        self.best: list[torch.Tensor] = []
        self.head: Head = head_of(student)
        self.strength: Strength = student.dera_strength
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
        each = lams.repeat_interleave(torch.tensor([len(text.completion) for text in texts], device=device))
        log_p = torch.log_softmax(self.teacher.logits(chosen, each), -1)
        states = _read(self.student, *padded(texts, device), lams)
        with self.strength.of(each, 1):
            log_q = torch.log_softmax(self.head(scored(states, texts))[:, : self.teacher.rows], -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), each

    @torch.no_grad()
    def look(self, what: str) -> None:
        """Measure on the lessons held out, and remember this state if none was better."""
        parts = [self.kl(batch) for batch in self.batches(self.held_out)]
        kl, lams = (torch.cat(values).double() for values in zip(*parts, strict=True))
        sides = {name: float(kl[side].mean()) for name, side in (("inner", lams <= 1), ("outer", lams > 1)) if side.any()}
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
        return {"held_out": sides, "kept": best.what, "objective": {"line": line.goal, "path": best.goal}}

    def batches(self, lessons: range, tokens: int = BATCH_TOKENS) -> list[list[int]]:
        """These lessons in batches of about this many tokens."""
        texts = [self.teacher.lessons[i].text for i in lessons]
        return [[lessons[j] for j in batch] for batch in batches(texts, tokens)]

    def run(self, passes: int, dice: random.Random, tell: Progress) -> None:
        """Train, and look at the line and at a few states on the way."""
        self.look("line")
        steps: list[list[int]] = []
        for _ in range(passes):
            order = self.batches(self.trained, STEP_TOKENS)
            dice.shuffle(order)
            steps += order
        warm = max(1, len(steps) // 20)
        optimiser = torch.optim.Adam([{"params": [p], "lr": self.learning_rate * size} for p, size in self.sizes])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / warm, max(0.02, (len(steps) - step) / (len(steps) - warm + 1)))
        )
        looks = {max(1, round(len(steps) * share)) for share in (0.6, 1.0)}
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with _no_denormals(), torch.enable_grad():
            for number, chosen in enumerate(steps, 1):
                kl, lams = self.kl(chosen)
                (kl * _weight(lams)).mean().backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                schedule.step()
                if number in looks:
                    self.look(f"step {number}")
                tell("learning", number, len(steps))


def _weight(lams: torch.Tensor) -> torch.Tensor:
    return (lams * (1 - lams)).abs() ** -_POWER


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Adam's state fills with numbers so small that processors handle them a hundred times slower; they are zero here."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


