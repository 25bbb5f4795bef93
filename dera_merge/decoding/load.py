"""Load the models of a pair; an adapter and its base over one set of weights."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import DeraError
from ..models import spread
from ..models.adapter import Adapter
from ..models.architecture import LOADING, Architecture, loading
from ..models.kinds import config_of, model_class
from ..models.pair import Pair
from ..models.trust import NOTHING, Trust
from ..models.weights import Stored
from .rows import in_rows, second_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
LARGE = 1 << 28  # bytes of a model
Bases = dict[tuple[Path, torch.device, bool], Any]  # models, by directory, device, and whether they were requantised


def load_sides(
    pair: Pair, dtype: torch.dtype | str, devices: tuple[torch.device, torch.device], **kwargs: Any
) -> tuple[PreTrainedModel, list[PreTrainedModel], PreTrainedModel | None]:
    """All models of a pair in evaluation mode, and all as rows of one where they share a base on one device.

    Args:
        pair: whose.
        dtype: compute dtype, or `"auto"`.
        devices: of the reference, and of all aligned models.
        kwargs: passed to transformers' `from_pretrained`.

    Returns:
        The reference, each aligned model, and the model of `rows.in_rows` or None.

    Raises:
        DeraError: transformers or PEFT cannot load one of them.
    """
    bases: Bases = {}
    ref, *aligned = (
        _load_side(pair, number, dtype, devices[number > 0], bases, **kwargs) for number in range(len(pair.sides))
    )
    together = len(bases) == 1 and not any(ref is model for model in aligned)
    rows = in_rows(next(iter(bases.values())), ref, *aligned) if together else None
    if rows is not None and len(aligned) == 1:
        aligned = [rows]  # outside of `DeraForCausalLM` it acts as the aligned model
    return ref, aligned, rows


def each_side(
    pair: Pair, dtype: torch.dtype | str, device: str | torch.device, work: Callable[[PreTrainedModel], T]
) -> Iterator[T]:
    """What `work` makes of the reference and then of each aligned model, of which none is kept.

    Models that share no weights are loaded one after another, so that one is held at a time.
    """
    pair.check_tokens(merged=False)
    place = torch.device(device)
    if pair.shared_base:
        ref, aligned, _ = load_sides(pair, dtype, (place, place))
        models = [ref, *aligned]
        del ref, aligned, _
        yield from map(work, models)
        forget(models)
        return
    for number in range(len(pair.sides)):
        models = [_load_side(pair, number, dtype, place, {})]
        made = work(models[0])
        forget(models)
        yield made


def forget(models: list[torch.nn.Module]) -> None:
    """Empty this list of models that nothing else refers to, so that others have their memory.

    Modules that refer to each other stay until Python looks for such circles. Large ones are not left to wait for that:
    looking takes a fraction of a second.
    """
    large = sum(p.numel() * p.element_size() for model in models for p in model.parameters()) >= LARGE
    models.clear()
    if large:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load_side(
    pair: Pair, number: int, dtype: torch.dtype | str, device: torch.device, bases: Bases, **kwargs: Any
) -> PreTrainedModel:
    """The reference (0) or an aligned model, over a base in `bases` if it is there; else that is loaded and put there.

    The reference says how many rows of the vocabulary it really has, where ALIGNED brings more (`dera_known_rows`).
    """
    side = pair.sides[number]
    folder = side.base.folder
    requantise = pair.is_requantised(side) and kwargs.get("quantization_config") is None
    if (folder, device, requantise) not in bases:
        config = side.built_config(pair.trust.code)
        model = load_model(folder, dtype, device, pair.trust, **{"config": config, **kwargs})
        if requantise:
            _put(pair.names.weights[number].stored, model, pair.architecture)
        if pair.brings_tokens and folder == pair.ref.base.folder:
            _grow(model, pair)
        bases[folder, device, requantise] = model
    base = bases[folder, device, requantise]
    model = _with_adapters(base, side.adapters, device) if side.adapter else base
    if number == 0 and pair.brings_tokens:
        model.dera_known_rows = pair.ref.vocabulary_rows
    return model


def load_model(
    folder: Path, dtype: torch.dtype | str, device: str | torch.device, trust: Trust = NOTHING, *, kind: Any = None,
    brought: Collection[str] = (), **kwargs: Any,
) -> PreTrainedModel:  # fmt: skip
    """A model from a directory, in evaluation mode; refuses one that would get random weights.

    Args:
        folder: of the checkpoint.
        dtype, device: in what and where.
        trust: what may be read and run.
        kind: transformers' class to load it with; default: the one that its config names.
        brought: tensors that it may lack, because an adapter brings them.
        kwargs: passed to `from_pretrained`.

    Raises:
        DeraError: transformers cannot load it, or would make a tensor up.
    """
    config = kwargs.get("config") or config_of(folder, trust)
    try:
        quantised = kwargs.get("quantization_config") or getattr(config, "quantization_config", None)
        kwargs = spread.how() | kwargs
        if quantised and "device_map" not in kwargs:
            kwargs["device_map"] = {"": device}  # quantised weights are made where they stay
        with loading(sum(file.stat().st_size for file in folder.glob("*.safetensors"))):
            model, report = (kind or model_class(config)).from_pretrained(
                folder, dtype=dtype, use_safetensors=None if trust.pickle else True, trust_remote_code=trust.code,
                output_loading_info=True, **kwargs,
            )  # fmt: skip
    except (ValueError, OSError, RuntimeError, KeyError, ImportError, AttributeError) as error:
        raise DeraError(f"transformers cannot load {folder}: {error}") from error
    unfit = {key[0] if isinstance(key, tuple) else str(key) for key in report["mismatched_keys"]}
    if missing := sorted({*report["missing_keys"], *unfit} - set(brought)):
        raise DeraError(
            f"{folder} lacks tensor {', '.join(missing[:3])} ({len(missing)} in all, missing or of another shape); "
            "transformers would make it up"
        )
    return (spread.checked(model) if "device_map" in kwargs else model.to(device)).eval()


def _with_adapters(
    base: PreTrainedModel, adapters: Sequence[Adapter], device: str | torch.device
) -> PreTrainedModel:
    """The base model with an adapter in it, or one on another, unmerged: PEFT's own forward. The base stays shared.

    What stands on an adapter that is more than sums changes weights that the base does not have; it gets its own.
    """
    first, *above = adapters
    if all(adapter.is_sum_on_layers for adapter in adapters) or not above:
        adapted = first.load_onto(_tree_for(base, first), device)
        for adapter in above:
            adapted = adapter.load_onto(adapted, device)
        return adapted.get_base_model().eval()
    if getattr(base.config, "quantization_config", None) is not None:
        raise DeraError(f"{above[0].folder} on {first.folder} is no sum of low rank; that needs a base which is "
                        "not quantised")  # fmt: skip
    # PEFT merges LoRA out of place if asked to, so what the first adapter leaves alone stays shared.
    tree = _tree_for(base, first) if first.config["peft_type"] == "LORA" else copy.deepcopy(base)
    merged = first.load_onto(tree, device).merge_and_unload(safe_merge=True)
    return _with_adapters(merged, above, device)


def _tree_for(base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A second module tree over the base's weights, for an adapter to go on."""
    if getattr(base.config, "quantization_config", None) is not None:
        if adapter.changes_base_at_load or adapter.brings_base_tensors:
            raise DeraError(
                f"{adapter.folder} changes the base when it is loaded; that needs a base which is not quantised"
            )
        return adapter.resized(second_tree(base))
    # A second module tree over the same storages. The Parameter objects are new, so that an adapter which assigns to
    # `.data` cannot reach the reference; what is written in place (by PiSSA and its kind, or embeddings that came with
    # the adapter) gets a copy.
    ends = [end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None]
    if adapter.changes_base_at_load:
        written = {id(p) for p in base.parameters()}
    else:
        written = {id(p) for end in ends for p in end.parameters() if adapter.brings_base_tensors}
    twins = {
        id(p): torch.nn.Parameter(p.data.clone() if id(p) in written else p.data, requires_grad=False)
        for p in base.parameters()
    }
    return adapter.resized(copy.deepcopy(base, memo=dict(twins)))


def _grow(model: PreTrainedModel, pair: Pair) -> None:
    """Give a model the rows of the vocabulary that it lacks: ALIGNED's, which stand at every λ."""
    height = model.get_input_embeddings().weight.shape[0]
    if height >= pair.vocab_size:
        return
    with LOADING:
        model.resize_token_embeddings(pair.vocab_size, mean_resizing=False)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if pair.names.unties and ends[1] is not None and ends[0].weight is ends[1].weight:
        model.config.tie_word_embeddings = False
        ends[1].weight = torch.nn.Parameter(ends[0].weight.detach().clone(), requires_grad=False)
    parameters = model.state_dict()  # the state shares memory with the model
    for name, info in pair.tensors.items():
        if info.rows > pair.names.ref.info(name).rows:
            place = parameters[pair.layout.group_of[name].targets[0]]
            place[height:] = pair.names.weights[1].effective(name, height, info.rows).to(place)


def _put(stored: Stored, model: PreTrainedModel, architecture: Architecture) -> None:
    """Replace a loaded model's weights by their requantised ones."""
    parameters, weights = model.state_dict(), stored.requantised  # the state shares memory with the model
    groups = architecture.layout(stored.checkpoint.tensors).group_of if weights else {}
    for key in weights.keys if weights else ():
        parameters[groups[key].targets[0]].copy_(weights.rows(key, 0, None))
