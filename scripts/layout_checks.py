"""Cells for files that lie otherwise than `save_pretrained` writes them: as they are on the Hub, or were.

MTP: tensors of layers that predict more than the next token, which transformers never builds, in REF alone. Mixed:
ALIGNED by the names of memory, experts fused, where REF has the names of files, mostly experts one by one. Old names:
an adapter of transformers 4, whose modules had the names of files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from oracles import NotApplicable, Wrong, between, close, load
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dera_merge import ModelPair

if TYPE_CHECKING:
    from family_checks import Family

LAM = 0.3
EXTRA = "mtp.fc.weight"


def layouts(family: Family) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each cell and its check."""
    for what, work in (("MTP", mtp), ("mixed", mixed), ("old names", old_names)):
        yield f"layouts {what}", lambda work=work: work(family)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def written_as(values: dict[str, torch.Tensor], source: Path, folder: Path) -> Path:
    """A copy of a directory with other tensors, in one file."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def same_merge(family: Family, ref: Path, aligned: Path, out: Path) -> None:
    """The merge of these files is that of the state dicts."""
    (made,) = ModelPair.from_pretrained(ref, aligned).merge(out, [LAM], dtype="float32")
    model, expected = load(made), between(family.ref, family.aligned, LAM)
    theirs = expected.state_dict()
    for name, tensor in model.state_dict().items():
        close(tensor, theirs[name], name)
    close(family.logits(model), family.logits(expected), "logits")


def mtp(family: Family) -> None:
    extra = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    ref = written_as(tensors(family.base) | {EXTRA: extra}, family.base, family.folder / "ref with mtp")
    close(family.logits(load(ref)), family.logits(family.ref), "what transformers loads beside MTP")
    same_merge(family, ref, family.folder / "aligned", family.folder / "mtp")
    if not torch.equal(tensors(family.folder / "mtp").get(EXTRA, extra + 1), extra):
        raise Wrong(f"{EXTRA} of REF is not kept")


def mixed(family: Family) -> None:
    stored, memory = tensors(family.folder / "aligned"), dict(family.aligned.state_dict())
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, value in list(memory.items()):  # of tied ones the first; buffers that are not stored go with these
        if value.data_ptr() and seen.setdefault((value.data_ptr(), value.shape), name) != name:
            del memory[name]
    if set(memory) <= set(stored):
        raise NotApplicable("names in memory are those of the files")
    try:
        aligned = written_as(memory, family.folder / "aligned", family.folder / "aligned as in memory")
        close(family.logits(load(aligned)), family.logits(family.aligned), "its file")
    except Exception as error:
        raise NotApplicable(f"transformers does not load what memory calls so: {error}") from None
    same_merge(family, family.base, aligned, family.folder / "mixed")


def old_names(family: Family) -> None:
    folder, adapted = family.train("attention")
    places = module_names(family)
    weights = load_file(folder / "adapter_model.safetensors")
    renamed, prefix = {}, "base_model.model."
    for key, value in weights.items():
        module, mark, rest = key.removeprefix(prefix).partition(".lora_")
        renamed[f"{prefix}{places.get(module, module)}{mark}{rest}"] = value
    if renamed.keys() == weights.keys():
        raise NotApplicable("modules have the names of files")
    old = family.folder / "old adapter"
    old.mkdir()
    save_file(renamed, old / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    (old / "adapter_config.json").write_text(json.dumps(config))
    try:
        loaded = PeftModel.from_pretrained(load(family.base), old).get_base_model().eval()
        theirs = dict(adapted.named_parameters())
        for name, value in loaded.named_parameters():
            if "lora_" in name:  # of towers too, which a text does not reach
                close(value, theirs[name], name)
    except Exception as error:
        raise NotApplicable(f"PEFT does not load it under its old names: {error}") from None
    (out,) = ModelPair.from_pretrained(family.base, old).merge(family.folder / "old-out", [1.0], dtype="float32")
    close(family.logits(load(out)), family.logits(adapted), "logits at λ=1")


def module_names(family: Family) -> dict[str, str]:
    """Modules in memory → what the file calls them, told by their weights."""
    stored = {mark(value): name for name, value in tensors(family.base).items()}
    found = {}
    for name, value in family.ref.state_dict().items():
        key = mark(value)
        if name.endswith(".weight") and key in stored:
            found[name.removesuffix(".weight")] = stored[key].removesuffix(".weight")
    return found


def mark(weight: torch.Tensor) -> tuple[torch.Size, bytes]:
    """What tells random weights apart."""
    return weight.shape, weight.flatten()[:8].numpy().tobytes()
