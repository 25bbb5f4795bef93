"""One live model whose λ turns in place: θ_ref + λΔ in the parameters of an ordinary transformers model."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .checkpoint import Buffers, slices
from .curve import Curve, opened
from .errors import DeraError
from .lambdas import Lam
from .merge import output_layout
from .pair import ModelPair
from .path import Sums, stored_rows
from .pipeline import in_order

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .rounding import Rounding


@dataclass(frozen=True)
class _Dial:
    """What `set_lam` needs to compute the weights anew, exactly as `merge` would store them."""

    pair: ModelPair
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    rounding: Rounding
    seed: int
    curve: Curve | None

    def build(self, lam: Lam, dtype: torch.dtype | str) -> PreTrainedModel:
        """A new model at λ, by transformers' own loading, which knows about tied, renamed and fused tensors."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.pair.ref.base.folder, trust_remote_code=self.pair.trust_remote_code)
        if self.pair.unties:
            config.tie_word_embeddings = False
        state = dict(self.weights(lam))
        model, report = self.pair.architecture.model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise DeraError(f"{self.pair.ref.base.name} lacks tensor {missing[0]}; transformers would make it up")
        return model

    def weights(self, lam: Lam) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor of θ(λ) in turn."""
        if self.curve:
            self.curve.check_lambda(lam)
        tasks = [(name, *rows) for name in self.layout for rows in slices(self.pair.tensors[name])]

        def work(task: tuple[str, int, int], scratch: Buffers, kept: Buffers) -> list[tuple[torch.Tensor, Sums | None]]:
            dtype, _ = self.layout[task[0]]
            return stored_rows(self.pair, *task, [lam], dtype, self.rounding, self.seed, scratch, kept, curve=self.curve)

        for (name, start, stop), [(rows, _)] in zip(tasks, in_order(tasks, work), strict=True):
            dtype, shape = self.layout[name]
            info = self.pair.tensors[name]
            if start == 0:
                out = torch.empty(shape, dtype=dtype)
            out.view(info.rows, *info.row_shape)[start:stop] = rows
            if stop == info.rows:
                yield name, out


def live(
    pair: ModelPair,
    lam: float | Sequence[float],
    *,
    dtype: torch.dtype | str | None = None,
    rounding: Rounding | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    compute_dtype: torch.dtype | str | None = None,
    path: str | os.PathLike[str] | Curve | None = None,
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
        path: a path that `calibrate` learned, or its file, in the place of the straight line.

    Returns:
        The model. `model.set_lam(λ)` computes θ(λ) anew from the two checkpoints and writes it into the parameters.

    Raises:
        DeraError: the pair has no weight-space form, or cannot be loaded; the path is another pair's, or not for this λ.
    """
    (lam,) = pair.known([lam])
    layout, rounding = output_layout(pair, torch.float32 if dtype is None else dtype, rounding)
    dial = _Dial(pair, layout, rounding, seed, opened(path, pair, [lam]))
    model = dial.build(lam, compute_dtype or (torch.float32 if dtype is None else dtype)).to(device).eval()
    if config := pair.generation_config():
        model.generation_config = config
    model._dera_dial = dial
    model.set_lam = types.MethodType(_set_lam, model)
    return model


def _set_lam(model: PreTrainedModel, lam: float | Sequence[float]) -> None:
    """Turn λ in place: the parameters become those of a fresh merge at λ. Not for use while another thread generates."""
    dial: _Dial = model._dera_dial
    (lam,) = dial.pair.known([lam])
    parameters = model.state_dict()  # shares memory with the model
    places = {name: dial.pair.architecture.stored_name(name, parameters) for name in dial.layout}
    if None not in places.values():
        for name, weight in dial.weights(lam):
            parameters[places[name]].copy_(weight)
    else:  # transformers stores some of these tensors under other names, or fused; it knows how
        model.load_state_dict(dial.build(lam, model.dtype).state_dict())
