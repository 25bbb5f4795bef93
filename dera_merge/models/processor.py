"""The processor of a pair that sees images: where its files lie, and how it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeraError
from ..files.atomic import load_json
from .side import Side
from .source import PROCESSOR_FILES
from .trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


def processor_files(sides: Iterable[Side]) -> list[Path]:
    """The files of the first folder that brings a processor, of what was typed, then of the bases; [] if none does.

    Raises:
        DeraError: one of them is not what its name says.
    """
    sides = list(sides)
    for source in (*(side.source for side in sides), *(side.base for side in sides)):
        if files := [file for name in PROCESSOR_FILES if (file := source.folder / name).is_file()]:
            for file in files:
                if not isinstance(load_json(file), dict):
                    raise DeraError(f"{file} holds no settings of a processor; mend or remove it")
            return files
    return []


def load_processor(folder: Path, tokenizer: PreTrainedTokenizerBase, trust: Trust) -> ProcessorMixin:
    """The processor in a folder, with the pair's tokenizer.

    Args:
        folder: where its files lie.
        tokenizer: which takes the place of the one that lies there.
        trust: whether code that comes with it may run.

    Raises:
        DeraError: it cannot be loaded.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust.code)
    except Exception as error:  # libraries for images that are missing, and what tokenizers raise
        hint = "" if find_spec("torchvision") else "; many need torchvision, which is not installed"
        raise DeraError(f"the processor in {folder} cannot be loaded: {error}{hint}") from error
    if not hasattr(processor, "tokenizer"):
        raise DeraError(f"{folder} holds no processor of images and text that transformers knows")
    processor.tokenizer = tokenizer
    return processor
