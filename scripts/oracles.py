"""What cells are checked against: results made without code of dera-merge; and how far two of them may be apart."""

from __future__ import annotations

import contextlib
import copy
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import END
from transformers import PreTrainedModel

from dera_merge import DeraError

NEW = 6  # tokens generated
TOLERANCE = 3e-4  # relative to the largest value: float32 through a few layers
NARROW = 2e-3  # two tokens nearer than this, relative, are taken for equal


class Wrong(Exception):
    """Two results that ought to be one; says how far apart they are."""


class NotApplicable(Exception):
    """There is nothing to check here."""


def close(mine: torch.Tensor, theirs: torch.Tensor, what: str = "") -> None:
    if mine.shape != theirs.shape:
        raise Wrong(f"{what} has shape {tuple(mine.shape)}, not {tuple(theirs.shape)}".strip())
    difference = (mine.double() - theirs.double()).abs()
    distance = (difference.max() / theirs.double().abs().max().clamp(min=1e-6)).item() if difference.numel() else 0.0
    if not distance <= TOLERANCE:
        raise Wrong(f"{what} off by {distance:.1e}".strip())


def load(folder: Path) -> PreTrainedModel:
    """The plain model of a directory; raises where transformers made a tensor up."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise Wrong(f"the file lacks {missing[0]}")
    return model.eval()


def between(ref: PreTrainedModel, aligned: PreTrainedModel, lam: float) -> PreTrainedModel:
    """The state dicts mixed in float64, in the plain class."""
    mixed, ours, theirs = copy.deepcopy(ref), ref.state_dict(), aligned.state_dict()
    for name, tensor in mixed.state_dict().items():  # of tied tensors one is written twice
        if tensor.is_floating_point():
            tensor.copy_((1 - lam) * ours[name].double() + lam * theirs[name].double())
    return mixed


@contextlib.contextmanager
def turned(adapted: PreTrainedModel, lam: float) -> Iterator[PreTrainedModel]:
    """A model with PEFT's layers in it, unmerged, at λ times their scale: θ_ref + λΔ of a plain LoRA."""
    layers = [module for module in adapted.modules() if isinstance(getattr(module, "scaling", None), dict)]
    for layer in layers:
        layer.scaling["default"] *= lam
    try:
        yield adapted
    finally:
        for layer in layers:
            layer.scaling["default"] /= lam


def dora_between(adapted: PreTrainedModel, lam: float) -> PreTrainedModel:
    """θ_ref + λΔ of a DoRA in the plain layers: Δ is m·(W + s·BA)/‖W + s·BA‖ - W, by rows (Liu et al., 2024)."""
    model = copy.deepcopy(adapted)
    for path, layer in list(model.named_modules()):
        if not len(getattr(layer, "lora_magnitude_vector", ())):
            continue
        plain = layer.get_base_layer()
        turn = isinstance(plain, transformers.pytorch_utils.Conv1D)
        weight = plain.weight.double().T if turn else plain.weight.double()
        product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        moved = weight + layer.scaling["default"] * product
        magnitude = layer.lora_magnitude_vector["default"].weight.double()
        moved *= (magnitude / moved.norm(dim=1))[:, None]
        mixed = torch.lerp(weight, moved, lam).float()
        plain.weight = torch.nn.Parameter(mixed.T.contiguous() if turn else mixed)  # parted from what it is tied to
        model.set_submodule(path, plain)
    return model


def greedy(
    models: Sequence[PreTrainedModel], shares: Sequence[float], batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, NEW) of a plain loop over mixed logits, and by how much each was ahead of the second, relative.

    Each step is a `generate` of one token by each model, from the whole text: its own hooks, and no cache to go wrong.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ahead = []
    for _ in range(NEW):
        logits = 0.0
        for model, share in zip(models, shares, strict=True):
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False,
                                 output_logits=True, return_dict_in_generate=True)  # fmt: skip
            logits = logits + share * out.logits[0].double()
        size = logits.abs().amax(-1)
        logits[:, END] = -torch.inf
        best = logits.topk(2).values
        ahead.append((best[:, 0] - best[:, 1]) / size)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids[:, -NEW:], torch.stack(ahead, 1)


def same_tokens(mine: torch.Tensor, theirs: torch.Tensor, ahead: torch.Tensor) -> None:
    """Up to where two tokens were as good as level."""
    for row, (ours, wanted, margin) in enumerate(zip(mine.tolist(), theirs.tolist(), ahead.tolist(), strict=True)):
        for step, (a, b, by) in enumerate(zip(ours, wanted, margin, strict=True)):
            if a != b:
                if by > NARROW:
                    raise Wrong(f"token {step + 1} of row {row + 1} is {a}, not {b}")
                break


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def outcome(work: Callable[[], Any]) -> dict[str, str]:
    """What came of a check: `state` and `why`."""
    try:
        work()
    except DeraError as error:
        one_line = "\n" not in str(error)
        return {"state": "refused" if one_line else "crash", "why": first_line(error)}
    except NotApplicable as error:
        return {"state": "n/a", "why": str(error)}
    except Wrong as error:
        return {"state": "wrong", "why": first_line(error)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        trace = "".join(traceback.format_exception(error)[-6:])
        return {"state": "crash", "why": f"{type(error).__name__}: {first_line(error)} ({where})", "trace": trace}
    return {"state": "ok", "why": ""}
