"""`dera_merge.json`: what a merged directory was made of, and whether it is still that."""

from __future__ import annotations

import hashlib
import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import lambdas
from ..errors import DeraError
from ..files.atomic import json_bytes, load_json, sha256_of
from ..models.fingerprint import fingerprint
from ..models.pair import Pair
from ..models.side import Side
from .path import Course

RECIPE = "dera_merge.json"
FIGURES = "fidelity.json"  # of a published merge: what compare measured
PARTIAL = "dera_merge.partial.json"
CONFIGS = ("config.json", "adapter_config.json")


def read_recipe(folder: Path) -> dict[str, Any]:
    """dera_merge.json of a merged directory. Raises DeraError where there is none or it is not one of ours."""
    if not (folder / RECIPE).is_file():
        raise DeraError(f"{folder} holds no {RECIPE}; it was not written by dera-merge")
    recipe = load_json(folder / RECIPE)
    shape = {"ref": dict, "aligned": dict, "files": dict, "lambda": (int, float, list)}
    fits = isinstance(recipe, dict) and all(isinstance(recipe.get(key), kind) for key, kind in shape.items())
    lams = recipe["lambda"] if fits and isinstance(recipe["lambda"], list) else [recipe["lambda"]] if fits else []
    if not lams or not all(isinstance(number, int | float) and math.isfinite(number) for number in lams):
        raise DeraError(f"{folder / RECIPE} is not one that dera-merge wrote")
    return recipe | {"lambda": lambdas.loaded(recipe["lambda"])}


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe of a merged directory, after checking that it is complete and its files are those that were written.

    Raises:
        DeraError: partial, not written by dera-merge, or changed since.
    """
    place = Path(folder)
    if (place / PARTIAL).is_file() and not any((place / name).is_file() for name in CONFIGS):
        raise DeraError(f"{place} is a partial merge; finish it with --resume")
    recipe = read_recipe(place)
    for name, digest in recipe["files"].items():
        if Path(name).name != name:
            raise DeraError(f"{place / RECIPE} names {name!r}, which lies outside of its directory")
        if not (place / name).is_file() or sha256_of(place / name) != digest:
            raise DeraError(f"{place / name} is missing or has changed since it was merged; merge again")
    return recipe


def weights_digest(recipe: dict[str, Any]) -> str:
    """SHA-256 over the weight files that a recipe lists: the same for two directories with the same weights."""
    files = sorted((name, digest) for name, digest in recipe["files"].items() if name.endswith(".safetensors"))
    return hashlib.sha256(json_bytes(files)).hexdigest()


SCHEMA = 2  # of dera_merge.json


def describe_pair(pair: Pair, course: Course | None = None) -> dict[str, Any]:
    """What `dera_merge.json` says of the inputs and of the program."""

    def describe(side: Side) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": side.source.name, "revision": side.source.revision}
        if (side.source.folder / RECIPE).is_file():  # a merge of a merge
            made = read_recipe(side.source.folder)
            entry["merge"] = {"lambda": made["lambda"], **{key: made[key].get("name") for key in ("ref", "aligned")}}
            entry["merge"] |= {"path": made["path"]} if made.get("path", "line") != "line" else {}
        if side.adapter:
            entry |= {"adapter": side.adapter.kind, "base": side.base.name, "base_revision": side.base.revision}
        return entry

    others = pair.sides[2:]
    return {
        "schema_version": SCHEMA,
        "ref": describe(pair.ref),
        "aligned": describe(pair.aligned),
        **({"others": [describe(side) for side in others]} if others else {}),
        "fingerprint": fingerprint(pair),
        **({"stack": True} if pair.stacked else {}),
        **({"new_tokens": pair.new_tokens} if pair.brings_tokens else {}),
        "base_quantization": pair.base_quantization if pair.requantises else None,
        "path": course.describe() if course else "line",
        "versions": {name: _version(name) for name in ("dera-merge", "torch", "numpy", "numba")},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
