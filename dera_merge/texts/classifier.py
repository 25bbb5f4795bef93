"""A reward that is a sequence classifier, whole or as an adapter, run here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..decoding.load import load_model
from ..errors import DeraError
from ..models.adapter import Adapter
from ..models.side import named_base
from ..models.source import CONTEXT, Source
from ..models.trust import NOTHING
from .exchanges import Exchange

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 16  # texts that it reads at a time
_PREFIX = "base_model.model."  # that PEFT gives to the names of a model's tensors
_HEADS = ("score.weight", "classifier.out_proj.weight", "classifier.weight")  # the row of each label, in an adapter


class Classifier:
    """A scorer that is a sequence classifier: its one output, or what it says of a label.

    What it says of a label is the log-probability; where the config names several labels at once
    (`problem_type`), the log-probability of that label against its absence; of a regression, the output.

    Args:
        name: `ID` or `ID#LABEL`, a directory or a Hub id.
        device: where it runs.

    Raises:
        DeraError: it cannot be loaded, lacks a tensor (a score head, say), or has no such label.
    """

    def __init__(self, name: str, device: Any) -> None:
        from transformers import AutoTokenizer

        self.model_id, _, label = name.partition("#")
        folder, self.model = _loaded(self.model_id, device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
            raise DeraError(f"{self.model_id} has no tokenizer that transformers can load: {error}") from error
        config = self.model.config
        labels = {str(text): int(index) for index, text in config.id2label.items()}
        named = ", ".join(labels)
        if label and label not in labels:
            raise DeraError(f"{self.model_id} has no label {label}; it has {named}")
        if len(labels) > 1 and not label:
            raise DeraError(
                f"{self.model_id} has {len(labels)} labels; say which one is the reward: "
                f"model:{self.model_id}#{next(iter(labels))} (they are {named})"
            )
        self.output = labels.get(label, 0)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config.get_text_config().pad_token_id = config.pad_token_id = self.tokenizer.pad_token_id
        sizes = [self.tokenizer.model_max_length, *(getattr(config, key, None) for key in CONTEXT)]
        self.longest = min((size for size in sizes if size), default=math.inf)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Exchange]) -> list[float]:
        """The reward of each. Raises DeraError where a text is longer than the model reads."""
        at_once = BATCH if self.tokenizer.pad_token is not None else 1
        rewards: list[float] = []
        for start in range(0, len(texts), at_once):
            batch, options = texts[start : start + at_once], {}
            if self.tokenizer.chat_template:
                whole = [self.tokenizer.apply_chat_template(text.turns, tokenize=False) for text in batch]
                options["add_special_tokens"] = False
            else:
                whole = [text.whole for text in batch]
            inputs = self.tokenizer(whole, padding=len(batch) > 1, return_tensors="pt", **options)
            if (longest := inputs["attention_mask"].sum(-1).max()) > self.longest:
                # Cut, it would be the reward of another text.
                raise DeraError(f"a text has {longest} tokens with its prompt, {self.model_id} reads {self.longest}")
            logits = self.model(**inputs.to(self.model.device)).logits.float()
            rewards += self._rewards(logits).tolist()
        return rewards

    def _rewards(self, logits: torch.Tensor) -> torch.Tensor:
        """Of outputs (texts, labels)."""
        kind = self.model.config.problem_type
        if logits.shape[-1] > 1 and kind == "multi_label_classification":
            logits = torch.nn.functional.logsigmoid(logits)
        elif logits.shape[-1] > 1 and kind != "regression":
            logits = logits.log_softmax(-1)
        return logits[:, self.output]


def _loaded(name: str, device: Any) -> tuple[Path, PreTrainedModel]:
    """Where it lies, and the model; an adapter is loaded onto the base that it names."""
    from transformers import AutoModelForSequenceClassification

    # Tensors of another shape are reported then, and refused by name.
    how: dict[str, Any] = {"kind": AutoModelForSequenceClassification, "ignore_mismatched_sizes": True}
    source = Source.locate(name)
    if not source.is_adapter:
        return source.folder, load_model(source.folder, "auto", device, **how)
    adapter = Adapter(source.folder)
    brought = {key.removeprefix(_PREFIX): tensor.shape for key, tensor in adapter.checkpoint.tensors.items()}
    if head := next((brought[key] for key in _HEADS if key in brought), None):
        how["num_labels"] = head[0]
    base = load_model(named_base(adapter, source, NOTHING).folder, "auto", device, brought=brought.keys(), **how)
    return source.folder, adapter.load_onto(base, device).get_base_model().eval()
