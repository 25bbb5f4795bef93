"""What lies in a directory where a model was expected: models further in, a training state, another program's format.

Told by names alone. What to do about it is part of the answer, since whoever reads it has typed that directory.
"""

from __future__ import annotations

import difflib
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

CONFIGS = ("config.json", "adapter_config.json")
DEEPEST = 4  # a Hub cache has models at hub/models--owner--name/snapshots/<commit>
_MOST = 1000  # folders that are looked at
_SHOWN = 5
# A name, or the end of a path, → what it is and what makes a model of it. The first that is there says it.
_INSTEAD = (
    ("global_step*", "a DeepSpeed checkpoint", "python zero_to_fp32.py DIR OUT, which DeepSpeed put there, gathers it"),
    ("*mp_rank_*_model_states.pt", "a DeepSpeed checkpoint", "zero_to_fp32.py, one directory up, gathers it"),
    ("*.distcp", "an FSDP checkpoint", "accelerate merge-weights DIR OUT gathers it"),
    ("pytorch_model_fsdp_*", "an FSDP checkpoint", "accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT gathers it"),
    ("consolidated.*", "weights under Meta's or Mistral's own names", "convert them by transformers' script"),
    ("*.gguf", "a GGUF file, which is for llama.cpp", "give the model that it was made of"),
    ("*.ckpt", "a Lightning checkpoint", "save its model with save_pretrained"),
    ("*.nemo", "a NeMo model", "export it to Hugging Face's format"),
    ("flax_model.msgpack", "weights of Flax", "load them with an older transformers and from_flax=True, and save them"),
    ("tf_model.h5", "weights of TensorFlow", "load them with an older transformers and from_tf=True, and save them"),
    ("adapters.safetensors", "an adapter of MLX", "mlx_lm.fuse makes a model of it"),
    ("lit_model.pth", "a model of LitGPT", "litgpt convert_from_litgpt makes a state dict for transformers of it"),
    ("*.incomplete", "a download that broke off", "fetch it again"),
    ("optimizer.pt", "a training state", "give the directory that save_model or save_pretrained wrote"),
    ("trainer_state.json", "a training state", "give the directory that save_model or save_pretrained wrote"),
    ("training_args.bin", "a training state", "give the directory that save_model or save_pretrained wrote"),
    ("model.safetensors", "a full model", "remove adapter_config.json if the adapter was merged into it"),
    ("*.safetensors", "safetensors of another name", "transformers reads model.safetensors, or an index"),
)  # fmt: skip


def inner_models(folder: Path) -> list[str]:
    """Folders inside of `folder` that hold a model's or an adapter's config, as relative paths, in natural order."""
    found: list[str] = []
    for looked, (place, folders, files) in enumerate(os.walk(folder), 1):
        inner = Path(place).relative_to(folder)
        if inner.parts and any(name in files for name in CONFIGS):
            found.append(inner.as_posix())
            folders.clear()
        if len(inner.parts) == DEEPEST or looked == _MOST:
            folders.clear()
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=_natural)
    return sorted(found, key=_natural)


def instead(folder: Path) -> str:
    """What `folder` holds in the place of a model, and what to do, as the end of a sentence; "" if nothing is known."""
    if inner := inner_models(folder):
        more = f" and {len(inner) - _SHOWN} more" if len(inner) > _SHOWN else ""
        return f"; it holds {', '.join(inner[:_SHOWN])}{more}: give one of these, say {folder / inner[-1]}"
    names = sorted(path.name for path in folder.iterdir())
    for pattern, what, remedy in _INSTEAD:
        if found := [name for name in names if fnmatchcase(name, pattern)]:
            return f"; it holds {what} ({found[0]}): {remedy.replace('DIR', str(folder))}"
    return ""


def near(missing: Path) -> str:
    """Directories beside one that is not there, as the end of a sentence: those of a like name, or the first few."""
    parent = missing.parent
    try:
        names = sorted((path.name for path in parent.iterdir() if path.is_dir() and path.name[:1] != "."), key=_natural)
    except OSError:
        return ""
    if alike := difflib.get_close_matches(missing.name, names, 3):
        return f" (near are {', '.join(str(parent / name) for name in alike)})"
    if not names or len(missing.parts) == 1:  # a bare name may well be meant for the Hub
        return ""
    return f" ({parent} holds {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts checkpoint-500 before checkpoint-1000."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
