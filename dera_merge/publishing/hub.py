"""Talk to the Hub: patiently, and with errors that say what to do."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DeraError, warn

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
NO_TOKEN = "the Hub wants a token that it knows: hf auth login stores one"
PATIENCE = 600  # seconds to wait for a rate limit in all
T = TypeVar("T")


def files_at(api: HfApi, repo_id: str, commit: str | None) -> set[str]:
    """Names of the files at the top of a repository."""
    if commit is None:
        return set()
    return {entry.path for entry in api.list_repo_tree(repo_id, revision=commit) if hasattr(entry, "blob_id")}


def downloaded(api: HfApi, repo_id: str, commit: str | None, name: str) -> str | None:
    """A small text file of a repository; None where there is none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = api.hf_hub_download(repo_id, name, revision=commit)
    except EntryNotFoundError as error:
        if isinstance(error, FileNotFoundError):  # the local cache has no such file: the Hub was not reached
            raise
        return None
    try:
        return Path(file).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DeraError(f"the {name} of {repo_id} is not UTF-8 ({error}); mend it first") from error


def patiently(call: Callable[[], T]) -> T:
    """Call the Hub; where it limits the rate, wait visibly as long as it asks, but not for ever."""
    from huggingface_hub.errors import HfHubHTTPError

    waited = 0
    while True:
        try:
            return call()
        except (HfHubHTTPError, RuntimeError) as error:  # an upload's failure is a RuntimeError
            response = getattr(cause_of(error), "response", None)
            if response is None or response.status_code != 429:
                raise
            wait = _asked_to_wait(response.headers)
            if waited + wait > PATIENCE:
                raise
            warn(f"the Hub limits the rate of requests; waiting {wait} s, as it asks")
            time.sleep(wait)
            waited += wait


def _asked_to_wait(headers: Any) -> int:
    """Seconds, from `Retry-After` or the Hub's `RateLimit: …;t=<seconds>`; 30 where neither says."""
    asked = re.fullmatch(r"\d+", headers.get("Retry-After", ""))
    asked = asked or re.search(r"(?<=t=)\d+", headers.get("RateLimit", ""))
    return max(1, int(asked[0])) if asked else 30


def full_id(api: HfApi, repo_id: str) -> str:
    """`user/name`; a name alone is the token's user's. Raises DeraError where that is not known."""
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    try:
        return f"{api.whoami()['name']}/{repo_id}"
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise DeraError(f"whose {repo_id}? Give it as OWNER/{repo_id}, or log in: hf auth login") from error


def if_there(ask: Callable[[], T]) -> T | None:
    """An answer of the Hub; None where it says that there is no such repository or branch."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return ask()
    except GatedRepoError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if error.response.status_code == 401:  # to a stranger a missing repository and a private one look alike
            raise
        return None


def check_card(text: str) -> None:
    """Raises DeraError where the Hub would not take a card."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text).validate()
    except ValueError as error:
        said = "; ".join(re.findall(r'"message":\s*"((?:[^"\\]|\\.)*)"', str(error))) or str(error)
        raise DeraError(f"the Hub does not accept the card: {' '.join(said.split())}") from error


def cause_of(error: BaseException) -> BaseException:
    """What the Hub answered: an upload that failed carries it behind an error of its own."""
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub, and of the way to it, into a DeraError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise DeraError(f"{repo_id!r} is no id for a repository; give user/name") from error
    except LocalTokenNotFoundError as error:
        raise DeraError(f"{NO_TOKEN}, or set HF_TOKEN") from error
    except (*HfHubHTTPError.__bases__, RuntimeError, ValueError) as error:  # the HTTP library's too, whichever it is
        if not _came_from_the_hub(error) or getattr(error, "filename", None):
            raise  # a fault of ours is none of the Hub's, nor is a file here that cannot be read
        raise DeraError(explained(cause_of(error), repo_id)) from error


def _came_from_the_hub(error: BaseException) -> bool:
    """Whether an error was raised by huggingface_hub, or by what it calls."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").partition(".")[0] == "huggingface_hub" for frame in frames)


def explained(error: BaseException, repo_id: str) -> str:
    """One line on what the Hub answered, and what to do."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked; unset it"
    response = getattr(error, "response", None)
    if response is None:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"{HfApi().endpoint} broke off or cannot be reached: {reason}; what is uploaded stays, run it again"
    status = response.status_code
    said = " ".join((getattr(error, "server_message", None) or "").split())
    said = f" ({said})" if said else ""
    ways = {
        400: f"the Hub does not accept it{said}",
        401: f"{NO_TOKEN}, or set HF_TOKEN{said}",
        403: f"this token may not write to {repo_id}{said}; it needs write permission there",
        404: f"the Hub finds no {repo_id}, or this token may not see it{said}",
        409: f"something else is being written to {repo_id}{said}; run it again",
        412: f"{repo_id} was changed by someone else meanwhile{said}; look at it, then run it again",
        413: f"the Hub finds this too large{said}",
        429: f"the Hub limits the rate of requests{said}; try again later, what is uploaded stays",
    }
    broken = f"the Hub has trouble of its own (HTTP {status}){said}; try again later, what is uploaded stays"
    return ways.get(status, broken if status >= 500 else f"the Hub answers HTTP {status}{said}")
