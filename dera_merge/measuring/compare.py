"""How far the merged model is from exact DeRa, token by token, and what that means.

`compare` goes all the way from prompts to a `Report`. Texts are given or sampled; each model reads them once and leaves
its last hidden states (`traces.py`); distributions are made from these a few tokens at a time and reduced in float64
(`divergence.py`). K values of λ on given texts cost K+2 passes, 2K+2 where rounding is told apart. What else can be
asked for works on the same texts or on new ones: a scale that people know (`yardstick.py`), a prediction from few
probes (`statistics/prediction.py`), where the error comes from (`attribution.py`), and texts of both models under the
same noise (`where.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .. import lambdas
from ..errors import DeraError, warn
from ..files.room import check_space
from ..lambdas import Lam, Vector
from ..merging.parts import along, rules_of
from ..merging.path import Course, opened
from ..merging.recipe import verify, weights_digest
from ..merging.storage import Storage
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..processes import launched
from ..progress import Progress
from ..serving import vllm_server as engines
from ..statistics.prediction import predict
from ..statistics.summary import MEASURES, gram_of, log_ratio, summarise
from ..statistics.verdict import bits_like, verdict
from ..texts import prompts as prompt_files
from ..texts.batches import Batches
from ..texts.prompts import Prompt
from ..texts.rewards import Reward, as_reward, checked
from .laboratory import Compute
from .layered import LayeredLab
from .ledger import FOLDER, Ledger
from .precision import chosen, full_float32, in_bytes, too_large
from .report import Report
from .steps import ComparisonLab, Measured, Reading
from .traces import Text
from .where import coupled_figures, for_each_token, shown_texts, where_it_lies

if TYPE_CHECKING:
    from ..merging.rounding import Rounding

log = logging.getLogger(__name__)
PER_TOKEN = 250  # bytes that finished steps keep of a token
PAGES = 4_000_000  # bytes of a report
Extra = Literal["floor", "ladder", "predict", "layers", "coupled"]
EXTRAS: tuple[Extra, ...] = ("floor", "ladder", "predict", "layers", "coupled")


@full_float32()
def compare(
    pair: Pair,
    lams: Sequence[float | Sequence[float]],
    prompts: Sequence[str | dict[str, Any] | Prompt] | None = None,
    *,
    approx: str | os.PathLike[str] | None = None,
    path: str | os.PathLike[str] | Course | None = None,
    lambda_for: Mapping[str, float | Sequence[float]] | None = None,
    dtype: torch.dtype | str | None = "auto",
    rounding: Rounding | None = None,
    texts: Literal["exact", "merged"] = "exact",
    samples: int = 1,
    max_new_tokens: int = 64,
    extras: Iterable[Extra] = ("floor",),
    extra_prompts: int = 8,
    reward: Reward | str | Callable[..., Any] | None = None,
    seed: int = 0,
    engine: str | None = None,
    batch_size: int | None = None,
    max_memory: int | str | None = None,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str = torch.float32,
    unfinished: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure the merged model against exact DeRa at each λ.

    Started by `accelerate launch` or `torchrun`, each process measures a share of the prompts; all return the same
    report.

    Args:
        pair: the two models.
        lams: the λ to measure; with several aligned models, a number for each.
        prompts: texts or rows (`{"prompt": …}`, `{"messages": …}` and what else `texts/forms.py` knows), all or none
            with a `"completion"` to score on; without completions, texts are sampled at temperature 1 for each λ. What
            is too long is left out. Default: 32 general ones.
        approx: a directory that `merge` wrote, or the parent of `lambda-*`, to measure instead of merging anew. One
            whose parts have λ of their own is measured against exact DeRa at any λ.
        path: a path that `calibrate` learned, or its file, to measure in the place of the straight line.
        lambda_for: λ of parts of the merged model, as for `ModelPair.merged`; exact DeRa has one of `lams`.
        dtype: of the merged model's stored weights, as for `merge`.
        rounding: how they are rounded to it, as for `merge`.
        seed: of stochastic rounding, sampling and bootstrap.
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
        reward: a text's reward, for `"coupled"`: a `Reward`, a function, or a spec as for `load_reward`.
        engine: sample by vLLM: the address of a server of the pair's exact directory, or `"vllm"` to start one.
        batch_size: how many texts models sample and read at a time; default: as many as fit, fewer once memory ran out.
        max_memory: bytes that models may take, or a text such as `"8GB"`; default: what is free. Where one model is
            more, texts are scored layer by layer: no model is held whole, and all λ pass a layer together. Texts of
            exact DeRa are sampled likewise, those of all λ together, where not even bfloat16 fits.
        device: where the models run.
        compute_dtype: in what they run; `"auto"` is float32, or bfloat16 where only that fits in free memory.
        unfinished: a directory in which to keep finished steps until the report is saved; with several processes
            nothing is kept.
        resume: go on with what an interrupted call with the same arguments left there.
        overwrite: throw away what an earlier call left there.
        progress: called as work goes on.

    Returns:
        A `Report`. Divergences are in nats per token, averaged over all scored tokens, intervals are 95 % (bootstrap
        over prompts).

    Raises:
        DeraError: the pair cannot be merged or run, prompts are unusable, or `approx` or `path` is for another λ or
            pair; another run is at work in `unfinished`, or an earlier one left something there.
    """
    lams = pair.known(lams)
    extras = tuple(extras)
    if unknown := sorted(set(extras) - set(EXTRAS)):
        raise DeraError(f"{unknown[0]!r} is nothing that can be measured; known are {', '.join(EXTRAS)}")
    for extra in ("predict", "layers"):
        if extra in extras:
            pair.only_pair(f"--with {extra} is")
    if approx is not None and (path is not None or lambda_for):
        raise DeraError("--approx measures a directory, --path and --lambda-for merge anew; give one of them")
    tokenizer = pair.tokenizer
    if prompts is None:
        prompts = prompt_files.encode(prompt_files.default(tokenizer), tokenizer)
    encoded = prompt_files.fitting(
        prompts, tokenizer, max_new_tokens, pair.context_length, "coupled" in extras, lambda: pair.processor
    )
    given = [prompt.completion is not None for prompt in encoded]
    if any(given) and not all(given):
        raise DeraError(f"prompt {given.index(False) + 1} has no completion, others have; give all or none")
    if all(given) and (samples > 1 or texts == "merged"):
        raise DeraError("the prompts bring completions, so that nothing is sampled; leave out --texts and --samples")
    if engine and (all(given) or texts == "merged" or "coupled" in extras):
        raise DeraError("--engine samples exact DeRa's texts, with noise of its own; leave it out for given texts, for "
                        "--texts merged and for --with coupled")  # fmt: skip
    reward = None if reward is None else as_reward(reward)
    if reward is not None:
        if reward.compares:
            raise DeraError("a judge of pairs compares with λ=1's answers, which sweep has; a judge's prompt with "
                            "{answer} judges one text by itself")  # fmt: skip
        first, *_ = checked([reward], encoded)
        if why := reward.why_not(first):  # which may be that text's fault
            warn(f"the reward {reward.name} fails on a first text: {why}")
    limit = in_bytes(max_memory)
    shows = any(prompt.shown for prompt in encoded)
    can_be_layered = (all(given) or texts == "exact") and approx is None and not shows
    # What is given is read once, in any case; sampling from the files takes much longer than with models that are held.
    models = 1 if all(given) or pair.shared_base else len(pair.sides)
    is_auto = compute_dtype == "auto"
    least = torch.bfloat16 if is_auto and not all(given) else compute_dtype
    why_layered = too_large(pair, device, models, limit, least) if can_be_layered else None
    if why_layered:
        compute_dtype = torch.float32 if is_auto else compute_dtype
        log.info(f"layer by layer: {why_layered}")
        if "coupled" in extras:
            raise DeraError("--with coupled samples the merged model's texts too, which takes it whole; leave it out")
    else:
        compute_dtype = chosen(pair, compute_dtype, device, limit)
    if why_layered or (is_auto and compute_dtype != torch.float32):
        if whole := [extra for extra in extras if extra in ("floor", "ladder", "layers")]:
            log.info(f"left out: {', '.join(whole)}, which takes whole models in float32")
        extras = tuple(extra for extra in extras if extra not in whole)
    storage = Storage.of(pair.names, dtype, rounding, seed)
    rounds = any(kind != torch.float32 for kind, _ in storage.layout(pair.names).values())
    course = opened(along(pair, path, lambda_for), pair, lams)
    approximations = {lam: _approximation(approx, lam, pair) for lam in lams} if approx is not None else {}
    process, processes = launched()
    ledger = Ledger(
        None if unfinished is None or processes > 1 else Path(unfinished) / FOLDER,
        {"pair": fingerprint(pair), "lams": lams, "prompts": [[p.mark, p.completion] for p in encoded],
         "approx": str(approx), "path": course.sha256 if course else None, "dtype": str(dtype),
         "rounding": storage.rounding,
         "texts": texts, "samples": samples, "tokens": max_new_tokens, "seed": seed, "compute": str(compute_dtype),
         "extra_prompts": extra_prompts, "engine": bool(engine)},
        resume=resume, overwrite=overwrite, writes=process == 0,
    )  # fmt: skip
    measured = Measured(encoded, samples, max_new_tokens, storage, approximations)
    compute = Compute(device, compute_dtype, Batches(batch_size), bool(why_layered), limit)
    kind = LayeredLab if why_layered else ComparisonLab
    lab = kind(pair, compute, course, seed, progress, measured, rounds, ledger)
    if unfinished is not None and process == 0:
        count = sum(len(p.completion) if p.completion else samples * max_new_tokens * len(lams) for p in encoded)
        check_space(Path(unfinished), PAGES + count * PER_TOKEN * (2 if "coupled" in extras else 1))

    with ledger, engines.engine(engine, pair, lambda: lab.exact, encoded, max_new_tokens, compute_dtype) as lab.engine:
        report = _compared(lab, lams, texts, extras, extra_prompts, reward)
    report.ledger = ledger
    rounding, merge_seed, followed = storage.rounding, seed, course.describe() if course else None
    for result in report.results:
        if result["lambda"] in approximations:
            result["weights"] = weights_digest(approximations[result["lambda"]][1])
    for _, recipe in approximations.values():  # what was measured is what the directory holds
        dtype, rounding, merge_seed = recipe.get("dtype"), recipe.get("rounding"), recipe.get("seed")
        followed = None if recipe.get("path", "line") == "line" else recipe["path"]
    origin = "exact DeRa" if texts == "exact" else "the merged model"
    report.settings |= {
        "prompts": len(encoded), "texts": "given" if all(given) else f"sampled from {origin} at each λ",
        "engine": "vllm" if engine else None, "samples": None if all(given) else samples,
        "max_new_tokens": None if all(given) else max_new_tokens,
        "dtype": str(dtype).removeprefix("torch."), "rounding": rounding, "seed": seed,
        "merge_seed": merge_seed, "compute_dtype": str(compute_dtype).removeprefix("torch."),
        "approx": None if approx is None else os.fspath(approx), "path": followed,
        "extras": list(extras), "extra_prompts": min(extra_prompts, len(encoded)), "fingerprint": fingerprint(pair),
    }  # fmt: skip
    return report


def _compared(
    lab: ComparisonLab, lams: list[Lam], texts: str, extras: Sequence[Extra], extra_prompts: int,
    reward: Reward | None,
) -> Report:  # fmt: skip
    """The report of everything that `compare` was asked for; its settings are filled in later, but for `resolution`."""
    pair, encoded, tokenizer, seed, course = lab.pair, lab.prompts, lab.pair.tokenizer, lab.seed, lab.path
    given = [prompt.completion is not None for prompt in encoded]
    report = Report(pair.ref.source.name, pair.aligned_name, [], {})
    # Each model is needed for a while, and let go before the next: exact DeRa's texts, the merged model's texts, then
    # all that both sides read, and what each merge reads.
    coupled, on_merged = "coupled" in extras, "coupled" in extras and texts != "merged"
    at_hand = lams if course is None and not lab.approximations else []
    probed = [lam for lam in lab.probes(lams) if lam not in at_hand] if "predict" in extras else []
    for whose in ("exact", "merged"):
        wanted = lams if coupled or (texts == whose and not all(given)) else []
        wanted = [*wanted, *probed] if whose == "exact" and not all(given) else wanted
        lab.sample(whose, list(dict.fromkeys(wanted)))
        if coupled or texts == "merged":
            lab.let_go()
    # On given texts, reference and aligned model read once for all λ.
    main = [Reading(lams, lab.given())] if all(given) else [Reading([lam], lab.sampled(texts, lam)) for lam in lams]
    theirs = [Reading([lam], lab.sampled("merged", lam), "merged-") for lam in lams if on_merged]
    probe_texts = {lam: lab.given() if all(given) else lab.sampled("exact", lam) for lam in probed}
    probing = [Reading([lam], probe_texts[lam], "probe-", line=True) for lam in probed]
    figures = lab.measure([*main, *theirs, *probing])
    readings = {lam: row for found in figures[: len(main)] for lam, row in found.items()}
    merged_readings = {lam: row for found in figures[len(main) :][: len(theirs)] for lam, row in found.items()}
    probe_readings = {lam: row for found in figures[len(main) + len(theirs) :] for lam, row in found.items()}
    lab.let_go()
    resolution = max(float(reading["resolution"][0]) for reading in readings.values())
    texts_at = {lam: reading.texts for reading in main for lam in reading.lams}
    few = {lam: [text for text in chosen if text.prompt < extra_prompts] for lam, chosen in texts_at.items()}
    floors = lab.floor(few) if "floor" in extras else {}
    rungs = lab.ladder(few) if "ladder" in extras else {}
    for lam in lams:
        prompt_of = for_each_token([text.prompt for text in texts_at[lam]], texts_at[lam])
        text_of = for_each_token(range(len(texts_at[lam])), texts_at[lam])
        per_token = {key: values for key, values in readings[lam].items() if key != "resolution"}
        report.per_token[lam], report.prompt_of[lam] = per_token, prompt_of
        result = {"lambda": lam, "resolution": resolution, **summarise(per_token, prompt_of, text_of, resolution, seed)}
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
            result["bits"] = bits_like(result["ladder_kl"], {bits: kl[lam] for bits, kl in rungs.items()})
        result["verdict"], result["why"] = verdict(result, floors.get(lam), resolution)
        result |= where_it_lies(per_token, texts_at[lam], tokenizer)
        report.results.append(result)
    merged_texts: dict[Lam, tuple[list[Text], dict[str, np.ndarray]]] = {}
    if coupled:
        for result in report.results:
            lam = result["lambda"]
            of_exact = texts_at[lam] if not all(given) and texts == "exact" else lab.sampled("exact", lam)
            of_merged = texts_at[lam] if texts == "merged" else lab.sampled("merged", lam)
            result["coupled"] = coupled_figures(of_exact, of_merged, tokenizer, encoded, reward, seed)
            if on_merged:
                reading = merged_readings[lam]
                merged_texts[lam] = (of_merged, reading)
                kept = {key: values for key, values in reading.items() if key != "resolution"}
                prompt_of = for_each_token([text.prompt for text in of_merged], of_merged)
                text_of = for_each_token(range(len(of_merged)), of_merged)
                figures = summarise(kept, prompt_of, text_of, resolution, seed)
                result["on_merged_texts"] = {key: figures[key] for key in ("tokens", *MEASURES, "kl_ci", "captured")}
    if "predict" in extras:
        probes = {}
        for lam in lab.probes(lams):
            reading = probe_readings[lam] if lam in probed else readings[lam]
            probes[lam] = float(reading.get("kl_nonlinearity", reading["kl"]).mean())
        ends = min(0.0, *lams), max(1.0, *lams)
        grid = sorted({*lams, *np.linspace(*ends, 65).round(4).tolist()} - set(lambdas.ends()))
        report.prediction = predict(probes, grid, resolution)
        known = {row["lambda"]: row for row in report.prediction}
        for result in report.results:
            if row := known.get(result["lambda"]):
                result["predicted"] = {"kl": row["kl"], "holds": row["holds"]}
    if "layers" in extras:
        for result in report.results:
            if not lambdas.is_end(result["lambda"]):
                result["layers"] = lab.layers(few[result["lambda"]], result["lambda"])
    if all(given) or texts == "merged":  # the weights to the sequence-level mixture are those of exact DeRa's own texts
        for result in report.results:
            result["sequence"]["ess_share"] = None
    whose = "given" if all(given) else "exact DeRa" if texts == "exact" else "merged"
    report.texts = shown_texts(whose, lams, texts_at, report.per_token, merged_texts, tokenizer, encoded)
    report.settings = {"resolution": resolution}
    return report


def _approximation(approx: str | os.PathLike[str], lam: Lam, pair: Pair) -> tuple[Path, dict[str, Any]]:
    """The merged directory for λ, `approx` itself or `approx/lambda-<λ>`, and its recipe; DeraError if of another λ.

    One whose parts have λ of their own is for every λ.
    """
    folder = Path(approx)
    if not (folder / "dera_merge.json").is_file():
        name = lambdas.folder_name(lam)
        named = [place for place in (folder / name, *sorted(folder.glob(f"{name}_*"))) if place.is_dir()]
        if len(named) > 1:
            raise DeraError(f"{folder} holds {named[0].name} and {named[1].name}; give one of the two")
        folder = named[0] if named else folder
    recipe = verify(folder)
    if recipe["lambda"] != lam and not rules_of(recipe.get("path")):
        raise DeraError(f"{folder} was merged at λ={recipe['lambda']:g}, asked for is λ={lam:g}")
    made_of = [recipe["ref"], recipe["aligned"], *recipe.get("others", ())]
    if len(made_of) != len(pair.sides):
        raise DeraError(f"{folder} was merged from {len(made_of)} models, compared are {len(pair.sides)}")
    for made, side in zip(made_of, pair.sides, strict=True):
        name = str(made.get("name"))
        if name != side.source.name and Path(name).resolve() != side.source.folder:
            warn(f"{folder} was merged from {name}, it is compared with {side.source.name}; are they the same model?")
    return folder, recipe
