"""The tokenizer of a pair: where it lies, and whether two of them agree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DeraError, warn
from ..files.atomic import load_json
from .kinds import config_of
from .side import Side
from .source import VOCABULARY_FILES
from .trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_folder(sides: Iterable[Side]) -> Path | None:
    """The first folder that brings a tokenizer: of what was typed, then of the bases."""
    sides = list(sides)
    for source in (*(side.source for side in sides), *(side.base for side in sides)):
        if source.has_tokenizer():
            return source.folder
    return None


def load_tokenizer(folder: Path, config: Path, trust: Trust) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Args:
        folder: where it lies.
        config: the folder of the model that it is for.
        trust: whether code that comes with it may run.

    Raises:
        DeraError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    model_config = config_of(config, trust)
    try:
        return AutoTokenizer.from_pretrained(folder, config=model_config, trust_remote_code=trust.code)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        why = f"{error} is missing in one of its files" if isinstance(error, KeyError) else error
        raise DeraError(f"the tokenizer in {folder} cannot be loaded: {why}") from error


def check_tokenizers(ref: Side, aligned: Side, trust: Trust) -> None:
    """Warn where the chat templates differ. Raises DeraError where a token has two ids, or an id two tokens."""
    folders = [folder for side in (ref, aligned) if (folder := tokenizer_folder([side]))]
    if len(set(folders)) < 2:
        return
    ref_folder, aligned_folder = folders
    if not _same_vocabulary(ref_folder, aligned_folder):
        _check_vocabularies(*(load_tokenizer(folder, ref.base.folder, trust).get_vocab() for folder in folders))
    if _chat_template(ref_folder) != _chat_template(aligned_folder):
        warn("the chat templates differ; ALIGNED's is used for both")


def _check_vocabularies(ref: dict[str, int], aligned: dict[str, int]) -> None:
    ref = dict(sorted(ref.items(), key=lambda item: item[1]))
    for token, index in ref.items():
        if aligned.get(token, index) != index:
            raise DeraError(f"the tokenizers disagree: {token!r} is {index} in REF and {aligned[token]} in ALIGNED")
    names = {index: token for token, index in aligned.items()}
    for token, index in ref.items():
        if (name := names.get(index, token)) != token:
            raise DeraError(f"the tokenizers disagree: id {index} is {token!r} in REF and {name!r} in ALIGNED")


def _chat_template(folder: Path) -> str | None:
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file() and (template := load_json(folder / name).get("chat_template")):
            return str(template)
    return None


def _same_vocabulary(first: Path, second: Path) -> bool:
    """Whether two folders have the same files of a vocabulary; tokenizer.json, where there is one, is what is read."""
    names = [name for name in VOCABULARY_FILES if (first / name).is_file() or (second / name).is_file()]
    names = names[:1] if names[:1] == ["tokenizer.json"] else names
    return all(_same_file(first / name, second / name) for name in names)


def _same_file(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()
