"""How far the merged model is from exact DeRa, token by token, and what that means.

`compare` is the whole line: texts are given or sampled; each model reads them once and leaves its last hidden states
(`traces.py`); distributions are made from these a few tokens at a time and reduced in float64 (`divergence.py`). K values of
λ on given texts cost K+2 passes, 2K+2 where rounding is told apart. What is asked for beyond that, each a function over the
same traces: a scale that people know (`yardstick.py`), a prediction from few probes and where the error comes from
(`explain.py`), and texts of both models under the same noise.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from . import engine as engines
from . import explain, lambdas, yardstick
from . import prompts as prompt_files
from .checkpoint import json_bytes, load_json, write_atomically
from .curve import Curve, fingerprint, opened
from .divergence import MEASURES, bootstrap, divergences, finite, gram_of, log_ratio, summarise
from .errors import DeraError
from .lambdas import Lam, Vector
from .ledger import Ledger, gathered, launched
from .merge import output_layout
from .output import verify, weights_digest
from .pair import ModelPair, load_model, warn
from .prompts import Prompt
from .sampling import sample
from .traces import Text, Trace, tokens_of, trace_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .rounding import Rounding

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
Extra = Literal["floor", "ladder", "predict", "layers", "coupled"]
EXTRAS: tuple[Extra, ...] = ("floor", "ladder", "predict", "layers", "coupled")
POSITIONS = 64  # bins of the curve over positions, at most
WORST = 12  # tokens that are listed with their context
SHOWN = 3  # texts that are kept whole, with the kl of each token


@dataclass
class Report:
    """What `compare` measured.

    Attributes:
        results: one dict per λ, with the figures of `compare --json`.
        settings: how it was measured.
        prediction: kl predicted over the whole range, where that was asked for.
        texts: a few texts, each with the kl of its tokens.
        gated: what `gate` found, if it was asked.
        per_token: λ → measure → float64 array (tokens,), in nats where it is a divergence.
        prompt_of: λ → the prompt that each of these tokens belongs to.
    """

    ref: str
    aligned: str
    results: list[dict[str, Any]]
    settings: dict[str, Any]
    prediction: list[dict[str, Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    gated: dict[str, Any] | None = None
    per_token: dict[Lam, dict[str, np.ndarray]] = field(default_factory=dict)
    prompt_of: dict[Lam, np.ndarray] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds; never NaN or infinity."""
        return finite({
            "ref": self.ref, "aligned": self.aligned, "verdict": self.verdict(), "results": self.results,
            "prediction": self.prediction, "settings": self.settings, "texts": self.texts, "command": self.command,
            **({"gate": self.gated} if self.gated else {}),
        })  # fmt: skip

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Report:
        """A report as `save` wrote it, from its directory or its report.json; per-token arrays are not kept.

        Raises:
            DeraError: there is none, or it is not one of ours.
        """
        place = Path(folder)
        place = place / "report.json" if place.is_dir() else place
        if not place.is_file():
            raise DeraError(f"there is no report {place}; dera-merge compare writes one")
        data = load_json(place)
        shape = {"ref": str, "aligned": str, "results": list, "settings": dict}
        if not isinstance(data, dict) or not all(isinstance(data.get(key), kind) for key, kind in shape.items()):
            raise DeraError(f"{place} is no report that dera-merge compare wrote")
        if not all(isinstance(row, dict) and "verdict" in row for row in data["results"]):
            raise DeraError(f"{place} was written by an older version, without verdicts; compare again")
        kept = ("ref", "aligned", "results", "settings", "prediction", "texts", "command")
        for row in (*data["results"], *data.get("texts", ())):
            row["lambda"] = lambdas.loaded(row["lambda"])
        return cls(**{key: data[key] for key in kept if key in data}, gated=data.get("gate"))

    def at(self, lam: Lam) -> dict[str, Any]:
        """The result at one λ. Raises DeraError where it was not measured."""
        for result in self.results:
            if result["lambda"] == lam:
                return result
        raise DeraError(f"the report has no λ={lam:g}; compare there too")

    def safe_stretches(self) -> list[tuple[Lam, Lam]]:
        """From which λ to which all that were measured are safe; of several aligned models, each safe λ by itself."""
        stretches: list[tuple[Lam, Lam]] = []
        before: Lam | None = None  # the λ before, if it is safe
        for result in sorted(self.results, key=lambda result: result["lambda"]):
            lam = result["lambda"]
            if result.get("verdict") != "safe":
                before = None
                continue
            # Both ends are exact whatever lies between, so they alone say nothing of it.
            joined = before is not None and not (before == 0.0 and lam == 1.0) and not isinstance(lam, Vector)
            stretches.append((stretches.pop()[0] if joined else lam, lam))
            before = lam
        return stretches

    def verdict(self) -> dict[str, list[Lam]]:
        """The λ of each verdict."""
        return {
            word: [result["lambda"] for result in self.results if result["verdict"] == word]
            for word in ("safe", "usable", "not DeRa any more")
        }

    def save(self, out: str | os.PathLike[str]) -> Path:
        """Write report.json, report.md, report.html and, with matplotlib, PNGs into a directory; returns it."""
        from .report import html, markdown, plot_fidelity

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", json_bytes(self.to_dict()))
        write_atomically(folder / "report.md", markdown(self).encode())
        write_atomically(folder / "report.html", html(self).encode())
        plot_fidelity(self.results, folder / "fidelity.png", prediction=self.prediction)
        return folder

    def gate(self, max_kl: float | None, min_top1: float | None) -> dict[str, Any]:
        """Whether every λ stays within the limits: kl at most `max_kl` nats, top1 at least `min_top1`. `save` keeps it."""
        failed = [
            result["lambda"]
            for result in self.results
            if (max_kl is not None and not (result["kl"] is not None and result["kl"] <= max_kl))
            or (min_top1 is not None and not (result["top1"] is not None and result["top1"] >= min_top1))
        ]
        self.gated = {"passed": not failed, "max_kl": max_kl, "min_top1": min_top1, "failed": failed}
        return self.gated


def compare(
    pair: ModelPair,
    lams: Sequence[float | Sequence[float]],
    prompts: Sequence[str | dict[str, Any]] | None = None,
    *,
    approx: str | os.PathLike[str] | None = None,
    path: str | os.PathLike[str] | Curve | None = None,
    dtype: torch.dtype | str | None = "auto",
    rounding: Rounding | None = None,
    texts: Literal["exact", "merged"] = "exact",
    samples: int = 1,
    max_new_tokens: int = 64,
    extras: Iterable[Extra] = ("floor",),
    extra_prompts: int = 8,
    reward: Callable[[str], float] | None = None,
    seed: int = 0,
    engine: str | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    unfinished: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure the merged model against exact DeRa at each λ.

    Started by `accelerate launch` or `torchrun`, each process measures a share of the prompts; all return the same report.

    Args:
        pair: the two models.
        lams: the λ to measure; with several aligned models, a number for each.
        prompts: texts, `{"prompt": …}` or `{"messages": …}`, all or none with a `"completion"` to score on; without
            completions, texts are sampled at temperature 1 for each λ. Default: 32 general ones.
        approx: a directory that `merge` wrote, or the parent of `lambda-*`, to measure instead of merging anew.
        path: a path that `calibrate` learned, or its file, to measure in the place of the straight line.
        dtype, rounding, seed: how the merged model is stored, as for `merge`. `seed` also drives sampling and bootstrap.
        texts: whose texts to sample: exact DeRa's, or the merged model's, which users will see.
        samples: how many for each prompt.
        max_new_tokens: length of sampled texts, in tokens.
        extras: what to measure beside the divergences:
            `"floor"`: what bfloat16 alone costs exact DeRa;
            `"ladder"`: what quantisation to 8, 6, 5, 4, 3 bits costs it;
            `"predict"`: kl over the whole range of λ, from merges at ¼, ¾ and the largest λ (one aligned model);
            `"layers"`: which tensors the error comes from, and where the features part (one aligned model);
            `"coupled"`: texts of both models under the same noise.
        extra_prompts: floor, ladder and layers look at the texts of this many prompts.
        reward: a text's reward, for `"coupled"`.
        engine: sample by vLLM: the address of a server of the pair's exact directory, or `"vllm"` to start one.
        device, compute_dtype: where and in what the models run.
        unfinished: a directory in which to keep finished steps until all are done; with several processes nothing is kept.
        resume: go on with what an interrupted call with the same arguments left there.
        progress: called as work goes on.

    Returns:
        A `Report`. Divergences are in nats per token, averaged over all scored tokens, intervals are 95 % (bootstrap
        over prompts).

    Raises:
        DeraError: the pair cannot be merged or run, prompts are unusable, or `approx` or `path` is for another λ or pair.
    """
    lams = pair.known(lams)
    extras = tuple(extras)
    if unknown := sorted(set(extras) - set(EXTRAS)):
        raise DeraError(f"{unknown[0]!r} is nothing that can be measured; known are {', '.join(EXTRAS)}")
    for extra in ("predict", "layers"):
        if extra in extras:
            pair.only_pair(f"--with {extra} is")
    if approx is not None and path is not None:
        raise DeraError("--approx measures a directory, --path merges anew; give one of the two")
    tokenizer = pair.tokenizer
    encoded = prompt_files.encode(prompt_files.default(tokenizer) if prompts is None else prompts, tokenizer)
    given = [prompt.completion is not None for prompt in encoded]
    if any(given) and not all(given):
        raise DeraError(f"prompt {given.index(False) + 1} has no completion, others have; give all or none")
    if all(given) and (samples > 1 or texts == "merged"):
        raise DeraError("the prompts bring completions, so that nothing is sampled; leave out --texts and --samples")
    if engine and (all(given) or texts == "merged" or "coupled" in extras):
        raise DeraError("--engine samples exact DeRa's texts, with noise of its own; leave it out for given texts, for "
                        "--texts merged and for --with coupled")  # fmt: skip
    _check_lengths(encoded, max_new_tokens, pair.context_length, "coupled" in extras)
    layout, rounding = output_layout(pair, dtype, rounding)
    split = any(kind != torch.float32 for kind, _ in layout.values())
    curve = opened(path, pair, lams)
    approximations = {lam: _approximation(approx, lam, pair) for lam in lams} if approx is not None else {}
    process, processes = launched()
    ledger = Ledger(
        None if unfinished is None or processes > 1 else Path(unfinished),
        {"pair": fingerprint(pair), "lams": lams, "prompts": [[p.ids, p.completion] for p in encoded],
         "approx": str(approx), "path": curve.sha256 if curve else None, "dtype": str(dtype), "rounding": rounding,
         "texts": texts, "samples": samples, "tokens": max_new_tokens, "seed": seed, "compute": str(compute_dtype),
         "extra_prompts": extra_prompts, "engine": bool(engine)},
        resume, writes=process == 0,
    )  # fmt: skip
    lab = _Lab(
        pair, encoded, approximations, curve, dtype, rounding, split, seed, device, compute_dtype, max_new_tokens, samples,
        process, processes, ledger, progress or (lambda what, done, total: None),
    )  # fmt: skip

    try:
        with engines.engine(engine, pair, lambda: lab.exact, encoded, max_new_tokens, compute_dtype) as lab.engine:
            report = _compared(lab, lams, texts, extras, extra_prompts, reward)
    except DeraError:  # what cannot be done leaves nothing; an interruption leaves its finished steps
        ledger.close()
        raise
    merge_seed, along = seed, curve.describe() if curve else None
    for result in report.results:
        if result["lambda"] in approximations:
            result["weights"] = weights_digest(approximations[result["lambda"]][1])
    for _, recipe in approximations.values():  # what was measured is what lies there
        dtype, rounding, merge_seed = recipe.get("dtype"), recipe.get("rounding"), recipe.get("seed")
        along = None if recipe.get("path", "line") == "line" else recipe["path"]
    origin = "exact DeRa" if texts == "exact" else "the merged model"
    report.settings |= {
        "prompts": len(encoded), "texts": "given" if all(given) else f"sampled from {origin} at each λ",
        "engine": "vllm" if engine else None, "samples": None if all(given) else samples,
        "max_new_tokens": None if all(given) else max_new_tokens,
        "dtype": str(dtype).removeprefix("torch."), "rounding": rounding, "seed": seed,
        "merge_seed": merge_seed, "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "approx": None if approx is None else os.fspath(approx), "path": along,
        "extras": list(extras), "extra_prompts": min(extra_prompts, len(encoded)), "fingerprint": fingerprint(pair),
    }  # fmt: skip
    ledger.close()
    return report


def _compared(
    lab: _Lab, lams: list[Lam], texts: str, extras: Sequence[Extra], extra_prompts: int,
    reward: Callable[[str], float] | None,
) -> Report:  # fmt: skip
    """All the measuring that `compare` promises."""
    pair, encoded, tokenizer, seed, curve = lab.pair, lab.prompts, lab.pair.tokenizer, lab.seed, lab.curve
    given = [prompt.completion is not None for prompt in encoded]
    report = Report(pair.ref.source.name, pair.aligned_name, [], {})
    # On given texts, reference and aligned model read once for all λ.
    groups = [(lams, lab.given())] if all(given) else [([lam], lab.sampled(texts, lam)) for lam in lams]
    readings: dict[Lam, dict[str, np.ndarray]] = {}
    for at, chosen in groups:
        readings |= lab.measure(at, chosen)
    resolution = max(float(reading["resolution"][0]) for reading in readings.values())
    texts_at = {lam: chosen for at, chosen in groups for lam in at}
    few = {lam: [text for text in chosen if text.prompt < extra_prompts] for lam, chosen in texts_at.items()}
    floors = lab.floor(few) if "floor" in extras else {}
    rungs = lab.ladder(few) if "ladder" in extras else {}
    for lam in lams:
        prompt_of = _each([text.prompt for text in texts_at[lam]], texts_at[lam])
        text_of = _each(range(len(texts_at[lam])), texts_at[lam])
        per_token = {key: values for key, values in readings[lam].items() if key != "resolution"}
        report.per_token[lam], report.prompt_of[lam] = per_token, prompt_of
        result = {"lambda": lam, **summarise(per_token, prompt_of, text_of, resolution, seed)}
        if isinstance(lam, Vector):
            result["log_ratio"] = log_ratio(gram_of(per_token, len(lam)), lam)
        if not lab.knows_path(lam):
            result |= {"kl_rounding": None, "kl_nonlinearity": None}
        if floors:
            result["noise_floor"] = floors[lam]
        if rungs:
            result["ladder"] = {str(bits): kl[lam] for bits, kl in rungs.items()}
            same = prompt_of < extra_prompts  # the texts that the rungs were measured on
            result["ladder_kl"] = float(per_token["kl"][same].mean())
            result["bits"] = yardstick.bits_like(result["ladder_kl"], {bits: kl[lam] for bits, kl in rungs.items()})
        result["verdict"], result["why"] = yardstick.verdict(result, floors.get(lam), resolution)
        result |= _where(per_token, texts_at[lam], tokenizer)
        report.results.append(result)
    merged_texts: dict[Lam, tuple[list[Text], dict[str, np.ndarray]]] = {}
    if "coupled" in extras:
        for result in report.results:
            lam = result["lambda"]
            ours = texts_at[lam] if not all(given) and texts == "exact" else lab.sampled("exact", lam)
            theirs = texts_at[lam] if texts == "merged" else lab.sampled("merged", lam)
            result["coupled"] = _coupled(ours, theirs, tokenizer, reward, seed)
            if texts != "merged":
                (reading,) = lab.measure([lam], theirs, "merged-").values()
                merged_texts[lam] = (theirs, reading)
                kept = {key: values for key, values in reading.items() if key != "resolution"}
                prompt_of, text_of = _each([t.prompt for t in theirs], theirs), _each(range(len(theirs)), theirs)
                figures = summarise(kept, prompt_of, text_of, resolution, seed)
                result["on_merged_texts"] = {key: figures[key] for key in ("tokens", *MEASURES, "kl_ci", "captured")}
    if "predict" in extras:
        probes = {}
        for lam in lab.probes(lams):
            reading = readings.get(lam) if curve is None and not lab.approximations else None
            if reading is None:
                home = lab.given() if all(given) else lab.sampled("exact", lam)
                reading = lab.measure([lam], home, "probe-", lambda lam: [("kl", lab.line(lam))])[lam]
            probes[lam] = float(reading.get("kl_nonlinearity", reading["kl"]).mean())
        ends = min(0.0, *lams), max(1.0, *lams)
        grid = sorted({*lams, *np.linspace(*ends, 65).round(4).tolist()} - {0.0, 1.0})
        report.prediction = explain.predict(probes, grid, resolution)
        known = {row["lambda"]: row for row in report.prediction}
        for result in report.results:
            if row := known.get(result["lambda"]):
                result["predicted"] = {"kl": row["kl"], "holds": row["holds"]}
    if "layers" in extras:
        for result in report.results:
            if result["lambda"] not in (0.0, 1.0):
                result["layers"] = lab.layers(few[result["lambda"]], result["lambda"])
    if all(given) or texts == "merged":  # the weights to the sequence-level mixture are those of exact DeRa's own texts
        for result in report.results:
            result["sequence"]["ess_share"] = None
    whose = "given" if all(given) else "exact DeRa" if texts == "exact" else "merged"
    report.texts = _shown(whose, lams, texts_at, report.per_token, merged_texts, tokenizer, encoded)
    report.settings = {"resolution": resolution}
    return report


def _each(values: Iterable[int], texts: Sequence[Text]) -> np.ndarray:
    """A number for each text, repeated for each of its tokens."""
    return np.repeat(np.array(list(values)), [len(text.completion) for text in texts])


def _check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, limit: int | None, sampled: bool) -> None:
    for number, prompt in enumerate(prompts, 1):
        given = 0 if prompt.completion is None else len(prompt.completion)
        count = len(prompt.ids) + max(given, max_new_tokens if sampled or prompt.completion is None else 0)
        if limit and count > limit:
            raise DeraError(f"prompt {number} and its completion have up to {count} tokens, the model takes {limit}")


def _approximation(approx: str | os.PathLike[str], lam: Lam, pair: ModelPair) -> tuple[Path, dict[str, Any]]:
    """The merged directory for λ, `approx` itself or `approx/lambda-<λ>`, and its recipe."""
    folder = Path(approx)
    if not (folder / "dera_merge.json").is_file() and (folder / lambdas.folder_name(lam)).is_dir():
        folder = folder / lambdas.folder_name(lam)
    recipe = verify(folder)
    if recipe["lambda"] != lam:
        raise DeraError(f"{folder} was merged at λ={recipe['lambda']:g}, asked for is λ={lam:g}")
    made_of = [recipe["ref"], recipe["aligned"], *recipe.get("others", ())]
    if len(made_of) != len(pair.every_side):
        raise DeraError(f"{folder} was merged from {len(made_of)} models, compared are {len(pair.every_side)}")
    for made, side in zip(made_of, pair.every_side, strict=True):
        name = str(made.get("name"))
        if name != side.source.name and Path(name).resolve() != side.source.folder:
            warn(f"{folder} was merged from {name}, it is compared with {side.source.name}; are they the same model?")
    return folder, recipe


@dataclass
class _Lab:
    """The models of one comparison, and each step that needs them: read back from the ledger where it is done already."""

    pair: ModelPair
    prompts: list[Prompt]
    approximations: dict[Lam, tuple[Path, dict[str, Any]]]
    curve: Curve | None
    dtype: torch.dtype | str | None
    rounding: Rounding
    split: bool  # whether storing rounds, so that kl has two parts
    seed: int
    device: str | torch.device
    compute_dtype: torch.dtype | str
    max_new_tokens: int
    samples: int
    process: int
    processes: int
    ledger: Ledger
    tell: Progress

    def __post_init__(self) -> None:
        self._live: dict[str, Any] = {}  # models whose λ turns in place
        self.engine: engines.Engine | None = None

    @cached_property
    def exact(self) -> Any:
        return self.pair.exact(dtype=self.compute_dtype, device=self.device)

    def _turned(self, what: str, lam: Lam, **how: Any) -> PreTrainedModel:
        """One live model for each kind of merge, at λ."""
        if what in self._live:
            self._live[what].set_lam(lam)
        else:
            self._live[what] = self.pair.merged(lam, device=self.device, compute_dtype=self.compute_dtype, **how)
        return self._live[what]

    def stored(self, lam: Lam) -> PreTrainedModel:
        """The model to measure at λ."""
        if lam in self.approximations:
            return load_model(self.approximations[lam][0], self.compute_dtype, self.device)
        return self._turned("stored", lam, dtype=self.dtype, rounding=self.rounding, seed=self.seed, path=self.curve)

    def smooth(self, lam: Lam) -> PreTrainedModel:
        """The same, not rounded."""
        return self._turned("smooth", lam, path=self.curve)

    def line(self, lam: Lam) -> PreTrainedModel:
        """θ_ref + λΔ, not rounded, whatever path is measured."""
        return self.smooth(lam) if self.curve is None else self._turned("line", lam)

    def knows_path(self, lam: Lam) -> bool:
        """Whether what is measured lies on the path that we have, so that rounding can be told apart."""
        return lam not in self.approximations or self.approximations[lam][1].get("path", "line") == "line"

    def given(self) -> list[Text]:
        """The prompts with their completions."""
        return [Text(i, [*p.ids, *(p.completion or [])], len(p.ids)) for i, p in enumerate(self.prompts)]

    def sampled(self, whose: str, lam: Lam) -> list[Text]:
        """Texts of exact DeRa or of the merged model, with noise that depends on (seed, prompt, sample) only."""
        streams = [(i, s) for i in range(len(self.prompts)) for s in range(self.samples)]
        mine = streams[self.process :: self.processes]
        what = f"sampling from {'exact DeRa' if whose == 'exact' else 'the merged model'} at λ={lam:g}"

        def work() -> dict[str, np.ndarray]:
            asked, tell = [self.prompts[i].ids for i, _ in mine], lambda done: self.tell(what, done, len(mine))
            if self.engine and whose == "exact":
                new = self.engine.sample(asked, [lam] * len(mine), max_new_tokens=self.max_new_tokens, progress=tell)
            else:
                model, options = (self.exact, {"lam": lam}) if whose == "exact" else (self.stored(lam), {})
                new = sample(
                    model, self.pair.tokenizer, asked, max_new_tokens=self.max_new_tokens, seed=self.seed,
                    streams=[i + s * len(self.prompts) for i, s in mine], vocab_size=self.pair.vocab_size, progress=tell,
                    **options,
                )  # fmt: skip
            every = dict(gathered(list(zip(mine, new, strict=True))))
            rows = [every[stream] for stream in streams]
            return {"tokens": np.concatenate([np.array(row, dtype=np.int64) for row in rows]),
                    "lengths": np.array([len(row) for row in rows])}  # fmt: skip

        found = self.ledger.step(f"texts-{whose}-{lam:g}", work)
        rows = np.split(found["tokens"], np.cumsum(found["lengths"])[:-1])
        return [
            Text(i, [*self.prompts[i].ids, *row.tolist()], len(self.prompts[i].ids))
            for (i, _), row in zip(streams, rows, strict=True)
        ]

    def measured(self, lam: Lam) -> Iterator[tuple[str, PreTrainedModel]]:
        """What is compared at λ, and what its kl is called: the merge as stored, in float32, and on the straight line."""
        stored = self.split or lam in self.approximations
        if stored:
            yield "kl", self.stored(lam)
        if self.knows_path(lam) or not stored:
            yield "kl_nonlinearity" if stored else "kl", self.smooth(lam)
        if self.curve is not None:
            yield "kl_line", self.line(lam)

    def measure(
        self, lams: Sequence[Lam], texts: list[Text], label: str = "",
        models: Callable[[Lam], Iterable[tuple[str, PreTrainedModel]]] | None = None,
    ) -> dict[Lam, dict[str, np.ndarray]]:  # fmt: skip
        """Per-token figures at each λ on these texts, and `resolution` (1,)."""
        missing = [lam for lam in lams if not self.ledger.has(f"{label}tokens-{lam:g}")]
        fresh = self._measure(missing, texts, models or self.measured) if missing else {}
        return {lam: self.ledger.step(f"{label}tokens-{lam:g}", lambda lam=lam: fresh[lam]) for lam in lams}

    def _measure(
        self, lams: Sequence[Lam], texts: list[Text],
        models: Callable[[Lam], Iterable[tuple[str, PreTrainedModel]]],
    ) -> dict[Lam, dict[str, np.ndarray]]:  # fmt: skip
        mine = list(range(len(texts)))[self.process :: self.processes]
        chosen = [texts[i] for i in mine]
        each = 1 + (self.split or bool(self.approximations)) + (self.curve is not None)
        done, steps = itertools.count(1), each * len(lams) + len(self.pair.every_side)
        if not chosen:
            raise DeraError(f"{len(texts)} texts are fewer than the {self.processes} processes; start fewer")

        def read(model: PreTrainedModel, heads: list[torch.nn.ModuleDict] | None = None) -> Trace:
            trace = trace_of(model, chosen, heads)
            self.tell("scoring", next(done), steps)
            return trace

        sides = [read(model) for model in self.exact.sides]
        resolution = _resolution(self.exact.ref, sides[0], chosen)
        heads: list[torch.nn.ModuleDict] = []  # turning the dial may change the head, so traces keep the one they had
        traces = []
        for lam in lams:
            traces.append((lam, {name: read(model, heads) for name, model in models(lam)}))
        per_token = divergences(sides, traces, tokens_of(chosen), self.exact.config.vocab_size)
        sizes = np.cumsum([len(text.completion) for text in chosen])[:-1]
        rows = {lam: {key: np.split(values, sizes) for key, values in row.items()} for lam, row in per_token.items()}
        every = gathered([(i, {lam: {k: v[n] for k, v in row.items()} for lam, row in rows.items()}, resolution)
                          for n, i in enumerate(mine)])  # fmt: skip
        every.sort(key=lambda entry: entry[0])
        worst = np.array([max(entry[2] for entry in every)])
        return {
            lam: {key: np.concatenate([entry[1][lam][key] for entry in every]) for key in rows[lam]} | {"resolution": worst}
            for lam in lams
        }

    def _pooled(self, few: dict[Lam, list[Text]]) -> tuple[list[Text], dict[Lam, slice]]:
        """The texts of all λ in one list, given texts once, and which tokens of it belong to each λ."""
        distinct: dict[int, slice] = {}
        texts: list[Text] = []
        places, start = {}, 0
        for lam, chosen in few.items():
            if id(chosen[0]) not in distinct:
                size = sum(len(text.completion) for text in chosen)
                distinct[id(chosen[0])] = slice(start, start + size)
                texts += chosen
                start += size
            places[lam] = distinct[id(chosen[0])]
        return texts, places

    def floor(self, few: dict[Lam, list[Text]]) -> dict[Lam, float]:
        """What bfloat16 alone costs exact DeRa at each λ, nats per token."""
        texts, places = self._pooled(few)
        count = itertools.count(1)

        def work() -> dict[str, np.ndarray]:
            tell = lambda: self.tell("measuring bfloat16", next(count), 2 * len(self.pair.every_side))  # noqa: E731
            kl = yardstick.noise_floor(self.pair, texts, list(few), self.device, tell)
            return {f"{lam:g}": values for lam, values in kl.items()}

        found = self.ledger.step("floor", work)
        return {lam: float(found[f"{lam:g}"][places[lam]].mean()) for lam in few}

    def ladder(self, few: dict[Lam, list[Text]]) -> dict[int, dict[Lam, float]]:
        """What quantisation costs exact DeRa: bits → λ → nats per token."""
        texts, places = self._pooled(few)
        count = itertools.count(1)

        def work() -> dict[str, np.ndarray]:
            steps = len(self.pair.every_side) * (len(yardstick.BITS) + 1)
            tell = lambda: self.tell("quantising", next(count), steps)  # noqa: E731
            rungs = yardstick.ladder(self.pair, texts, list(few), self.device, tell)
            return {f"{bits} {lam:g}": values for bits, row in rungs.items() for lam, values in row.items()}

        found = self.ledger.step("ladder", work)
        return {bits: {lam: float(found[f"{bits} {lam:g}"][places[lam]].mean()) for lam in few} for bits in yardstick.BITS}

    def probes(self, lams: Sequence[float]) -> list[float]:
        """Where the merge is measured to predict the rest of the range."""
        return [*explain.PROBES, *([max(lams)] if max(lams) > 1 else [])]

    def layers(self, texts: list[Text], lam: float) -> dict[str, Any]:
        """Where the error at λ comes from: shares by tensor, by layer and by kind, and the features' gap by layer."""

        def work() -> dict[str, np.ndarray]:
            what = f"looking into the layers at λ={lam:g}"
            shares = explain.attribute(self.pair, texts, lam, self.device, lambda done, total: self.tell(what, done, total))
            gaps = explain.feature_gaps(self.exact.ref, self.exact.aligned, self.line(lam), texts, lam)
            return {"names": np.array(list(shares)), "shares": np.array(list(shares.values())), "gaps": np.array(gaps)}

        found = self.ledger.step(f"layers-{lam:g}", work)
        shares = dict(zip(found["names"].tolist(), found["shares"].tolist(), strict=True))
        return explain.by_layer(shares, found["gaps"].tolist())


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


# What the figures of one λ are made of


def token_class(text: str, special: bool) -> str:
    """What kind of token a decoded token is."""
    if special:
        return "special"
    if not text.strip():
        return "white space"
    stripped = text.strip()
    if stripped.isdigit():
        return "number"
    if not any(c.isalnum() for c in stripped):
        return "punctuation"
    return "beginning of a word" if text[0].isspace() else "inside a word, or first"


def _where(
    per_token: dict[str, np.ndarray], texts: list[Text], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """kl by position, by class of token and by prompt, and the worst tokens with what came before them."""
    kl = per_token["kl"]
    place = np.concatenate([np.arange(len(text.completion)) for text in texts])
    bins = min(POSITIONS, int(place.max()) + 1)
    edges = np.linspace(0, place.max() + 1, bins + 1).astype(int)
    positions = []
    for low, high in itertools.pairwise(edges):
        inside = (place >= low) & (place < high)
        if inside.any():
            positions.append({"from": int(low), "tokens": int(inside.sum()), "kl": float(kl[inside].mean())})
    own = [token for text in texts for token in text.completion]
    special = set(tokenizer.all_special_ids)
    names = {token: token_class(tokenizer.decode([token]), token in special) for token in set(own)}
    kinds = np.array([names[token] for token in own])
    classes = [
        {"class": str(kind), "tokens": int((kinds == kind).sum()), "kl": float(kl[kinds == kind].mean()),
         "share": float(kl[kinds == kind].sum() / max(kl.sum(), 1e-300))}
        for kind in np.unique(kinds)
    ]  # fmt: skip
    text_of = _each(range(len(texts)), texts)
    worst = []
    for index in np.argsort(-kl)[:WORST]:
        text, at = texts[text_of[index]], int(place[index])
        before = text.ids[max(0, text.start + at - 24) : text.start + at]
        worst.append({
            "token": tokenizer.decode([own[index]]), "before": tokenizer.decode(before), "position": at,
            "prompt": text.prompt, "kl": float(kl[index]), "p_exact": math.exp(per_token["logp"][index]),
            "p_merged": math.exp(per_token["logp_merged"][index]),
        })  # fmt: skip
    prompt_of = _each([text.prompt for text in texts], texts)
    by_prompt = [
        {"prompt": int(p), "tokens": int((prompt_of == p).sum()), "kl": float(kl[prompt_of == p].mean())}
        for p in np.unique(prompt_of)
    ]
    classes.sort(key=lambda row: -row["share"])
    return {"per_position": positions, "per_class": classes, "per_prompt": by_prompt, "worst": worst}


def _coupled(
    exact: list[Text], merged: list[Text], tokenizer: PreTrainedTokenizerBase, reward: Callable[[str], float] | None,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Texts of both models under the same noise: how many are the same, and where the others part.

    With the noise shared, two texts part only where the distributions differ.
    """
    first = []
    for one, other in zip(exact, merged, strict=True):
        pairs = itertools.zip_longest(one.completion, other.completion)
        first.append(next((place for place, (a, b) in enumerate(pairs) if a != b), None))
    parted = [place for place in first if place is not None]
    prompts = np.array([text.prompt for text in exact])
    same = np.array([place is None for place in first], dtype=float)
    figures: dict[str, Any] = {
        "texts": len(exact), "identical": float(same.mean()), "identical_ci": bootstrap(same, prompts, seed),
        "first_difference": float(np.median(parted)) if parted else None,
        "mean_length": {"exact": float(np.mean([len(t.completion) for t in exact])),
                        "merged": float(np.mean([len(t.completion) for t in merged]))},
    }  # fmt: skip
    if reward is not None:
        earned = [np.array([reward(tokenizer.decode(t.completion, skip_special_tokens=True)) for t in side], dtype=float)
                  for side in (exact, merged)]  # fmt: skip
        difference = earned[1] - earned[0]
        figures |= {
            "reward": {"exact": float(earned[0].mean()), "merged": float(earned[1].mean())},
            "reward_difference": float(difference.mean()), "reward_difference_ci": bootstrap(difference, prompts, seed),
        }  # fmt: skip
    return figures


def _shown(
    whose: str, lams: Sequence[Lam], texts_at: dict[Lam, list[Text]], per_token: dict[Lam, dict[str, np.ndarray]],
    merged: dict[Lam, tuple[list[Text], dict[str, np.ndarray]]], tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
) -> list[dict[str, Any]]:  # fmt: skip
    """A few texts of each λ with the kl of each token: scored ones, and beside them the merged model's, if there are."""

    def pieces(texts: list[Text], kl: np.ndarray, index: int) -> list[list[Any]]:
        start = sum(len(text.completion) for text in texts[:index])
        return [[tokenizer.decode([token]), float(kl[start + n])] for n, token in enumerate(texts[index].completion)]

    shown = []
    for lam in lams:
        texts = texts_at[lam]
        for index in range(min(SHOWN, len(texts))):
            entry = {"lambda": lam, "prompt": prompts[texts[index].prompt].text, "of": whose,
                     "scored": pieces(texts, per_token[lam]["kl"], index)}  # fmt: skip
            if lam in merged:
                entry["merged"] = pieces(merged[lam][0], merged[lam][1]["kl"], index)
            shown.append(entry)
    return shown
