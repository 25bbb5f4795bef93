"""A pair as a model of lm-evaluation-harness: `--model dera`.

    python -m dera_merge.lm_eval --model dera --model_args ref=my-sft,aligned=my-dpo-lora,lam=0.5 --tasks arc_easy

is lm-eval's own command line, which knows `dera` then. Releases that load entry points know it by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .api import ModelPair
from .errors import DeraError
from .lambdas import parse_lambdas


@register_model("dera")
class DeraLM(HFLM):
    """Exact DeRa, or the merge, at one λ.

    Args:
        ref, aligned: directories or Hub ids of models or adapters; several aligned models as a list, or joined by `+`.
        lam: λ; with several aligned models as on the command line, `0.5+0.25`.
        mode: `exact` (both models), or `merged` (θ_ref + λΔ, not rounded unless `dtype` says so).
        path: a path that `calibrate` learned, for the merge.
        base, stack, new_tokens, allow_pickle, trust_remote_code: as for `ModelPair.from_pretrained`.
        dtype: in what the models compute; default as for `pair.exact` and `pair.merged`.
        device: default a GPU where there is one; without any, `cuda` is the CPU, as for lm-eval's own models.
        kwargs: of lm-eval's `HFLM`: `batch_size`, `max_length`, `think_end_token`, ….

    Raises:
        DeraError: as `ModelPair.from_pretrained`, `exact` and `merged` do.
    """

    def __init__(
        self,
        ref: str,
        aligned: str | Sequence[str],
        lam: float | str = 1.0,
        mode: Literal["exact", "merged"] = "exact",
        path: str | None = None,
        base: str | None = None,
        stack: bool | None = None,
        new_tokens: Literal["aligned", "refuse"] = "refuse",
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        if mode not in ("exact", "merged"):
            raise DeraError(f"mode {mode!r} is neither exact nor merged")
        if mode == "exact" and path is not None:
            raise DeraError("exact decoding merges nothing; path is for mode=merged")
        several = aligned.split("+") if isinstance(aligned, str) else list(aligned)
        pair = ModelPair.from_pretrained(
            ref, several, base=base, stack=stack, new_tokens=new_tokens, allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        try:
            (at,) = parse_lambdas([str(lam)], pair.models)
        except ValueError as error:
            raise DeraError(f"lam={lam}: {error}") from None
        there = torch.cuda.is_available()
        if device is None or (str(device).startswith("cuda") and not there):  # lm-eval's default is cuda:0 everywhere
            device = "cuda" if there else "cpu"
        if mode == "exact":
            model = pair.exact(at, dtype=dtype, device=device)
        else:
            model = pair.merged(at, device=device, compute_dtype=dtype, path=path)
        super().__init__(pretrained=model, tokenizer=pair.tokenizer, **kwargs)


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
