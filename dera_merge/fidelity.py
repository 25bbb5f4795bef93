"""How far the merged model is from exact DeRa, token by token.

    kl = mean over scored tokens of KL(exact‖merged) = Σ_v p_λ(v)·[log p_λ(v) - log q(v)],   p_λ = softmax(h_λ), q = merged

Texts are given, or sampled from exact DeRa. Each model reads the texts once and leaves its last hidden states, which
are small; the distributions over the vocabulary are made from these a few tokens at a time, through the model's own
head, and reduced in float64. So K values of λ on given texts cost K+2 passes (2K+2 where rounding is told apart), and
nothing of size vocabulary × text exists.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import lambdas
from . import prompts as prompt_files
from .checkpoint import json_bytes, write_atomically
from .errors import DeraError
from .exact import mix
from .merge import output_layout
from .output import verify
from .pair import ModelPair, load_model, warn
from .prompts import Prompt
from .sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .rounding import Rounding

MEASURES = ("kl", "reverse_kl", "js", "tv", "top1", "kl_ref", "kl_aligned")
BATCH_TOKENS = 2048  # tokens that a model reads at a time
CHUNK_VALUES = 1 << 22  # logits that exist at a time, per model
Head = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True)
class Text:
    """A completion to score, and the index of its prompt."""

    prompt: int
    ids: list[int]  # prompt and completion
    start: int  # where the completion begins


@dataclass(frozen=True)
class Trace:
    """What a model makes of the texts: hidden states (scored tokens, hidden size), and its head, hidden → logits."""

    hidden: torch.Tensor
    head: Head


@dataclass
class Report:
    """What `compare` measured.

    Attributes:
        results: one dict per λ, with the figures of `compare --json`.
        settings: how it was measured.
        per_token: λ → measure → float64 array (tokens,), in nats where it is a divergence.
        prompt_of: λ → the prompt that each of these tokens belongs to.
    """

    ref: str
    aligned: str
    results: list[dict[str, Any]]
    settings: dict[str, Any]
    per_token: dict[float, dict[str, np.ndarray]] = field(default_factory=dict)
    prompt_of: dict[float, np.ndarray] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds; never NaN or infinity."""
        return {"ref": self.ref, "aligned": self.aligned, "results": self.results, "settings": self.settings}

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write report.json, report.md and, with matplotlib, fidelity.png into a directory; returns it."""
        from .report import markdown, plot_fidelity

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.md", markdown(self).encode())
        plot_fidelity(self.results, folder / "fidelity.png")
        write_atomically(folder / "report.json", json_bytes(self.to_dict()))
        return folder

    def gate(self, max_kl: float | None, min_top1: float | None) -> dict[str, Any]:
        """Whether every λ stays within the limits: kl at most `max_kl` nats, top1 at least `min_top1`."""
        failed = [
            result["lambda"]
            for result in self.results
            if (max_kl is not None and not (result["kl"] is not None and result["kl"] <= max_kl))
            or (min_top1 is not None and not (result["top1"] is not None and result["top1"] >= min_top1))
        ]
        return {"passed": not failed, "max_kl": max_kl, "min_top1": min_top1, "failed": failed}


def compare(
    pair: ModelPair,
    lams: Sequence[float],
    prompts: Sequence[str | dict[str, Any]] | None = None,
    *,
    approx: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = "auto",
    rounding: Rounding | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    progress: Progress | None = None,
) -> Report:
    """Measure the merged model against exact DeRa at each λ.

    Args:
        pair: the two models.
        lams: the λ to measure.
        prompts: texts, `{"prompt": …}` or `{"messages": …}`, all or none with a `"completion"` to score on; without
            completions, one text a prompt is sampled from exact DeRa at temperature 1 for each λ. Default: 32 general ones.
        approx: a directory that `merge` wrote, or the parent of `lambda-*`, to measure instead of merging anew.
        dtype, rounding, seed: how the merged model is stored, as for `merge`. `seed` also drives sampling and bootstrap.
        max_new_tokens: length of sampled texts, in tokens.
        device, compute_dtype: where and in what the models run.
        progress: called as work goes on.

    Returns:
        A `Report`. Divergences are in nats per token, averaged over all scored tokens, intervals are 95 % (bootstrap
        over prompts).

    Raises:
        DeraError: the pair cannot be merged or run, prompts are unusable, or `approx` is for another λ.
    """
    lams = [float(lam) + 0.0 for lam in lams]
    lambdas.check_names(lams)
    tokenizer = pair.tokenizer
    encoded = prompt_files.encode(prompt_files.default(tokenizer) if prompts is None else prompts, tokenizer)
    given = [prompt.completion is not None for prompt in encoded]
    if any(given) and not all(given):
        raise DeraError(f"prompt {given.index(False) + 1} has no completion, others have; give all or none")
    _check_lengths(encoded, max_new_tokens, pair.context_length)
    layout, rounding = output_layout(pair, dtype, rounding)
    split = any(kind != torch.float32 for kind, _ in layout.values())
    approximations = {lam: _approximation(approx, lam, pair) for lam in lams} if approx is not None else {}

    tell = progress or (lambda what, done, total: None)
    options = {"device": device, "compute_dtype": compute_dtype}
    exact = pair.exact(dtype=compute_dtype, device=device)
    stored = None if approx is not None else pair.merged(lams[0], dtype=dtype, rounding=rounding, seed=seed, **options)
    smooth = pair.merged(lams[0], **options) if split or stored is None else None

    def merged(lam: float) -> Iterable[PreTrainedModel]:
        """The model to measure at λ, and its float32 twin where there is one."""
        if lam in approximations:
            yield load_model(approximations[lam][0], compute_dtype, device)
        elif stored is not None:
            stored.set_lam(lam)
            yield stored
        if smooth is not None:
            smooth.set_lam(lam)
            yield smooth

    def texts_at(lam: float) -> list[Text]:
        what = f"sampling from exact DeRa at λ={lam:g}"
        completions = sample(
            exact, tokenizer, [prompt.ids for prompt in encoded], lam=lam, max_new_tokens=max_new_tokens, seed=seed,
            progress=lambda done: tell(what, done, len(encoded)),
        )  # fmt: skip
        return [_text(index, prompt, ids) for index, (prompt, ids) in enumerate(zip(encoded, completions, strict=True))]

    report = Report(pair.ref.source.name, pair.aligned.source.name, [], {})
    resolution = 0.0

    def measure(at: Sequence[float], texts: list[Text]) -> None:
        nonlocal resolution
        done, steps = itertools.count(1), (2 if split else 1) * len(at) + 2

        def read(model: PreTrainedModel, heads: list[torch.nn.ModuleDict] | None = None) -> Trace:
            trace = trace_of(model, texts, heads)
            tell("scoring", next(done), steps)
            return trace

        ref, aligned = read(exact.ref), read(exact.aligned)
        resolution = max(resolution, _resolution(exact.ref, ref, texts))
        heads: list[torch.nn.ModuleDict] = []  # turning the dial may change the head, so traces keep the one they had
        traces = [(lam, [read(model, heads) for model in merged(lam)]) for lam in at]
        report.per_token |= divergences(ref, aligned, traces, exact.config.vocab_size)
        prompt_of = np.repeat([text.prompt for text in texts], [len(text.ids) - text.start for text in texts])
        report.prompt_of |= dict.fromkeys(at, prompt_of)

    if all(given):  # reference and aligned model read the texts once for all λ
        measure(lams, [_text(index, prompt, prompt.completion or []) for index, prompt in enumerate(encoded)])
    else:
        for lam in lams:
            measure([lam], texts_at(lam))
    for lam in lams:
        figures = summarise(report.per_token[lam], report.prompt_of[lam], resolution, seed)
        report.results.append({"lambda": lam, **figures})
    for _, recipe in approximations.values():  # what was measured is what lies there
        dtype, rounding, seed = recipe.get("dtype"), recipe.get("rounding"), recipe.get("seed")
    report.settings = {
        "prompts": len(encoded), "texts": "given" if all(given) else "sampled from exact DeRa at each λ",
        "max_new_tokens": None if all(given) else max_new_tokens, "dtype": str(dtype).removeprefix("torch."),
        "rounding": rounding, "seed": seed, "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "resolution": resolution, "approx": None if approx is None else os.fspath(approx),
    }  # fmt: skip
    return report


def _text(index: int, prompt: Prompt, completion: list[int]) -> Text:
    return Text(index, [*prompt.ids, *completion], len(prompt.ids))


def _check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, limit: int | None) -> None:
    for number, prompt in enumerate(prompts, 1):
        count = len(prompt.ids) + (max_new_tokens if prompt.completion is None else len(prompt.completion))
        if limit and count > limit:
            raise DeraError(f"prompt {number} and its completion have up to {count} tokens, the model takes {limit}")


def _approximation(approx: str | os.PathLike[str], lam: float, pair: ModelPair) -> tuple[Path, dict[str, Any]]:
    """The merged directory for λ, `approx` itself or `approx/lambda-<λ>`, and its recipe."""
    folder = Path(approx)
    if not (folder / "dera_merge.json").is_file() and (folder / lambdas.folder_name(lam)).is_dir():
        folder = folder / lambdas.folder_name(lam)
    recipe = verify(folder)
    if recipe["lambda"] != lam:
        raise DeraError(f"{folder} was merged at λ={recipe['lambda']:g}, asked for is λ={lam:g}")
    for key, side in (("ref", pair.ref), ("aligned", pair.aligned)):
        name = str(recipe[key].get("name"))
        if name != side.source.name and Path(name).resolve() != side.source.folder:
            warn(f"{folder} was merged from {name}, it is compared with {side.source.name}; are they the same model?")
    return folder, recipe


# One model over all texts


@torch.no_grad()
def trace_of(model: PreTrainedModel, texts: list[Text], heads: list[torch.nn.ModuleDict] | None = None) -> Trace:
    """Run a model's decoder over the texts, longest first, and keep the hidden states that predict completion tokens.

    Args:
        heads: copies of heads that are to survive a change of the model; one that equals the model's is used again, so
            that a head which λ does not touch is held once. None: the model will not change.
    """
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))
    hidden: dict[int, torch.Tensor] = {}
    while order:
        width = len(texts[order[0]].ids)
        batch, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
        # Padding on the right is invisible to a causal model: what it predicts depends on what came before.
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, index in enumerate(batch):
            tokens = texts[index].ids
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        for row, index in enumerate(batch):
            text = texts[index]
            hidden[index] = states[row, text.start - 1 : len(text.ids) - 1].clone()
    head = head_of(model, heads)
    _check_head(model, head, texts[0], hidden[0])
    return Trace(torch.cat([hidden[index] for index in range(len(texts))]), head)


class _Replay(torch.nn.Module):
    """Stands in for a decoder: what comes in as `inputs_embeds` goes out as its last hidden state."""

    class _Output:
        def __init__(self, hidden: torch.Tensor) -> None:
            self.last_hidden_state = hidden

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.last_hidden_state

        def __getattr__(self, name: str) -> None:  # no caches, attentions, router logits
            return None

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        return self._Output(inputs_embeds)


def head_of(model: PreTrainedModel, heads: list[torch.nn.ModuleDict] | None = None) -> Head:
    """The model without its decoder: hidden states (tokens, hidden size) → logits (tokens, vocabulary), float32.

    It is the model's own forward, so scaled or soft-capped logits (Gemma, Cohere, Granite) come out right. `heads` as
    for `trace_of`.
    """
    modules = torch.nn.ModuleDict({name: m for name, m in model.named_children() if name != model.base_model_prefix})
    if heads is not None:
        same = (kept for kept in heads if all(map(torch.equal, kept.parameters(), modules.parameters())))
        kept = next(same, None)
        if kept is None:
            kept = copy.deepcopy(modules)
            heads.append(kept)
        modules = kept
    head = copy.copy(model)
    head._modules = {**modules, model.base_model_prefix: _Replay()}

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    return logits


def _check_head(model: PreTrainedModel, head: Head, text: Text, hidden: torch.Tensor) -> None:
    ids = torch.tensor([text.ids[: text.start + 1]], device=model.device)
    whole = model(input_ids=ids, use_cache=False).logits[0, text.start - 1].float()
    here = head(hidden[:1])[0]
    if not whole.isfinite().any():
        raise DeraError(f"{type(model).__name__} gives no finite logits; is λ too large, or an input broken?")
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(whole, here, rtol=tolerance, atol=tolerance * float(whole.abs().max())):
        raise DeraError(f"{type(model).__name__} is not a decoder followed by a head; compare cannot measure it yet")


@torch.no_grad()
def _resolution(model: PreTrainedModel, trace: Trace, texts: list[Text]) -> float:
    """The largest kl that the reference shows against itself, read in a batch of another shape: noise, in nats."""
    few = texts[:4]
    again = torch.cat([trace_of(model, [text]).hidden for text in few])
    batched = trace.hidden[: len(again)]
    worst = 0.0
    for one, other in zip(batched.split(16), again.split(16), strict=True):
        p, q = (torch.log_softmax(trace.head(states).double(), -1) for states in (one, other))
        worst = max(worst, float((p.exp() * (p - q)).sum(-1).abs().max()))
    return max(worst, 1e-12)


# Distributions


@torch.no_grad()
def divergences(
    ref: Trace, aligned: Trace, approximations: Sequence[tuple[float, Sequence[Trace]]], vocab_size: int
) -> dict[float, dict[str, np.ndarray]]:
    """Per-token divergences from exact DeRa, for each λ and its approximations (as stored, then in float32).

    Returns:
        λ → measure → float64 array (tokens,). `kl_nonlinearity` is kl of the second approximation, where there is one.
    """
    rows: dict[float, dict[str, list[torch.Tensor]]] = {lam: {} for lam, _ in approximations}
    step = max(1, CHUNK_VALUES // vocab_size)
    for start in range(0, len(ref.hidden), step):
        here = slice(start, start + step)
        logits_ref, logits_aligned = (side.head(side.hidden[here])[:, :vocab_size] for side in (ref, aligned))
        log_ref, log_aligned = (torch.log_softmax(logits.double(), -1) for logits in (logits_ref, logits_aligned))
        for lam, traces in approximations:
            weight = torch.tensor([lam], device=logits_ref.device)
            log_p = torch.log_softmax(mix(logits_ref[None], logits_aligned[None], weight)[0].double(), -1)
            p = log_p.exp()
            row = {"kl_ref": _kl(p, log_p, log_ref), "kl_aligned": _kl(p, log_p, log_aligned)}
            for number, trace in enumerate(traces):
                log_q = torch.log_softmax(trace.head(trace.hidden[here])[:, :vocab_size].double(), -1)
                if number:
                    row["kl_nonlinearity"] = _kl(p, log_p, log_q)
                    continue
                q = log_q.exp()
                log_m = torch.logaddexp(log_p, log_q) - math.log(2)
                row |= {
                    "kl": _kl(p, log_p, log_q),
                    "reverse_kl": _kl(q, log_q, log_p),
                    "js": (_kl(p, log_p, log_m) + _kl(q, log_q, log_m)) / 2,
                    "tv": (p - q).abs().sum(-1) / 2,
                    "top1": (log_p.argmax(-1) == log_q.argmax(-1)).double(),
                }
            for measure, values in row.items():
                rows[lam].setdefault(measure, []).append(values.cpu())
    return {lam: {m: torch.cat(parts).numpy() for m, parts in measures.items()} for lam, measures in rows.items()}


def _kl(p: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ_v p·(log p - log q) of each row, in nats; a token of probability 0 adds nothing."""
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def summarise(per_token: dict[str, np.ndarray], prompt_of: np.ndarray, resolution: float, seed: int) -> dict[str, Any]:
    """The figures of one λ: means over all tokens, 95 % intervals, captured shift, the split of kl."""
    means = {measure: float(per_token[measure].mean()) for measure in MEASURES}
    bound = min(means["kl_ref"], means["kl_aligned"])
    smooth = float(per_token["kl_nonlinearity"].mean()) if "kl_nonlinearity" in per_token else means["kl"]
    figures: dict[str, Any] = {"tokens": len(prompt_of)}
    for measure in MEASURES:
        figures[measure] = means[measure]
        if measure in ("kl", "tv", "top1"):
            figures[f"{measure}_ci"] = bootstrap(per_token[measure], prompt_of, seed)
    figures["captured"] = 1 - means["kl"] / bound if bound > resolution else None
    figures["kl_rounding"] = means["kl"] - smooth
    figures["kl_nonlinearity"] = smooth
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in figures.items()}


def bootstrap(values: np.ndarray, prompt_of: np.ndarray, seed: int = 0, samples: int = 2000) -> list[float] | None:
    """95 % interval of the pooled mean, resampling prompts with all their tokens; None with fewer than two prompts."""
    _, index = np.unique(prompt_of, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    if len(sums) < 2 or not np.isfinite(sums).all():
        return None
    draws = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]
