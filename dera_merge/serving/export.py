"""A pair as one directory that exact decoding is served from: both models, and a config that says what they are.

    DIR/config.json        model type "dera": the default λ, and where the two models lie
    DIR/ref/, DIR/aligned/ the two, as they are (an adapter stays an adapter); DIR/base/ where both are adapters
    DIR/tokenizer…         as the merged checkpoint has them

vLLM serves it with the plugin that comes with this package, and `DeraForCausalLM.from_pretrained` loads it. Weight
files are hard links where the file system allows, so the directory takes no room of its own.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..decoding.config import DeraConfig
from ..decoding.settings import changes
from ..errors import DeraError
from ..files.atomic import json_bytes, load_json
from ..files.room import check_space
from ..merging.companions import cleaned, companions, generation_file, tokenizer_files
from ..merging.merge import merge
from ..merging.output import check_clear_of_inputs
from ..models.ends import generation_settings
from ..models.kinds import config_of
from ..models.pair import Pair
from ..models.pieces import LowRank
from ..models.side import Side
from ..models.source import GENERATION, PROCESSOR_FILES
from ..progress import Progress

Places = dict[str, tuple[Path, list[Path]]]  # name in the directory → the folder where a model lies, its weight files


def held_once(pair: Pair) -> bool:
    """Whether both models can stand on one set of weights: adapters of B·A on a decoder's linear layers, over one base.

    Not with experts, whose weights vLLM turns in place once they are loaded: it would turn shared ones twice.
    """
    if not pair.shared_base:
        return False
    if pair.requantises or pair.stacked or pair.names.unties:
        return False
    decoder = pair.architecture.decoder  # towers are not made there
    shapes = {name: shape for name, shape in pair.architecture.shapes.items() if name.startswith(decoder)}
    if any(".experts." in name or len(shape) == 3 for name, shape in shapes.items()):
        return False
    linear = {
        pair.layout.name(f"{module}.weight") for module in pair.architecture.linear if module.startswith(decoder)
    }
    return all(
        name in linear and all(isinstance(piece, LowRank) for piece in pieces)
        for weights in pair.names.weights
        for name, pieces in weights.pieces.items()
    )


def export_exact(
    pair: Pair,
    out: str | os.PathLike[str],
    lam: float = 1.0,
    *,
    merge_adapter: bool = False,
    copy: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write both models of a pair into one directory for exact decoding.

    Args:
        pair: the two models.
        out: the directory.
        lam: λ of requests that bring none.
        merge_adapter: store the models of adapters whole (λ=0 and 1, rounded to nearest). Done in any case where an
            adapter is more than B·A on linear layers.
        copy: copy weight files instead of linking them.
        overwrite: replace a directory that this function wrote.
        progress: called with (file, files done, files in all).

    Returns:
        `path`, `lambda`, `held_once` (both on one set of weights), `linked` and `copied` (bytes of weights).

    Raises:
        DeraError: the pair does not fit together, vLLM cannot run it, or the output cannot be written. Nothing is left
            of it then.
    """
    pair.only_pair("export-exact is")
    _check_served(pair)
    lam = float(lam) + 0.0
    if not math.isfinite(lam):
        raise DeraError(f"λ must be finite, not {lam}")
    if pair.brings_tokens:
        raise DeraError("ALIGNED's tokenizer has tokens that REF has no embedding for, and an engine mixes raw logits; "
                        "use ALIGNED alone (λ=1), or merge with --new-tokens aligned")  # fmt: skip
    folder = Path(out).expanduser()
    _check(folder, pair, overwrite)
    ending = pair.ending(say=True)
    if config := pair.generation_config():  # an engine applies what it says to every request that says nothing
        warpers = changes(config)
        ending = replace(ending, generation={k: v for k, v in ending.generation.items() if k not in warpers})
    beside = companions(pair) | generation_file(ending)
    once = held_once(pair) and not merge_adapter
    whole = [side for side in pair.sides if pair.is_requantised(side) or (side.adapter and not once)]
    places = _places(pair, whole)
    try:
        parent = folder.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".partial", dir=parent) as scratch:
            stage = Path(scratch) / "export"
            sizes = _write(pair, stage, lam, places, whole, beside, copy, progress)
            _replace(stage, folder)
    except OSError as error:
        raise DeraError(f"{folder} cannot be written: {error.strerror or error}") from error
    return {"path": str(folder), "lambda": lam, "held_once": once, **sizes}


def _check_served(pair: Pair) -> None:
    """Raise DeraError where the plugin cannot run models of this kind, or the vLLM that is installed here has none."""
    name, model = pair.architecture.model_class.__name__, pair.architecture.model
    layers = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    if model._is_stateful or not all(str(layer).endswith("attention") for layer in layers):
        raise DeraError(f"{name} keeps more than keys and values of what it read, which exact DeRa in vLLM does not "
                        "run; merge the pair, or decode it with pair.exact()")  # fmt: skip
    if not _served_by_vllm(name):
        raise DeraError(f"the vLLM that is installed here has no {name}; merge the pair, or decode it with "
                        "pair.exact()")  # fmt: skip


@cache
def _served_by_vllm(name: str) -> bool:
    """Whether the vLLM that is installed here has a class; True where there is none that could be asked."""
    if find_spec("vllm") is None:
        return True
    # In a process of its own: importing vLLM changes settings of torch.
    asked = [sys.executable, "-c", "import vllm; print(*vllm.ModelRegistry.get_supported_archs())"]
    answer = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return answer.returncode != 0 or name in answer.stdout.split()


def _write(
    pair: Pair, stage: Path, lam: float, places: Places, whole: list[Side], beside: dict[str, bytes], copy: bool,
    progress: Progress | None,
) -> dict[str, int]:  # fmt: skip
    """Fill a new directory, `beside` in it beside the models; bytes of weights by how they came there."""
    stage.mkdir()
    files = [(file, stage / name / file.name) for name, (_, weights) in places.items() for file in weights]
    check_space(stage, sum(file.stat().st_size for file, _ in files) if copy else 0)
    sizes = {"linked": 0, "copied": 0}
    for done, (file, target) in enumerate(files, 1):
        target.parent.mkdir(exist_ok=True)
        sizes["linked" if _put(file, target, copy) else "copied"] += file.stat().st_size
        if progress:
            progress(file.name, done, len(files))
    for name, (source, _) in places.items():
        quantised = (pair.aligned if name == "aligned" else pair.ref).quantisation is not None
        base = "../base" if "base" in places else "../ref"
        _describe(source, stage / name, base, pair.trust.code, quantised)
    for side in whole:
        name, end = ("ref", 0.0) if side is pair.ref else ("aligned", 1.0)
        merge(pair, stage / name, [end], rounding="nearest")
        sizes["copied"] += sum(file.stat().st_size for file in (stage / name).glob("*.safetensors"))
    for name, content in beside.items():
        (stage / name).write_bytes(content)
    (stage / "config.json").write_bytes(json_bytes(_config(pair, stage, lam)))
    return sizes


def _check(folder: Path, pair: Pair, overwrite: bool) -> None:
    """Raise DeraError where the output directory is not to be touched."""
    if folder.exists() and not folder.is_dir():
        raise DeraError(f"{folder} is a file; give a directory as --output")
    check_clear_of_inputs(folder, pair)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    config = load_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict) or config.get("model_type") != "dera" or "exported" not in config:
        raise DeraError(f"{folder} exists and was not written by export-exact; give another --output")
    if not overwrite:
        raise DeraError(f"{folder} exists; --overwrite replaces it, or give another --output")


def _places(pair: Pair, whole: list[Side]) -> Places:
    """The models that are taken as they are, and the base of adapters where no model stands for it."""
    places: Places = {}
    for name, side in zip(("ref", "aligned"), pair.sides, strict=True):
        if side in whole:
            continue
        checkpoint = side.adapter.checkpoint if side.adapter else side.checkpoint
        places[name] = (side.source.folder, sorted({info.file for info in checkpoint.tensors.values()}))
        if side.adapter and pair.ref.adapter:
            places["base"] = (side.base.folder, sorted({info.file for info in side.checkpoint.tensors.values()}))
    for folder, files in places.values():
        if pickled := [file for file in files if file.suffix != ".safetensors"]:
            raise DeraError(
                f"{folder} has pickled weights ({pickled[0].name}), which no engine should read; merge it first"
            )
    return places


def _put(file: Path, target: Path, copy: bool) -> bool:
    """Whether a link could be made; else the file was copied."""
    if not copy:
        try:
            os.link(file.resolve(), target)  # of a file in the Hub's cache, which is a link itself, the file
            return True
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                raise
    shutil.copyfile(file, target)
    return False


def _describe(folder: Path, target: Path, base: str, code: bool, quantised: bool) -> None:
    """Copy the small files beside a model's weights; an adapter's config gets `base` as its base."""
    patterns = [*PROCESSOR_FILES, "*.index.json", *["*.py"] * code]
    files = {file.name: file for pattern in patterns for file in folder.glob(pattern)}
    for file in files.values():
        shutil.copyfile(file, target / file.name)
    for name, content in tokenizer_files(folder, files).items():
        (target / name).write_bytes(content)
    if (settings := generation_settings(folder)) is not None:
        (target / GENERATION).write_bytes(json_bytes(settings))
    if (folder / "config.json").is_file():
        config = cleaned(load_json(folder / "config.json"), files, quantised)
        (target / "config.json").write_bytes(json_bytes(config))
    if (folder / "adapter_config.json").is_file():
        config = load_json(folder / "adapter_config.json") | {"base_model_name_or_path": base}
        (target / "adapter_config.json").write_bytes(json_bytes(config))


def _config(pair: Pair, stage: Path, lam: float) -> dict[str, Any]:
    """The directory's config.json."""
    home = next(stage / name for name in ("base", "ref") if (stage / name).is_dir())
    whole = config_of(home, pair.trust)
    text = whole.get_text_config(decoder=True)
    text.name_or_path = ""  # else the temporary directory of this export
    text.vocab_size = pair.vocab_size
    names = {name: name for name in ("ref", "aligned", "base") if (stage / name).is_dir()}
    config = DeraConfig(text, lam=lam, pair=names, architectures=["DeraForCausalLM"], dtype=whole.dtype)
    made = {"exported": {name: side.source.pinned for name, side in zip(("ref", "aligned"), pair.sides, strict=True)}}
    return config.to_dict() | made


def _replace(stage: Path, folder: Path) -> None:
    """Put the finished directory in its place."""
    if folder.is_dir():
        old = stage.with_name("old")
        os.replace(folder, old)
        try:
            os.replace(stage, folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.replace(old, folder)
            raise
    else:
        os.replace(stage, folder)
