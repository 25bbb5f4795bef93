"""One live model whose λ turns in place: θ_ref + λΔ in the parameters of an ordinary transformers model."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import DeraError
from ..files.buffers import Buffers
from ..files.checkpoint import slices
from ..files.ordered import in_order
from ..lambdas import Lam
from ..models import spread
from ..models.architecture import loading
from ..models.pair import Pair
from .path import Course, opened
from .storage import Storage
from .theta import stored_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .rounding import Rounding


@dataclass(frozen=True)
class _Dial:
    """What `set_lam` needs to compute the weights anew, exactly as `merge` would store them."""

    pair: Pair
    storage: Storage
    course: Course | None

    def build(self, lam: Lam, dtype: torch.dtype | str) -> PreTrainedModel:
        """A new model at λ, by transformers' own loading, which knows about tied, renamed and fused tensors."""
        config = config_of(self.pair)
        # What is as wide as the model will have it becomes its parameters, so that θ(λ) is held once.
        wide = torch.float32 if dtype in (torch.float32, "float32") else None
        state = {name: weight.to(wide) if wide and weight.is_floating_point() and weight.itemsize < 4 else weight
                 for name, weight in self.weights(lam)}  # fmt: skip
        model_class = self.pair.architecture.model_class
        with loading():
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, **spread.how()
            )
        if missing := sorted(report["missing_keys"]):
            raise DeraError(f"{self.pair.ref.base.name} lacks tensor {missing[0]}; transformers would make it up")
        return model

    def weights(self, lam: Lam) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor of θ(λ) in turn."""
        if self.course:
            self.course.check_lambda(lam)
        names = self.pair.names
        tasks = [(name, *rows) for name, info in names.tensors.items() for rows in slices(info)]

        def work(task: tuple[str, int, int], scratch: Buffers, kept: Buffers) -> torch.Tensor:
            [(rows, _)] = stored_rows(names, *task, [lam], self.storage, scratch, kept, self.course, summed=False)
            return rows

        for (name, start, stop), rows in zip(tasks, in_order(tasks, work), strict=True):
            info = names.tensors[name]
            if start == 0:
                out = torch.empty(info.shape, dtype=rows.dtype)
            out.view(info.rows, *info.row_shape)[start:stop] = rows
            if stop == info.rows:
                yield name, out


def config_of(pair: Pair) -> PreTrainedConfig:
    """transformers' config of a model that holds θ(λ)."""
    config = pair.ref.built_config(pair.trust.code)
    if pair.names.vocabulary is not None:
        config.get_text_config(decoder=True).vocab_size = pair.names.vocabulary
    if pair.names.unties:
        config.tie_word_embeddings = False
    return config


def live(
    pair: Pair,
    lam: float | Sequence[float],
    *,
    dtype: torch.dtype | str | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str | None = None,
    path: str | os.PathLike[str] | Course | None = None,
    onto: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """θ(λ) as a transformers model of the pair's architecture, in evaluation mode, with a method `set_lam`.

    Args:
        pair: the two models.
        lam: λ to begin with; with several aligned models, a number for each.
        dtype: what the weights are rounded to: None leaves float32; `"auto"`, or a dtype, rounds as `merge` does, and
            the values are then those of `merge`'s checkpoint bit for bit.
        rounding, seed: as for `merge`.
        device: where the model goes.
        compute_dtype: dtype of the parameters; default `dtype`, or float32 where that is None.
        path: a path that `calibrate` learned, or its file, in the place of the straight line; or `parts.ByPart`.
        onto: a model that an earlier call made of this pair: it becomes this one, in place, where it is and in the
            dtype that it has. Should that break off half-way, it is at no λ.

    Returns:
        The model. `model.set_lam(λ)` computes θ(λ) anew from the two checkpoints and writes it into the parameters.

    Raises:
        DeraError: the pair has no weight-space form, or cannot be loaded; the path is another pair's, or not for this
            λ.
    """
    (lam,) = pair.known([lam])
    course = opened(path, pair, [lam])
    pair.check_tokens(course.used(lam) if course else [lam])
    storage = Storage.of(pair.names, torch.float32 if dtype is None else dtype, rounding, seed)
    dial = _Dial(pair, storage, course)
    if onto is not None:
        onto._dera_dial = dial
        onto.set_lam(lam)
        return onto
    model = dial.build(lam, compute_dtype or (torch.float32 if dtype is None else dtype))
    model = (spread.checked(model) if spread.how() else model.to(device)).eval()
    if config := pair.generation_config():
        model.generation_config = config
    model._dera_dial = dial
    model.set_lam = types.MethodType(_set_lam, model)
    return model


def _set_lam(model: PreTrainedModel, lam: float | Sequence[float]) -> None:
    """Turn λ in place: the parameters become those of a fresh merge. Not while another thread generates."""
    dial: _Dial = model._dera_dial
    (lam,) = dial.pair.known([lam])
    dial.pair.check_tokens(dial.course.used(lam) if dial.course else [lam])
    parameters = model.state_dict()  # shares memory with the model
    groups = dial.pair.layout.group_of  # the tensors that the model has
    if all(group.is_renamed for group in groups.values()):
        for name, weight in dial.weights(lam):
            if name in groups:
                parameters[groups[name].targets[0]].copy_(weight)
    else:  # transformers stores some of these tensors fused; it knows how
        model.load_state_dict(dial.build(lam, model.dtype).state_dict())
