"""λΔ as a PEFT adapter: one base, many λ, each a small file that serving engines load beside it.

Base and adapter give an adapter of the same rank. Two adapters on one base give the exact concatenation
(1-λ)·s₁B₁A₁ + λ·s₂B₂A₂ of rank r₁+r₂; adding A and B separately would be another model. A dense pair gives the best
rank-R adapter that a randomised SVD finds. Every scale is folded into B, with one rank and lora_alpha = r, because
serving engines ignore the keys that say otherwise.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import DeraError, warn
from ..files.atomic import load_json
from ..files.buffers import Buffers
from ..files.checkpoint import slices
from ..files.shards import ShardWriter, file_order
from ..lambdas import Lam, numbers
from ..lambdas import name as name_of
from ..models.names import Names
from ..models.pair import Pair
from ..models.pieces import LowRank, Replacement
from ..progress import Count
from .companions import tokenizer_files
from .output import Output, open_outputs, writing
from .path import Course, opened
from .recipe import describe_pair
from .rounding import Rounding, noise_for, round_to
from .storage import Layout, Storage, parse_dtype
from .tally import Tally
from .theta import Slice, stored_rows

FILE = "adapter_model.safetensors"
OVERSAMPLING, POWER_ITERATIONS = 8, 2  # of the randomised SVD (Halko et al., 2011, §1.3)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank


@dataclass(frozen=True)
class Factors:
    """λΔ of one module as left·right; `kept` of the `total` ‖λΔ‖² is in them."""

    left: torch.Tensor  # (out, k), float32
    right: torch.Tensor  # (k, in), float32
    kept: float = 1.0
    total: float = 1.0


Share = Callable[[Lam], float]  # how much of one adapter is in θ(λ)
Energies = dict[str, tuple[float, float]]  # module → `kept` and `total` of its Factors


@dataclass(frozen=True)
class Module:
    """One adapted module: the names of its factors in the file, their shapes, and a function from λ to the factors."""

    a: str
    b: str
    out: int
    into: int
    rank: int
    factors: Callable[[Sequence[float]], list[Factors]]


def merge_adapters(
    pair: Pair,
    out: str | os.PathLike[str],
    lams: Sequence[float],
    *,
    rank: int | None = None,
    extract_rank: int | None = None,
    dtype: torch.dtype | str | None = "auto",
    rounding: Rounding | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    path: str | os.PathLike[str] | Course | None = None,
    progress: Count | None = None,
) -> list[Path]:
    """Write λΔ as PEFT LoRA adapters over the base of the pair.

    Args:
        pair: a base and an adapter, two adapters on one base, or, with `extract_rank`, any pair.
        out: the directory of the one λ; with several, they go to `out/lambda-<λ>`.
        lams: finite λ.
        rank: cut the adapters to this rank by SVD; what that loses is in `dera_merge.json` (`energy`, the share of
            ‖λΔ‖² that is kept, in all and per module).
        extract_rank: take Δ of the linear layers from the weights, as an adapter of this rank.
        dtype: of the adapters' tensors; `"auto"`: the dtype of ALIGNED's adapter, or float32 with `extract_rank`.
        rounding: default nearest: a scaled factor has no reference value to be rounded back to.
        seed: of the randomised SVD, and of stochastic rounding.
        resume, overwrite: as for `merge`.
        path: a path that `calibrate` learned, or its file; its low-rank part adds to the rank. Or `parts.ByPart`.
        progress: called with (modules done, modules in all).

    Returns:
        The directories, in the order of `lams`; `PeftModel.from_pretrained(base, directory)` loads them.

    Raises:
        DeraError: λΔ is no adapter, an option does not fit, or the output cannot be written.
    """
    lams = pair.known(lams)
    for name, number in (("--rank", rank), ("--extract-rank", extract_rank)):
        if number is not None and number < 1:
            raise DeraError(f"{name} {number} is not a rank; give 1 or more")
    if extract_rank:
        pair.only_pair("--extract-rank is")
    tensors = pair.tensors
    if pair.names.vocabulary is not None:
        raise DeraError("the vocabulary grew, and an adapter over the base does not hold new rows; --format full does")
    if extract_rank and pair.ref.adapter:
        raise DeraError("--extract-rank makes an adapter over REF, which must be a full model, not an adapter itself")
    if extract_rank and rank:
        raise DeraError("--extract-rank and --rank say the same; give one")
    course = opened(path, pair, lams)
    if extract_rank and course:
        raise DeraError(
            "--extract-rank approximates the straight line; --path and --lambda-for go with --format full or adapter "
            "pairs"
        )
    if extract_rank:
        modules, whole = _extracted(pair, extract_rank, seed), {}
    else:
        modules, whole = _folded(pair, course)
    if rank:
        modules = [_cut(module, rank) for module in modules]
    width = extract_rank or rank or max((module.rank for module in modules), default=1)

    wanted = parse_dtype(dtype) or _adapters_dtype(pair)
    storage = Storage(wanted, rounding or "nearest", seed)
    layout: Layout = {key: (wanted, tensors[name].shape) for key, name in whole.items()}
    for module in modules:
        layout |= {module.a: (wanted, (width, module.into)), module.b: (wanted, (module.out, width))}
    recipe = describe_pair(pair, course) | {
        "format": "adapter", "rank": width, "cut_to_rank": rank, "extract_rank": extract_rank,
        "dtype": str(wanted).removeprefix("torch."), "rounding": storage.rounding, "seed": seed,
    }  # fmt: skip
    outputs = open_outputs(pair, out, lams, recipe, {FILE: layout}, resume=resume, overwrite=overwrite)
    config = _config(pair, modules, width)
    beside = _companions(pair)
    if more := pair.ends_beyond_base():
        tokens = ", ".join(map(str, more))
        warn(f"engines end texts as the base's files say, and other files call {tokens} an end too; an adapter cannot "
             "say so, name it as a stop token where you serve")  # fmt: skip
    with writing(outputs, overwrite=overwrite) as pending:
        if pending:
            figures = _write(pair.names, pending, modules, whole, layout, storage, course, progress)
            left_out = {"left_out": _left_out(pair)} if extract_rank else {}
            for output, figure in zip(pending, figures, strict=True):
                statistics = _energy(figure) | left_out if rank or extract_rank else {"energy": 1.0}
                output.finish("adapter_config.json", config, beside, statistics)
    return [output.folder for output in outputs]


def _adapters_dtype(pair: Pair) -> torch.dtype:
    """The dtype that all tensors of the adapters have; float32 where they differ."""
    kinds = {info.dtype for side in pair.sides if side.adapter for info in side.adapter.checkpoint.tensors.values()}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _folded(pair: Pair, course: Course | None) -> tuple[list[Module], dict[str, str]]:
    """The sums s·BA of both sides by module, and the tensors that are stored whole: name in the file → tensor."""
    if not pair.shared_base:
        raise DeraError("λΔ of full models is no adapter; --extract-rank R approximates it, --format full holds it")
    modules: list[Module] = []
    whole: dict[str, str] = {}
    weights = pair.names.weights
    names = sorted({name for side in weights for name in side.pieces})
    for name in names:
        terms = []
        for number, side in enumerate(pair.sides):
            share = _share(number)
            for piece in weights[number].pieces.get(name, ()):
                if isinstance(piece, Replacement):
                    if piece.key.endswith(("base_layer.weight", "embed_tokens.weight")):
                        raise DeraError(f"{side.source.name} brings the base's {name}; --format full holds that")
                    whole[piece.key] = name
                elif isinstance(piece, LowRank):
                    _add(terms, piece, share)
                else:
                    raise DeraError(
                        f"λΔ of {name} is no sum s·BA ({side.adapter.kind}); --format full holds it, "
                        "--extract-rank R approximates it"
                    )
        if terms and name in whole.values():
            raise DeraError(
                f"{name} is trained whole in one adapter and by a sum in the other; --format full holds that"
            )
        if terms:
            modules.append(_module(terms, name, course))
    return modules, whole


def _add(terms: list[tuple[LowRank, Share]], piece: LowRank, share: Share) -> None:
    """Add a term; one that is there already (REF's adapter, below ALIGNED's) gets both shares."""
    before = next((other for known, other in terms if known == piece), None)
    if before is None:
        terms.append((piece, share))
    else:
        at = [known for known, _ in terms].index(piece)
        terms[at] = piece, lambda lam: before(lam) + share(lam)


def _share(number: int) -> Share:
    """How much of side `number` is in θ(λ): the reference, number 0, gives 1 - Σ λ_k."""
    return lambda lam: numbers(lam)[number - 1] if number else 1 - sum(numbers(lam))


def _module(
    terms: list[tuple[LowRank, Share]], name: str, course: Course | None
) -> Module:  # fmt: skip
    """The factors of all terms (piece, its share at λ), and those of a learned path, as one pair of factors."""
    bend_rank = course.rank_at(name) if course else 0

    def factors(lams: Sequence[float]) -> list[Factors]:
        right = torch.cat([piece.adapter.read_whole(piece.a).float() for piece, _ in terms])
        lefts = [piece.scale * piece.adapter.read_whole(piece.b).float() for piece, _ in terms]
        at_each = []
        for lam in lams:
            bend = course.at(name, lam) if course else None
            gain = lam if bend is None else bend.gain
            left = torch.cat([share(gain) * left for left, (_, share) in zip(lefts, terms, strict=True)], 1)
            rights = right
            if bend is not None and bend.left is not None:
                # A path bends the tensor as stored; layers that store (in, out) have their factors the other way round.
                b, a = (bend.right.T, bend.left.T) if terms[0][0].transposed else (bend.left, bend.right)
                left, rights = torch.cat([left, b], 1), torch.cat([right, a])
            at_each.append(Factors(left, rights))
        return at_each

    shapes = [(piece.adapter.tensors[piece.a].shape, piece.adapter.tensors[piece.b].shape) for piece, _ in terms]
    (_, into), (out, _) = shapes[0]
    rank = sum(rank for (rank, _), _ in shapes) + bend_rank
    return Module(terms[0][0].a, terms[0][0].b, out, into, rank, factors)


def _cut(module: Module, rank: int) -> Module:
    """The best approximation of rank `rank`: the SVD of the small core between the factors' orthogonal bases."""

    def cut(whole: Factors) -> Factors:
        q, r = torch.linalg.qr(whole.left.double())
        p, s = torch.linalg.qr(whole.right.double().T)
        u, sigma, vt = torch.linalg.svd(r @ s.T)
        root = sigma[:rank].sqrt()
        left, right = q @ u[:, :rank] * root, root[:, None] * (vt[:rank] @ p.T)
        return Factors(left.float(), right.float(), sigma[:rank].square().sum().item(), sigma.square().sum().item())

    return replace(
        module, rank=min(rank, module.rank), factors=lambda lams: [cut(whole) for whole in module.factors(lams)]
    )


def _extracted(pair: Pair, rank: int, seed: int) -> list[Module]:
    """Δ of each linear layer that changes, by randomised SVD."""
    modules = []
    for module in pair.architecture.linear:
        name = pair.layout.name(f"{module}.weight")
        if name is None or pair.names.is_same(name):
            continue
        transposed = module in pair.architecture.transposed
        out, into = reversed(pair.tensors[name].shape) if transposed else pair.tensors[name].shape

        def factors(lams: Sequence[float], name: str = name, transposed: bool = transposed) -> list[Factors]:
            delta = _delta(pair.names, name).T if transposed else _delta(pair.names, name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little"))
                u, sigma, v = torch.svd_lowrank(delta, min(rank + OVERSAMPLING, *delta.shape), POWER_ITERATIONS)
            root, kept = sigma[:rank].sqrt(), sigma[:rank].double().square().sum().item()
            left, right = u[:, :rank] * root, root[:, None] * v[:, :rank].T
            total = delta.double().square().sum().item()
            return [Factors(lam * left, right, lam**2 * kept, lam**2 * total) for lam in lams]

        prefix = f"base_model.model.{module}"
        keys = f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"
        modules.append(Module(*keys, out, into, min(rank, out, into), factors))
    if not modules:
        raise DeraError("no linear layer differs between the two; there is nothing to extract")
    return modules


def _delta(names: Names, name: str) -> torch.Tensor:
    """Δ of a whole tensor that changes, float32."""
    info = names.tensors[name]
    delta, buffers = torch.empty((info.rows, *info.row_shape)), Buffers()
    for start, stop in slices(info):
        (piece,) = Slice.read(names, name, start, stop, Storage(torch.float32), buffers)
        delta[start:stop] = piece.aligned - piece.ref
    return delta.view(info.shape)


def _left_out(pair: Pair) -> dict[str, float]:
    """Tensors that change and are no linear layer: name → ‖Δ‖²."""
    linear = {pair.layout.name(f"{module}.weight") for module in pair.architecture.linear}
    changed = {}
    for name in pair.tensors.keys() - linear:
        if not pair.names.is_same(name) and (square := _delta(pair.names, name).double().square().sum().item()):
            changed[name] = square
    if changed:
        top = ", ".join(sorted(changed, key=lambda name: -changed[name])[:2])
        warn(f"an adapter holds the change of linear layers only; {len(changed)} other tensors change too ({top}, …)")
    return dict(sorted(changed.items()))


def _write(
    names: Names, outputs: list[Output], modules: list[Module], whole: dict[str, str], layout: Layout, storage: Storage,
    course: Course | None, progress: Count | None,
) -> list[Energies]:  # fmt: skip
    """Write the file of each output; returns what its factors hold."""
    owner = {key: module for module in modules for key in (module.a, module.b)}
    lams = [output.lam for output in outputs]
    writers = [ShardWriter(output.folder / FILE, layout) for output in outputs]
    figures: list[Energies] = [{} for _ in outputs]
    alive = {lam for lam in lams if whole or not any(numbers(lam))}  # λ that are not rounded away whole
    latest: tuple[str, list[Factors]] = ("", [])  # a module's two factors come one after the other
    try:
        for number, key in enumerate(file_order(layout), 1):
            dtype, shape = layout[key]
            if key in whole:
                _write_whole(names, whole[key], writers, lams, storage, course)
            else:
                module = owner[key]
                if latest[0] != module.a:
                    latest = (module.a, module.factors(lams))
                for lam, writer, figure, factors in zip(lams, writers, figures, latest[1], strict=True):
                    padded = torch.zeros(shape)
                    factor = factors.right if key == module.a else factors.left
                    padded[: factor.shape[0], : factor.shape[1]] = factor
                    noise = noise_for(storage.rounding, dtype, storage.seed, key, 0, shape)
                    stored = round_to(padded, dtype, noise)
                    writer.write(stored)
                    if key == module.b and stored.any():
                        alive.add(lam)
                    figure[module.a.rpartition(".lora_")[0]] = factors.kept, factors.total
            if progress:
                progress(number, len(layout))
        if lost := [lam for lam in lams if lam not in alive]:
            raise DeraError(f"at λ={name_of(lost[0])} nothing of λΔ survives rounding; --dtype float32 keeps it")
        for output, writer in zip(outputs, writers, strict=True):
            output.shard_done(FILE, writer.close(), Tally())
    finally:
        for writer in writers:
            writer.abandon()
    return figures


def _write_whole(
    names: Names, name: str, writers: list[ShardWriter], lams: list[float], storage: Storage, course: Course | None
) -> None:
    """θ(λ) of a tensor that was trained whole."""
    scratch, kept = Buffers(), Buffers()
    for start, stop in slices(names.tensors[name]):
        results = stored_rows(names, name, start, stop, lams, storage, scratch, kept, course)
        for writer, (stored, _) in zip(writers, results, strict=True):
            writer.write(stored)


def _energy(figures: Energies) -> dict[str, Any]:
    """The share of ‖λΔ‖² that a cut rank keeps, in all and per module; null where λΔ = 0."""
    kept, total = (sum(energies[index] for energies in figures.values()) for index in (0, 1))
    shares = {name: part / whole if whole else None for name, (part, whole) in sorted(figures.items())}
    return {"energy": kept / total if total else None, "per_module": shares}


def _config(pair: Pair, modules: list[Module], width: int) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it."""
    from peft import LoraConfig

    adapters = [side.adapter for side in pair.sides if side.adapter]
    saved = sorted({module for adapter in adapters for module in adapter.config.get("modules_to_save") or ()})
    biases = {adapter.config.get("bias", "none") for adapter in adapters} - {"none"}
    paths = [module.a.removeprefix("base_model.model.").rpartition(".lora_")[0] for module in modules]
    base, revision = pair.ref.base.address
    config = LoraConfig(
        r=width, lora_alpha=width, target_modules=_targets(paths, pair) or None, modules_to_save=saved or None,
        bias=biases.pop() if len(biases) == 1 else "none", task_type="CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=base, revision=revision,
        fan_in_fan_out=not pair.architecture.transposed.isdisjoint(paths),
    )  # fmt: skip
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _targets(paths: list[str], pair: Pair) -> list[str]:
    """`target_modules`: the last parts of the names where they say exactly which modules, else the whole names."""
    ends = {path.rpartition(".")[2] for path in paths}
    modules = {name.rpartition(".")[0] for name in pair.architecture.shapes if name.endswith(".weight")}
    return sorted(ends if {name for name in modules if name.rpartition(".")[2] in ends} == set(paths) else paths)


def _companions(pair: Pair) -> dict[str, bytes]:
    """Tokenizer and chat template, where an adapter brings them."""
    sides = (*pair.sides[1:], pair.ref)
    folders = [side.source.folder for side in sides if side.adapter and side.source.has_tokenizer()]
    return tokenizer_files(folders[0]) if folders else {}


def serving_rank(folder: Path) -> int | None:
    """The smallest `--max-lora-rank` of vLLM that holds an adapter; None where its rank is above all of them."""
    rank = load_json(folder / "adapter_config.json")["r"]
    return next((size for size in VLLM_RANKS if size >= rank), None)
