"""What a full model's files say of it: its class, how its tensors are laid out, and what will work on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import DeraError
from ..files.checkpoint import TensorInfo
from ..models.kinds import check_kind, config_of, is_text_decoder, text_config
from ..models.source import PROCESSOR_FILES, Source
from ..models.trust import Trust

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks?|layer)\.(\d+)\.")
_TOWER = re.compile(r"vision|visual|image|video|audio|aligner|projector|connector|resampler|siglip|vit\b|merger")
_EXPERT = re.compile(r"experts?\.\d+\.")  # one by one
_FUSED = re.compile(r"experts?\.(?!\d)[\w.]*(gate_up|gate|up|down|w[123]|mlp|input_linear|output_linear)")


def layout_of(tensors: Mapping[str, TensorInfo], text: Mapping[str, Any]) -> dict[str, Any]:
    """How the tensors of a checkpoint are laid out, by their names.

    Args:
        tensors: name → header.
        text: what the config says of the text decoder.

    Returns:
        `prefix`: what the names of the decoder's layers begin with, `layers.0.` and what follows left out. `experts`:
        `"one by one"`, `"fused"`, or None. `towers`: the first parts of names outside of the decoder that see or hear →
        weights. `mtp`: tensors that predict more than one token, which transformers does not build. `head`: whether the
        output embeddings are stored.
    """
    extra = {name for name in tensors if re.search(r"(^|\.)(mtp|nextn|eh_proj)\b", name)}
    layers = text.get("num_hidden_layers")
    towers: Counter[str] = Counter()
    prefixes: Counter[str] = Counter()
    for name, info in tensors.items():
        place = _LAYER.search(name)
        if match := _TOWER.search(name[: place.start()] if place else name):
            towers[name[: name.find(".", match.end())] if "." in name[match.end() :] else name] += info.numel
        elif place and name not in extra:
            if isinstance(layers, int) and int(place[1]) >= layers:
                extra.add(name)  # DeepSeek's layer behind the last
            else:
                prefixes[name[: place.start(1)].rpartition(".")[0].rpartition(".")[0]] += 1
    experts = [name for name in tensors if name not in extra]
    fused = any(map(_FUSED.search, experts))
    return {
        "prefix": prefixes.most_common(1)[0][0] if prefixes else None,
        "experts": "one by one" if any(map(_EXPERT.search, experts)) else "fused" if fused else None,
        "towers": dict(sorted(towers.items())),
        "mtp": len(extra),
        "head": any(re.search(r"(^|\.)(lm_head|embed_out|output)\.weight$", name) for name in tensors),
    }


def what_works(
    source: Source, config: dict[str, Any], layout: Mapping[str, Any], trust: Trust
) -> dict[str, str | bool]:
    """What can be done with a full model: True, or why not.

    Args:
        source: where it lies.
        config: its config.json.
        layout: of `layout_of`.
        trust: whether code that comes with it may run.

    Returns:
        `merge` streamed, `exact` by a model of transformers, `generate` by the mixture, `images`, and `one_pass`: of an
        adapter on it, and so a dial.
    """
    import transformers

    from ..decoding.hooks import check_generates

    try:
        check_kind(source, config)
    except DeraError as error:
        reason = str(error).removeprefix(f"{source.name} is ")
        return dict.fromkeys(("merge", "exact", "generate", "images", "one_pass"), reason)
    works: dict[str, str | bool] = dict.fromkeys(("merge", "exact", "generate", "images", "one_pass"), True)
    if layout["experts"]:
        works["one_pass"] = "experts regroup the tokens of a batch: an adapter takes two passes"
    name = str(config["architectures"][0])
    if is_text_decoder(name) and not layout["towers"]:
        works["images"] = "it reads text only"
    elif not any((source.folder / file).is_file() for file in PROCESSOR_FILES):
        works["images"] = "no processor lies beside it"
    try:
        config_of(source.folder, trust)
    except DeraError as error:
        works["exact"] = works["generate"] = str(error).splitlines()[0]
        return works
    try:
        if found := getattr(transformers, name, None):
            check_generates(found)
    except DeraError as error:
        works["generate"] = str(error)
    return works


def described(
    source: Source, config: dict[str, Any], tensors: Mapping[str, TensorInfo], trust: Trust
) -> dict[str, Any]:
    """`layout` and `works` of a full model, as above."""
    layout = layout_of(tensors, text_config(source.folder, config, trust))
    return {"layout": layout, "works": what_works(source, config, layout, trust)}
