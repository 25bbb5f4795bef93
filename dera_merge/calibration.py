"""Learn a path θ(λ) that follows exact DeRa more closely than the straight line; see `curve.py` for its form.

Texts are sampled from exact DeRa at λ all over the range. Then, in two steps:

1. In closed form (`_solve`). Hidden states of a model that follows exact DeRa are close to (1-λ) times the reference's and
   λ times the aligned one's. So let the straight line read the texts with every layer's output replaced by that
   interpolation: what a layer makes of its input x then is off by an error e that is its own, from Δ acting on states that
   moved, and from the softmax, activation or norm before it. What of e is linear in x, a ridge regression says, for all
   layers in one pass: the C of low rank that minimises Σ w·|e - λ(1-λ)·C·x|², and λ(1-λ)·C is the bend. No gradient.
2. By gradient (`_Trainer`), for what is not linear: one model whose λ differs from row to row of the batch, the tree of
   `rows.py` with a bend on each linear layer that Δ changes, is trained on KL(exact‖path) over the whole range at once.

A share of the prompts is held out; of line, closed form and trained path, the one that does best on them is kept.
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
from .curve import BRANCHES, Curve, Part, fingerprint
from .errors import DeraError
from .exact import mix
from .pair import ModelPair
from .rows import LowRankRows, MixedRows, Strength, in_rows, shares_of
from .sampling import decode_batch
from .traces import Head, Text, Trace, batches, head_of, padded, scored, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .exact import DeraForCausalLM

Kind = Literal["curve", "gains"]
Progress = Callable[[str, int, int], None]


MARGIN = 0.1  # no texts are sampled at λ nearer than this to 0 or 1, where every path is exact
SAMPLED_TOGETHER = 48  # texts decoded in one batch
STEP_TOKENS = 512  # tokens of texts in one step of the optimiser
RIDGE = 0.01  # of the mean square of a layer's inputs
SINKS = 4  # first tokens of a text, whose huge activations would rule a regression
MOMENTS = 4 << 30  # bytes of second moments of inputs that are held at a time
HELD_OUT = 0.1  # share of the prompts
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # sampling without a warper
GAIN, UP = 0.1, 1e-3  # how large gains, and factors that begin at zero, are expected to become
_POWER = 1.5  # kl is weighted with |λ(1-λ)| to minus this, so that no part of the range drowns the others
PROMPT_TOKENS = 32  # of a prompt that the pair writes itself


@dataclass(frozen=True)
class Lesson:
    """A text to learn from, the λ that it was sampled at, and both models' states that predict it, (tokens, hidden size)."""

    text: Text
    lam: float
    ref: torch.Tensor
    aligned: torch.Tensor


class Bent(torch.nn.Module):
    """A linear layer of `rows.py` with a gain in the place of λ and a low-rank curve, one set of each for a branch.

    Args:
        module: its name in the model.
        inner: `LowRankRows`, or `MixedRows` of linear layers.
        strength: λ of the rows.
        rank: of the curve; 0 leaves it out.
    """

    def __init__(self, module: str, inner: LowRankRows | MixedRows, strength: Strength, rank: int) -> None:
        super().__init__()
        self.module = module
        self.inner = inner
        self.strength = strength
        self.branch = 0
        self.gain = torch.nn.ParameterList(torch.zeros(2) for _ in BRANCHES)
        inner.strength = _Gained(self)
        into, out = _sizes(inner)
        self.down = torch.nn.ParameterList(torch.empty(rank, into) for _ in BRANCHES if rank)
        self.up = torch.nn.ParameterList(torch.zeros(out, rank) for _ in BRANCHES if rank)
        for down in self.down:
            torch.nn.init.kaiming_uniform_(down, a=math.sqrt(5))  # as LoRA's A

    @torch.no_grad()
    def solve(self, branch: int, across: torch.Tensor, square: torch.Tensor) -> None:
        """Set up·down to the matrix C of this rank that minimises Σ|y - C·x|² + a ridge: reduced-rank regression.

        Args:
            across, square: Σ y·xᵀ (out, in) and Σ x·xᵀ (in, in), weights included.
        """
        if not bool(square.any()):
            return
        square = square.double()
        square.diagonal().add_(RIDGE * square.diagonal().mean())
        root = torch.linalg.cholesky(square)
        # In coordinates where inputs are white, the best of a rank are the first singular vectors of across·root⁻ᵀ.
        white = torch.linalg.solve_triangular(root, across.double().T, upper=False).T
        rank = self.up[branch].shape[1]
        u, sigma, v = torch.svd_lowrank(white, q=min(2 * rank + 8, *white.shape), niter=4)
        used = min(rank, len(sigma))
        left = u[:, :used] * sigma[:used]
        right = torch.linalg.solve_triangular(root.T, v[:, :used], upper=True).T
        balance = (left.norm(dim=0) / right.norm(dim=1)).sqrt().clamp(min=1e-30)  # a step is to move both alike
        self.up[branch][:, :used] = (left / balance).to(self.up[branch])
        self.down[branch][:used] = (right * balance[:, None]).to(self.down[branch])

    def gains(self) -> torch.Tensor:
        """g(λ) of the rows, (rows,)."""
        lam = self.strength.rows
        c, d = self.gain[self.branch]
        return lam + lam * (1 - lam) * (c + d * lam)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if self.strength.rows is None or not len(self.down):
            return y
        t = torch.nn.functional.linear(x.to(self.down[self.branch].dtype), self.down[self.branch])
        lam = self.strength.spread(self.strength.rows, t)
        return y + torch.nn.functional.linear(t * (lam * (1 - lam)), self.up[self.branch]).to(y.dtype)


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
    texts: int = 512,
    max_new_tokens: int = 48,
    passes: int = 1,
    learning_rate: float = 0.01,
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
        passes: how often to go over the texts by gradient; 0 leaves the closed form as it is.
        learning_rate: Adam's, at its peak, relative to the size of what it changes.
        seed: of everything random.
        device, compute_dtype: where and in what the models run.
        progress: called as work goes on.

    Returns:
        The path; `recipe["held_out"]` says what it does to texts of prompts that it was not trained on, and that chose
        which state is kept: mean kl of the straight line and of the path, in nats per token, for each branch.

    Raises:
        DeraError: the pair has no weight-space form, there is nothing to learn, or prompts are unusable.
    """
    pair.only_pair("a path is learned")
    lams = pair.known(lams)
    low, high = min(lams), max(lams)
    if low < 0:
        raise DeraError(f"λ={low:g}: paths are learned for λ from 0 on; below 0 the straight line is all there is")
    ranges = [(max(low, MARGIN), min(high, 1 - MARGIN)), (max(low, 1 + MARGIN), high)]
    wanted = [branch for branch, (start, stop) in enumerate(ranges) if start <= stop]
    if not wanted:
        raise DeraError(f"λ from {low:g} to {high:g} leaves nothing to learn: at 0 and 1 every path is exact")
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
    drawn = [dice.uniform(*ranges[branch]) for _, branch in at]
    lessons = _sampled(pair, exact, ids, [prompt for prompt, _ in at], drawn, max_new_tokens, tell)
    unseen = set(dice.sample(used, max(1, round(HELD_OUT * len(used)))))
    order = [lesson for lesson in lessons if lesson.text.prompt not in unseen]
    dice.shuffle(order)
    held_out = [lesson for lesson in lessons if lesson.text.prompt in unseen]
    teacher = _Teacher.of(exact, [*order, *held_out])
    student.requires_grad_(False)
    layers = _bend(student, names, rank if kind == "curve" else 0, device)
    figures: dict[str, Any] = {}
    for branch in wanted:
        for layer in layers.values():
            layer.branch = branch
        mine = [[i for i, lesson in enumerate(teacher.lessons) if (lesson.lam > 1) == branch and group(i)]
                for group in (lambda i: i < len(order), lambda i: i >= len(order))]  # fmt: skip
        if not mine[0] or not mine[1]:
            raise DeraError("too few texts on one side of λ=1; give more --texts or prompts")
        trainer = _Trainer(student, layers, teacher, branch, learning_rate)
        trainer.look("line", mine[1])
        if kind == "curve":
            _solve(exact, student, layers, [teacher.lessons[i] for i in mine[0]], branch, tell)
            trainer.look("closed form", mine[1])
        trainer.run(*mine, passes, dice, tell)
        figures[BRANCHES[branch]] = {"texts": len(mine[1])} | trainer.keep_best()
    parts = _learned(pair, layers, wanted)
    recipe = {
        "ref": pair.ref.source.name, "aligned": pair.aligned.source.name, "kind": kind,
        "rank": rank if kind == "curve" else None, "texts": texts, "max_new_tokens": max_new_tokens, "passes": passes,
        "learning_rate": learning_rate, "seed": seed,
        "prompts": "written by the reference" if prompts is None else len(ids), "held_out": figures,
    }  # fmt: skip
    return Curve((low, high), fingerprint(pair), parts, recipe)


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
    max_new_tokens: int, tell: Progress,
) -> list[Lesson]:  # fmt: skip
    """One text of exact DeRa for each chosen prompt, each at its own λ."""
    lessons: list[Lesson] = []
    order = sorted(range(len(chosen)), key=lambda i: len(prompts[chosen[i]]))
    for start in range(0, len(order), SAMPLED_TOGETHER):
        batch = order[start : start + SAMPLED_TOGETHER]
        rows = [prompts[chosen[i]] for i in batch]
        with _recording(exact) as states:
            how = {"max_new_tokens": max_new_tokens, "lam": [lams[i] for i in batch], **PLAIN}
            drawn = decode_batch(exact, pair.tokenizer, rows, **how)
        for i, ids, new, ref, aligned in zip(batch, rows, drawn, *states(), strict=True):
            text = Text(chosen[i], [*ids, *new], len(ids))
            lessons.append(Lesson(text, lams[i], ref[: len(new)].clone(), aligned[: len(new)].clone()))
        tell("sampling from exact DeRa", len(lessons), len(order))
    return lessons


@contextmanager
def _recording(exact: DeraForCausalLM) -> Iterator[Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """Keep what both decoders make of the last token at each step, so that the texts need not be read again.

    Gives a function that returns the two models' states (sequences, steps, hidden size).
    """
    models = [exact.ref, exact.aligned] if exact.rows is None else [exact.rows]
    kept: list[list[torch.Tensor]] = [[] for _ in models]
    hooks = [
        model.base_model.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0][:, -1]))
        for model, seen in zip(models, kept, strict=True)
    ]

    def states() -> tuple[torch.Tensor, torch.Tensor]:
        stacked = [torch.stack(seen, 1) for seen in kept]
        return tuple(stacked) if len(stacked) == 2 else stacked[0].chunk(2)

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
def _solve(
    exact: DeraForCausalLM, student: PreTrainedModel, layers: dict[str, Bent], lessons: list[Lesson], branch: int,
    tell: Progress,
) -> None:  # fmt: skip
    """Set each layer's low-rank curve in closed form: the ridge regression of its own error on its input."""
    waiting = list(layers.values())
    while waiting:
        chunk = [waiting.pop(0)]
        while waiting and sum(map(_moment_bytes, [*chunk, waiting[0]])) <= MOMENTS:
            chunk.append(waiting.pop(0))
        for layer, sums in zip(chunk, _moments(exact, student, layers, chunk, lessons, tell), strict=True):
            layer.solve(branch, *sums)


def _moment_bytes(layer: Bent) -> int:
    into, out = _sizes(layer.inner)
    return 4 * into * (into + out)


def _moments(
    exact: DeraForCausalLM, student: PreTrainedModel, layers: dict[str, Bent], chunk: list[Bent], lessons: list[Lesson],
    tell: Progress,
) -> list[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Σ w·u·e·xᵀ (out, in) and Σ w·u²·x·xᵀ (in, in) over tokens for these layers, u = λ(1-λ); λ is each text's own.

    The outputs of all layers are interpolated between the two models', so that x has no error of the layers before.
    """
    sums = {layer.module: [torch.zeros(()), torch.zeros(())] for layer in chunk}
    texts = [lesson.text for lesson in lessons]
    order = list(batches(texts, STEP_TOKENS))
    for number, batch in enumerate(order, 1):
        ids, mask = padded([texts[i] for i in batch], student.device)
        lam = torch.tensor([lessons[i].lam for i in batch], device=student.device)
        kept = mask.bool()
        kept[:, :SINKS] = False
        regression = _Regression(sums, _interpolated(exact, layers, ids, mask, lam), kept, lam)
        with _watched(student, layers, regression), student.dera_strength.of(lam, ids.shape[1]):
            student.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **_places(student, ids))
        tell("solving the layers", number, len(order))
    return [tuple(sums[layer.module]) for layer in chunk]


def _interpolated(
    exact: DeraForCausalLM, layers: dict[str, Bent], ids: torch.Tensor, mask: torch.Tensor, lam: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Outputs of these layers, (1-λ) times the reference's and λ times the aligned model's, (texts, tokens, out)."""
    found: dict[str, torch.Tensor] = {}
    aligned = exact.aligned if exact.rows is None else exact.rows
    for model, share in ((exact.ref, 1 - lam), (aligned, lam)):

        def add(name: str, x: torch.Tensor, y: torch.Tensor, share: torch.Tensor = share[:, None, None]) -> None:
            found[name] = share * y.float() + found.get(name, 0.0)

        with _watched(model, layers, add):
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return found


class _Regression:
    """Adds each layer's error and input to the sums, and puts the interpolated output in the place of its own."""

    def __init__(
        self, sums: dict[str, list[torch.Tensor]], wanted: dict[str, torch.Tensor], kept: torch.Tensor, lam: torch.Tensor
    ) -> None:
        self.sums, self.wanted, self.kept = sums, wanted, kept
        self.u = (lam * (1 - lam))[:, None].expand(kept.shape)[kept][:, None]
        self.weight = self.u.abs() ** -_POWER
        self.last = self.square = torch.empty(0)  # queries, keys and values have one input, and its square is as dear

    def __call__(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if name in self.sums:
            states, error = x[self.kept].float(), (self.wanted[name] - y)[self.kept]
            if self.last is not x:
                self.last, self.square = x, states.T @ (states * (self.weight * self.u**2))
            across, square = self.sums[name]
            self.sums[name] = [across + (error * (self.weight * self.u)).T @ states, square + self.square]
        return self.wanted[name].to(y.dtype)


@contextmanager
def _watched(
    model: PreTrainedModel, layers: dict[str, Bent], seen: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Call `seen(module, input, output)` for each of these layers in a pass; what it returns replaces the output."""
    hooks = [
        model.get_submodule(layer.module).register_forward_hook(
            lambda module, args, output, name=layer.module: seen(name, args[0], output)
        )
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _learned(pair: ModelPair, layers: dict[str, Bent], branches: Sequence[int]) -> dict[str, dict[str, Part]]:
    """What the layers have learned, by tensor of θ(λ)."""
    parts: dict[str, dict[str, Part]] = {}
    for name, layer in layers.items():
        transposed = layer.module in pair.architecture.transposed
        parts[name] = {BRANCHES[branch]: _part(layer, branch, transposed) for branch in branches}
        bias = pair.architecture.stored_name(f"{layer.module}.bias", pair.tensors)
        if bias is not None and not pair.is_same(bias):  # the gain is that of the whole layer
            parts[bias] = {branch: Part(part.gain) for branch, part in parts[name].items()}
    return parts


def _part(layer: Bent, branch: int, transposed: bool) -> Part:
    gain = layer.gain[branch].detach().float().cpu()
    if not len(layer.up):
        return Part(gain)
    up, down = layer.up[branch].detach().float().cpu(), layer.down[branch].detach().float().cpu()
    return Part(gain, down.T.contiguous(), up.T.contiguous()) if transposed else Part(gain, up, down)


def _places(student: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A position for each token of each row, where the decoder takes them: learned ones differ between rows with λ."""
    if "position_ids" not in inspect.signature(student.base_model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)}


class _Trainer:
    """Adam on the mean of kl(λ)/|λ(1-λ)|^1.5 over scored tokens."""

    def __init__(
        self, student: PreTrainedModel, layers: dict[str, Bent], teacher: _Teacher, branch: int, learning_rate: float
    ) -> None:
        self.student, self.teacher, self.branch = student, teacher, branch
        self.seen: list[tuple[str, float, float]] = []  # what, mean kl and goal on the lessons held out
        self.best: list[torch.Tensor] = []
        self.head: Head = head_of(student)
        self.strength: Strength = student.dera_strength
        self.learning_rate = learning_rate
        self.gains = [layer.gain[branch] for layer in layers.values()]
        self.factors = [kind[branch] for layer in layers.values() for kind in (layer.down, layer.up) if len(kind)]
        self.parameters = [*self.gains, *self.factors]

    def kl(self, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """KL(exact‖path) of the lessons' scored tokens (tokens,) in nats, and the λ of each."""
        lessons = [self.teacher.lessons[i] for i in chosen]
        texts = [lesson.text for lesson in lessons]
        device = self.student.device
        lams = torch.tensor([lesson.lam for lesson in lessons], dtype=torch.float32, device=device)
        each = lams.repeat_interleave(torch.tensor([len(text.completion) for text in texts], device=device))
        log_p = torch.log_softmax(self.teacher.logits(chosen, each), -1)
        ids, mask = padded(texts, device)
        with self.strength.of(lams, ids.shape[1]):
            how = {"attention_mask": mask, "use_cache": False, **_places(self.student, ids)}
            states = self.student.base_model(input_ids=ids, **how)[0]
        with self.strength.of(each, 1):
            log_q = torch.log_softmax(self.head(scored(states, texts))[:, : self.teacher.rows], -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), each

    @torch.no_grad()
    def measure(self, chosen: Sequence[int]) -> tuple[float, float]:
        """Mean kl over the tokens of these lessons, and the mean that is minimised."""
        texts = [self.teacher.lessons[i].text for i in chosen]
        parts = [self.kl([chosen[j] for j in batch]) for batch in batches(texts)]
        kl, lams = (torch.cat(values).double() for values in zip(*parts, strict=True))
        return float(kl.mean()), float((kl * _weight(lams)).mean())

    def look(self, what: str, held_out: list[int]) -> None:
        """Measure on the lessons held out, and remember this state if none was better."""
        mean, goal = self.measure(held_out)
        self.seen.append((what, mean, goal))
        if goal <= min(seen[2] for seen in self.seen):
            self.best = [parameter.detach().clone() for parameter in self.parameters]

    def keep_best(self) -> dict[str, Any]:
        """Go back to the best state. Returns its kl on the lessons held out, and that of the line and the closed form."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
        best = min(self.seen, key=lambda seen: seen[2])
        first = {what.replace(" ", "_"): mean for what, mean, _ in reversed(self.seen)}  # the earliest of each name
        return {**first, "path": best[1], "kept": best[0], "line_weighted": self.seen[0][2], "path_weighted": best[2]}

    def run(self, lessons: list[int], held_out: list[int], passes: int, dice: random.Random, tell: Progress) -> None:
        """Train from the best state on, and look a few times."""
        self.keep_best()
        steps: list[list[int]] = []
        for _ in range(passes):
            texts = [self.teacher.lessons[i].text for i in lessons]
            order = [[lessons[j] for j in batch] for batch in batches(texts, STEP_TOKENS)]
            dice.shuffle(order)
            steps += order
        if not steps:
            return
        warm = max(1, len(steps) // 20)
        # A step of Adam moves every number by about the rate, and some layers need far smaller factors than others.
        sizes = [(gain, GAIN) for gain in self.gains] + [(f, float(f.square().mean().sqrt()) or UP) for f in self.factors]
        optimiser = torch.optim.Adam([{"params": [p], "lr": self.learning_rate * size} for p, size in sizes])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / warm, max(0.02, (len(steps) - step) / (len(steps) - warm + 1)))
        )
        looks = {max(1, round(len(steps) * share)) for share in (0.5, 0.8, 1.0)}
        what = f"learning, λ {'above' if self.branch else 'below'} 1"
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
                    self.look(f"step {number}", held_out)
                tell(what, number, len(steps))


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


