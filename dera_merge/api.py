"""A pair with a method for each thing that one does with it: what Python users meet first.

Each method is one call of the room that does it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .models.pair import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .decoding.dial import DialForCausalLM
    from .decoding.exact import DeraForCausalLM
    from .merging.path import Course
    from .merging.rounding import Rounding


class ModelPair(Pair):
    """A reference model and an aligned model, or several; make one with `from_pretrained`.

    With several aligned models λ is a vector: h_ref + Σ λ_k·(h_k - h_ref) exactly, θ_ref + Σ λ_k·Δ_k in weight space.
    """

    def exact(
        self,
        lam: float | Sequence[float] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | Sequence[str | torch.device] = "cpu",
        as_configured: bool = False,
        offload: bool = False,
        **kwargs: Any,
    ) -> DeraForCausalLM:
        """Exact DeRa at λ as one transformers model: (1-λ)·h_ref + λ·h_aligned (Liu et al., 2024).

        An adapter and its base are held once and decoded in one forward pass, as two rows of a batch.

        Args:
            lam: the default λ, any finite number (default 1), or one for each aligned model (default: as much of each);
                `generate(..., lam=…)` overrides it per call or per sequence.
            dtype: compute dtype; default float32 on CPU and the checkpoint's dtype elsewhere.
            device: where the two models go; two devices put the reference on the first and the aligned model on the
                second.
            as_configured: let `generate` apply the warpers, penalties and beams of ALIGNED's generation_config.json.
                Without it none applies that a call does not ask for, transformers' `top_k` of 50 included; the model's
                `left_out` names them.
            offload: make a layer's weights from the files whenever it runs, and let them go: see
                `merging.hollow.offloaded`. An adapter's side then computes with its effective weights.
            kwargs: passed to transformers' `from_pretrained`: `quantization_config` loads both models quantised,
                `device_map` spreads each over devices (`device` is then not used), `attn_implementation`, ….

        Raises:
            DeraError: ALIGNED's tokenizer uses tokens that REF does not have, or the models cannot be loaded.
        """
        from .decoding.exact import DeraForCausalLM
        from .texts.offload import offloaded_exact

        make = offloaded_exact if offload else DeraForCausalLM.from_pair
        return make(self, lam, dtype=dtype, device=device, as_configured=as_configured, **kwargs)

    def dial(self, lam: float | Sequence[float] | None = None, **kwargs: Any) -> DialForCausalLM:
        """θ_ref + λΔ of an adapter pair over one set of weights, with a λ for each sequence of a batch.

        Args:
            lam: the default λ.
            kwargs: as for `exact`: `dtype`, `device`, `quantization_config`, ….

        Raises:
            DeraError: the two sides do not share their weights, or the model cannot be loaded.
        """
        exact = self.exact(lam, as_configured=True, **kwargs)
        model = exact.dial()
        model.generation_config = exact.generation_config
        return model

    def merged(
        self,
        lam: float | Sequence[float],
        *,
        dtype: torch.dtype | str | None = None,
        rounding: Rounding | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        compute_dtype: torch.dtype | str | None = None,
        path: str | os.PathLike[str] | Course | None = None,
        lambda_for: Mapping[str, float | Sequence[float]] | None = None,
        offload: bool = False,
    ) -> PreTrainedModel:
        """θ_ref + λΔ as a live transformers model; `model.set_lam(λ)` turns it in place. See `merging.live.live`.

        Args:
            lam: λ to begin with; with several aligned models, a number for each.
            dtype: what the weights are rounded to, as `merge` rounds them: a dtype, or `"auto"`; None leaves float32.
            rounding: `"stochastic"` or `"nearest"`; default as for `merge`.
            seed: of stochastic rounding.
            device: where the model goes.
            compute_dtype: dtype of the parameters; default `dtype`, or float32 where that is None.
            path: a path that `calibrate` learned, or its file, in the place of the straight line.
            lambda_for: λ of parts of the model, by patterns of tensors' names (`{"mlp": 0.8, "layers.0-7": 0.2}`, see
                `merging.parts`); the last that matches says a tensor's, and what none matches is at `lam`.
            offload: hold no more than a layer of it: see `merging.hollow.offloaded`.

        Returns:
            The model, in evaluation mode; its weights are those that `merge` writes, where `dtype` is given.

        Raises:
            DeraError: the pair cannot be merged or loaded; the path is another pair's, or not for this λ.
        """
        from .merging.hollow import offloaded
        from .merging.live import live
        from .merging.parts import along

        return (offloaded if offload else live)(
            self, lam, dtype=dtype, rounding=rounding, seed=seed, device=device, compute_dtype=compute_dtype,
            path=along(self, path, lambda_for),
        )  # fmt: skip

    def merge(
        self,
        out: str | os.PathLike[str],
        lams: Sequence[float | Sequence[float]],
        *,
        format: Literal["full", "adapter"] = "full",
        path: str | os.PathLike[str] | Course | None = None,
        lambda_for: Mapping[str, float | Sequence[float]] | None = None,
        report: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> list[Path]:
        """Write θ_ref + λΔ without loading a model: as ordinary checkpoints, or λΔ as PEFT adapters over the base.

        Args:
            out: the directory of the one λ; with several, they go to `out/lambda-<λ>`.
            lams: finite λ; with several aligned models, a number for each.
            format: `"full"` checkpoints, or `"adapter"`.
            path: a path that `calibrate` learned, or its file, in the place of the straight line.
            lambda_for: λ of parts of the model, as for `merged`.
            report: a report of `compare` on this pair; λ outside of what it calls safe are warned of.
            kwargs: as for `merging.merge.merge` and `merging.adapters.merge_adapters`.

        Returns:
            The directories, in the order of `lams`.

        Raises:
            DeraError: the pair cannot be merged, the output cannot be written, or the report is of another pair.
        """
        from .measuring.report import warn_of_unsafe
        from .merging.adapters import merge_adapters
        from .merging.merge import merge
        from .merging.parts import along
        from .merging.path import opened

        course = opened(along(self, path, lambda_for), self, self.known(lams))
        if report is not None:
            warn_of_unsafe(self, self.known(lams), report, course)
        return (merge_adapters if format == "adapter" else merge)(self, out, lams, path=course, **kwargs)

    def export_exact(self, out: str | os.PathLike[str], lam: float = 1.0, **kwargs: Any) -> dict[str, Any]:
        """Both models in one directory, for serving exact DeRa with vLLM.

        Args:
            out: the directory, new.
            lam: the λ of requests that name none.
            kwargs: as for `serving.export.export_exact`.
        """
        from .serving.export import export_exact

        return export_exact(self, out, lam, **kwargs)
