"""Licence and language of a published merge, from its parents' cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError
from . import card
from .hub import CARD, downloaded

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def inherited_from(api: HfApi, parents: Sequence[card.Parent], license: str | None, notes: list[str]) -> dict[str, Any]:
    """Licence and languages of the parents, as the card's metadata has them.

    Args:
        license: the one that the user chose.
        notes: gets what is worth knowing.

    Raises:
        DeraError: licences differ and none was chosen.
    """
    licences: dict[tuple[Any, ...], str] = {}
    languages: list[str] = []
    for parent in {parent.typed: parent for parent in parents}.values():
        said = _metadata_of(api, parent, notes)
        language = said.get("language") or []
        languages += [str(entry) for entry in (language if isinstance(language, list) else [language])]
        if said.get("license"):
            kept = tuple(str(said[key]) for key in ("license", "license_name", "license_link") if said.get(key))
            licences.setdefault(kept, parent.name)
    values: dict[str, Any] = {}
    if license:
        values["license"] = license
    elif len(licences) > 1:
        named = ", ".join(
            f"{name} is under {licence[1 if len(licence) > 1 else 0]}" for licence, name in licences.items()
        )
        raise DeraError(f"the parents' licences differ ({named}); --license says under which this is published")
    elif licences:
        values |= dict(zip(("license", "license_name", "license_link"), next(iter(licences)), strict=False))
    else:
        notes.append("no parent's card names a licence, so this one names none; --license does")
    if languages:
        values["language"] = list(dict.fromkeys(languages))
    return values


def _metadata_of(api: HfApi, parent: card.Parent, notes: list[str]) -> dict[str, Any]:
    """The metadata of a parent's card; empty, with a note, where it cannot be read."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        if parent.on_hub:
            text = downloaded(api, parent.name, parent.revision, CARD)
        else:
            file = Path(parent.name).expanduser() / CARD
            text = file.read_bytes().decode("utf-8", errors="replace") if file.is_file() else None
        return card.read_metadata(text) if text else {}
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, DeraError):
        notes.append(f"the card of {parent.name} could not be read, its licence is not known")
        return {}


def check_licence(old: str | None, inherited: dict[str, Any], license: str | None, repo_id: str) -> None:
    """Raises DeraError where a card that is there says another licence than the parents, and none was chosen."""
    stated = card.read_metadata(old).get("license") if old else None
    if stated and not license and inherited.get("license") not in (None, stated):
        raise DeraError(
            f"the card of {repo_id} says license {stated}, the parents' is {inherited['license']}; --license says "
            "which it is"
        )
