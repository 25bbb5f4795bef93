"""The model that a config describes, without weights: names, shapes, ties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import torch

from ..errors import DeraError
from ..files.checkpoint import TensorInfo
from . import doors
from .kinds import config_of, model_class
from .layout import Layout
from .trust import NOTHING, Trust

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# transformers changes settings of the whole process while it makes a model: of two threads that load at a time one gets
# tensors without memory, or a head that is not tied.
LOADING = RLock()
LONG = 1 << 30  # bytes of weights whose loading deserves a bar


@contextmanager
def loading(size: int = 0) -> Iterator[None]:
    """Hold `LOADING` while transformers makes a model; its bar is shown where `size`, in bytes, takes long to read.

    A pair is several models, most of them made in a moment, or of weights in memory: a bar for each says nothing.
    """
    from transformers.utils import logging

    with LOADING:
        shown = logging.is_progress_bar_enabled()
        if shown and size < LONG:
            logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()


@dataclass(frozen=True)
class Architecture:
    """The model that a config describes, without weights.

    Attributes:
        shapes: parameter and buffer names in memory → shape.
        tied: name → the name that it shares its tensor with (`lm_head.weight` → `model.embed_tokens.weight`).
        transposed: modules that store their weight as (in, out).
        linear: linear modules, the head left out.
        decoder: what names in memory of the text decoder begin with; a wrapped model has it deeper inside.
        model_class: transformers' class.
        model: the empty model.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    transposed: frozenset[str]
    linear: tuple[str, ...]
    decoder: str
    model_class: type
    model: PreTrainedModel

    @classmethod
    def of(cls, folder: Path, trust: Trust = NOTHING) -> Architecture:
        """Build from `folder/config.json`. Raises DeraError where transformers does not know the architecture."""
        from transformers.pytorch_utils import Conv1D

        model = empty_model(folder, trust)
        if not trust.code:  # a checkpoint's own code may never have set what is asked for
            doors.check("models", model)
        head = model.get_output_embeddings()
        inner = model.get_decoder() if hasattr(model, "get_decoder") else None
        decoder = next((name for name, module in model.named_modules() if name and module is inner), None)
        return cls(
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
            dict(getattr(model, "all_tied_weights_keys", None) or {}),
            frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
            tuple(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head),
            f"{decoder or model.base_model_prefix}.",
            type(model),
            model,
        )

    def layout(self, tensors: Mapping[str, TensorInfo]) -> Layout:
        """How a checkpoint's tensors become this model's."""
        return Layout(self.model, self.shapes, tensors)


def empty_model(folder: Path, trust: Trust = NOTHING) -> PreTrainedModel:
    """The model that `folder/config.json` describes, on the meta device. Raises DeraError where transformers cannot."""
    config = config_of(folder, trust)
    try:
        with LOADING, torch.device("meta"):
            found = model_class(config)
            auto = hasattr(found, "from_config")
            return found.from_config(config, trust_remote_code=trust.code) if auto else found(config)
    except (ValueError, OSError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise DeraError(f"transformers cannot build the model that {folder}/config.json describes: {error}") from error
