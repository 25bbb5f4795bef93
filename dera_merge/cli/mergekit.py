"""Files of mergekit (0.1) as options of `merge`, where they are a DeRa merge: `linear` and `task_arithmetic`.

    linear            Σ w_k·θ_k / Σ w_k            (normalize: false: without the division)
    task_arithmetic   θ_base + lambda·Σ w_k·(θ_k - θ_base)         (normalize: true: divided by Σ w_k)

A weight may depend on the tensor (`filter`, the first that is part of its name), on the slice of layers, and on the
layer within it: a list of numbers is a line through them, the first at the slice's first layer and the last at its last
one. Tensors before the layers have the first slice's weights, those behind the layers the last one's, and both of a
list its first number. Whatever else such a file asks for is refused by its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

METHODS = ("linear", "task_arithmetic")
_TOP = ("merge_method", "base_model", "models", "slices", "dtype", "out_dtype", "parameters")
# mergekit reads these for task_arithmetic too, and they change nothing there.
_IDLE = ("int8_mask", "rescale", "density")
_SETTINGS = {"linear": ("weight", "normalize"), "task_arithmetic": ("weight", "normalize", "lambda", *_IDLE)}
Weights = dict[str | None, Fraction]  # filter → weight, in the order in which they are tried; None: what none fits


@dataclass(frozen=True)
class Model:
    """A model as mergekit names it, `model` or `model+lora`."""

    name: str
    lora: str | None = None

    @classmethod
    def of(cls, name: Any) -> Model:
        """Raises ValueError where it is none."""
        if not isinstance(name, str) or not name or name.count("+") > 1:
            raise ValueError(f"{name!r} is no model or model+lora")
        return cls(*name.split("+"))


def is_one(content: Mapping[Any, Any]) -> bool:
    """Whether a file is mergekit's."""
    return "merge_method" in content


def options_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `merge` that do what a mergekit file asks for.

    Raises:
        ValueError: it is no DeRa merge, or broken; the message says what stands against it.
    """
    method = content["merge_method"]
    if method not in METHODS:
        raise ValueError(f"merge_method {method} is no θ_ref + λΔ; of mergekit's, {' and '.join(METHODS)} are")
    if unknown := [key for key in content if key not in _TOP]:
        raise ValueError(f"{unknown[0]} is nothing that this program does as mergekit does; leave it out")
    whole = _parameters(content, method)
    pieces = _pieces(content)
    models = [model for model, _ in pieces[0].sources]
    base = Model.of(content["base_model"]) if content.get("base_model") else None
    if base is None and method == "task_arithmetic":
        raise ValueError("task_arithmetic needs base_model")
    ref = base or models[0]
    aligned = [model for model in models if model != ref]
    if (method == "linear" and ref not in models) or not aligned or len({*models}) < len(models):
        raise ValueError("a DeRa merge is of a reference (base_model, or the first) and others, each listed once")
    if pieces[0].span is not None or any(_goes_with_layers(piece, whole) for piece in pieces):
        pieces = _spread(pieces, ref)

    def at(piece: Piece, t: Fraction = Fraction(0)) -> dict[str | None, str]:
        return _lambdas(piece, method, whole, ref, aligned, t)

    before, behind = at(pieces[0]), at(pieces[-1])
    rules = [f"{_pattern(text)}={lam}" for text, lam in reversed(behind.items()) if text is not None]
    if pieces[0].span is not None:
        of_layers = [(layer, at(piece, t)) for piece in pieces for layer, t in piece.layers()]
        if len({tuple(table.items()) for table in (before, behind, *(table for _, table in of_layers))}) > 1:
            if any(table.keys() != {None} for _, table in of_layers):
                raise ValueError("filters, and weights that go with layers; write it as --lambda-for by hand")
            rules = [f"*embed*={before[None]}"] if before != behind else []
            for lam, rows in itertools.groupby(of_layers, lambda row: row[1][None]):
                layers = [layer for layer, _ in rows]
                span = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
                rules.append(f"layers.{span}={lam}")
    dtype = content.get("out_dtype") or content.get("dtype")
    return {**_named(ref, aligned), "lambda": behind[None], "lambda-for": rules or None, "dtype": dtype}


@dataclass(frozen=True)
class Piece:
    """Layers of the output, and what they are made of.

    Attributes:
        sources: each model, and the settings that its entry has of its own, then those of the slice.
        span: first layer, and the one behind the last; None: all layers.
    """

    sources: Sequence[tuple[Model, Sequence[Mapping[str, Any]]]]
    span: tuple[int, int] | None = None

    def layers(self) -> Iterator[tuple[int, Fraction]]:
        """Its layers, and how far each is from the first to the last; one alone is the last."""
        first, end = self.span
        for layer in range(first, end):
            yield layer, Fraction(layer - first, end - 1 - first) if end - first > 1 else Fraction(1)


def _pieces(content: Mapping[str, Any]) -> list[Piece]:
    """The parts of the output. Raises ValueError where layers are left out, twice there, or in another order."""
    if ("models" in content) == ("slices" in content):
        raise ValueError("it needs models or slices, one of the two")
    method = content["merge_method"]
    if "models" in content:
        entries = _list(content["models"], "models")
        return [Piece([(Model.of(entry.get("model")), [_parameters(entry, method)]) for entry in entries])]
    pieces, layer = [], 0
    for entry in _list(content["slices"], "slices"):
        sources = _list(entry.get("sources"), "sources")
        spans = [source.get("layer_range") for source in sources]
        span = spans[0]
        plain = isinstance(span, list) and len(span) == 2 and all(isinstance(n, int) for n in span)
        if not plain or any(other != span for other in spans) or span[0] != layer or span[1] <= layer:
            raise ValueError("its slices move, repeat or leave out layers; a DeRa merge keeps them all in their places")
        own = _parameters(entry, method)
        pieces.append(Piece([(Model.of(s.get("model")), [_parameters(s, method), own]) for s in sources], tuple(span)))
        layer = span[1]
    if len({frozenset(model for model, _ in piece.sources) for piece in pieces}) > 1:
        raise ValueError("its slices are of different models; a DeRa merge has the same everywhere")
    return pieces


def _spread(pieces: Sequence[Piece], ref: Model) -> Sequence[Piece]:
    """The parts with their layers. Raises ValueError where slices are not all layers of the reference."""
    from ..models.source import Source, load_config

    config = load_config(Source.locate(ref.name))
    layers = config.get("text_config", config).get("num_hidden_layers")
    if pieces[0].span is None:
        if not isinstance(layers, int):
            raise ValueError(f"{ref.name} does not say how many layers it has")
        return [replace(pieces[0], span=(0, layers))]
    if layers != pieces[-1].span[1]:
        raise ValueError(f"its slices end at layer {pieces[-1].span[1]}, {ref.name} has {layers}: a DeRa merge has all")
    return pieces


def _goes_with_layers(piece: Piece, whole: Mapping[str, Any]) -> bool:
    """Whether a setting is a list of numbers, maybe behind a filter."""
    settings = [whole, *(own for _, each in piece.sources for own in each)]
    values = [value for own in settings for value in own.values() if isinstance(value, list)]
    return any(not isinstance(e, dict) or isinstance(e.get("value"), list) for value in values for e in value)


def _parameters(entry: Mapping[str, Any], method: str) -> Mapping[str, Any]:
    """The settings of a part of a file. Raises ValueError where one of them is not known."""
    settings = entry.get("parameters") or {}
    if not isinstance(settings, dict):
        raise ValueError("parameters are NAME: VALUE")
    if unknown := [key for key in settings if key not in _SETTINGS[method]]:
        raise ValueError(f"{method} takes no {unknown[0]} here; known are {', '.join(_SETTINGS[method])}")
    return settings


def _list(value: Any, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{what} is to be a list of entries")
    return value


def _lambdas(
    piece: Piece, method: str, whole: Mapping[str, Any], ref: Model, aligned: Sequence[Model], t: Fraction
) -> dict[str | None, str]:  # fmt: skip
    """λ by filter, as it is typed: a number, or one for each aligned model. Raises ValueError where it is none.

    Args:
        t: how far a layer is from the part's first to its last, from 0 to 1.
    """
    sources = dict(piece.sources)
    entries = {model: [*sources.get(model, ()), whole] for model in [ref, *aligned]}
    weighed = [ref, *aligned] if method == "linear" else aligned
    weights = {model: _weights(model, entries[model], t) for model in weighed}
    filters = list(dict.fromkeys(text for table in weights.values() for text in table))
    for table in weights.values():
        if len(table) > 1 and list(table) != filters:
            raise ValueError("its models have different filters; write it as --lambda-for by hand")
    shared = [*(list(piece.sources[0][1][1:]) if piece.span else []), whole]
    normalize = _first(shared, "normalize", method == "linear")
    if not isinstance(normalize, bool):
        raise ValueError("normalize is true or false")
    times = _number(_first(shared, "lambda", 1), "lambda", t)
    table = {}
    for text in filters:
        shares = {model: weight.get(text, weight[None]) for model, weight in weights.items()}
        total = sum(shares.values())
        if method == "linear" and (total == 0 or not (normalize or total == 1)):
            raise ValueError(f"its weights sum to {float(total):g}; those of a DeRa merge sum to 1")
        if normalize and total:
            shares = {model: share / total for model, share in shares.items()}
        table[text] = "+".join(repr(float(times * shares[model])) for model in aligned)
    return table


def _weights(model: Model, settings: Iterable[Mapping[str, Any]], t: Fraction) -> Weights:
    """A model's weight by filter; of several settings, the first that has one. Raises ValueError where none has."""
    given = next((own["weight"] for own in settings if own.get("weight") is not None), None)
    if given is None:
        raise ValueError(f"{model.name} has no weight")
    conditions = given if isinstance(given, list) else [given]
    if all(not isinstance(entry, dict) for entry in conditions):
        return {None: _number(given, "weight", t)}
    table: Weights = {}
    for entry in conditions:
        if not isinstance(entry, dict) or not {*entry} <= {"filter", "value"}:
            raise ValueError("a weight is a number, or a list of filter and value")
        text = entry.get("filter")
        text = None if text in (None, "*") else str(text)
        if None not in table:  # what stands behind an entry that fits everything is never reached
            table.setdefault(text, _number(entry.get("value"), "weight", t))
    if None not in table:
        raise ValueError(f"{model.name} has no weight for what its filters do not fit; add an entry without filter")
    return table


def _first(settings: Iterable[Mapping[str, Any]], key: str, default: Any) -> Any:
    return next((own[key] for own in settings if own.get(key) is not None), default)


def _number(value: Any, what: str, t: Fraction) -> Fraction:
    """A number, exactly as it is written; of a list, what the line through them is at `t`, the last of them being at 1.

    Raises ValueError where it is none.
    """
    if isinstance(value, list) and value:
        points = [_number(each, what, t) for each in value if not isinstance(each, list)]
        if len(points) == len(value):
            before = int(t * (len(points) - 1))
            share = t * (len(points) - 1) - before
            return (1 - share) * points[before] + share * points[min(before + 1, len(points) - 1)]
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{what} {value!r} is no number, nor a list of numbers") from None


def _pattern(text: str) -> str:
    """What fits where mergekit's filter does: a part of the tensor's name."""
    if not text or any(c in "*?=" or c.isspace() for c in text):
        raise ValueError(f"the filter {text!r} is no part of a tensor's name")
    return f"*{text}*"


def _named(ref: Model, aligned: Sequence[Model]) -> dict[str, Any]:
    """REF, ALIGNED and the base of adapters. Raises ValueError where adapters stand on another model."""
    for model in aligned:
        if model.lora and model.name != ref.name:
            raise ValueError(f"{model.name}+{model.lora} stands on another model than {ref.name}; Δ would be of both")
    names = [model.lora or model.name for model in aligned]
    return {"ref": ref.lora or ref.name, "aligned": names if len(names) > 1 else names[0],
            "base": ref.name if ref.lora else None}  # fmt: skip
