"""Where an argument leads: a directory or a repository on the Hub, and what lies there."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DeraError
from ..files.atomic import load_json
from ..files.places import instead, near
from .trust import NOTHING, Trust

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
GENERATION = "generation_config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
CONTEXT = ("max_position_embeddings", "n_positions")  # config keys: how many tokens a model takes


@dataclass(frozen=True)
class Source:
    """Where one argument leads: `name` as it was typed, the local `folder`, the commit if it came from the Hub."""

    name: str
    folder: Path
    revision: str | None = None

    @classmethod
    def locate(cls, name: str | os.PathLike[str], revision: str | None = None, trust: Trust = NOTHING) -> Source:
        """Find a local directory, or download `id` or `id@revision` from the Hub.

        Args:
            name: a path or a Hub id.
            revision: of the Hub; one that is typed behind `@` comes first.
            trust: which files are worth downloading.

        Raises:
            DeraError: neither a directory nor a repository that can be reached.
        """
        name = os.fspath(name)
        folder = Path(name).expanduser()
        if folder.is_dir():
            return cls(name, folder.resolve())
        if folder.exists():
            raise DeraError(f"{name} is a file; give the directory that holds config.json or adapter_config.json")
        if name.startswith(("https://", "http://")):
            raise DeraError(f"{name} is a web address; give the Hub id, owner/name, or a directory")
        repo, _, typed = name.partition("@")
        missing = f"there is no directory {name}{near(folder)}"
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", repo):
            raise DeraError(missing)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        )

        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        patterns += ["*.bin"] * trust.pickle + ["*.py"] * trust.code
        try:
            path = snapshot_download(repo, revision=typed or revision, allow_patterns=patterns)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
            if folder.parent.is_dir() and "/" in repo:  # typed as a path, most likely
                raise DeraError(f"{missing}, nor a model of that name that could be had from the Hub") from error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DeraError(f"{missing}, and as a model of the Hub it could not be had: {reason}") from error
        return cls(name, Path(path).resolve(), Path(path).name)

    @property
    def pinned(self) -> str:
        """The local folder, or the Hub id with the commit."""
        return f"{self.name.partition('@')[0]}@{self.revision}" if self.revision else str(self.folder)

    @property
    def address(self) -> tuple[str, str | None]:
        """What other tools find it by from anywhere: the Hub id and the commit, or the local folder and None."""
        return (self.name.partition("@")[0], self.revision) if self.revision else (str(self.folder), None)

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter lies there, not a full model. Raises DeraError where it is neither."""
        if (self.folder / "adapter_config.json").is_file():
            return True
        if (self.folder / "config.json").is_file():
            return False
        raise DeraError(f"{self.name} holds neither config.json nor adapter_config.json{instead(self.folder)}")

    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in VOCABULARY_FILES)


def load_config(source: Source) -> dict[str, Any]:
    """A checkpoint's config.json. Raises DeraError where it is not an object with a list of architectures."""
    config = load_json(source.folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("architectures") or [], list):
        raise DeraError(f"{source.name}/config.json is not the config of a transformers model")
    check_sizes(source, config)
    return config


def check_sizes(source: Source, config: Mapping[str, Any]) -> None:
    """Raise DeraError where a size in a config, or in its text decoder's part, is no whole number."""
    for key in ("vocab_size", *CONTEXT):
        if not isinstance(config.get(key), int | None):
            raise DeraError(f"{source.name}/config.json: {key} is {config[key]!r}, expected a whole number")
