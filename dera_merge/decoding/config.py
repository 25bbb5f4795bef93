"""The config of a mixture, by itself: serving engines read it before they load a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..errors import DeraError
from ..models.pair import Pair
from ..models.trust import NOTHING, Trust


class DeraConfig(PreTrainedConfig):
    """Config of a mixture.

    Args:
        text_config: a copy of the reference's config, for its sizes.
        lam: the default λ; with several aligned models, a number for each.
        pair: what `ModelPair.from_pretrained` was called with, so that a saved mixture can be loaded again.
    """

    model_type = "dera"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        lam: float | list[float] = 1.0,
        pair: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config or PreTrainedConfig()
        self.lam = lam
        self.pair = pair
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(key, getattr(text_config, key, None))
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that both models have."""
        return self.text_config.vocab_size

    def open_pair(self, folder: Path, trust: Trust = NOTHING) -> Pair:
        """The pair that this config names; relative names count from `folder`, where the config lies.

        Raises:
            DeraError: it names none, or its models cannot be had.
        """
        if not self.pair:
            raise DeraError(f"{folder} is no saved mixture; its config.json names no pair")

        def place(value: Any) -> Any:
            if isinstance(value, list):
                return [place(item) for item in value]
            return str(folder / value) if isinstance(value, str) and (folder / value).is_dir() else value

        arguments = {key: place(value) for key, value in self.pair.items()}
        ref, aligned = arguments.pop("ref"), arguments.pop("aligned")
        return Pair.from_pretrained(ref, aligned, **arguments, allow_pickle=trust.pickle, trust_remote_code=trust.code)


AutoConfig.register("dera", DeraConfig, exist_ok=True)
