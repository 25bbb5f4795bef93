"""An address to which JSON is POSTed: asked again where it may answer later, without a password or a token shown.

A token goes along as a bearer token. It is taken out of whatever the server says, should that repeat it.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..errors import DeraError, warn
from .exchanges import RewardDown

PATIENCE = 60.0  # seconds for one answer
PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before it is asked again where it cannot be reached, or is busy
LARGEST = 1 << 26  # bytes of an answer
LONGEST = 60.0  # seconds that a server may ask to be left alone
QUIET = 2.0  # seconds of waiting that are not worth a word
_BUSY = (408, 425, 429, 502, 503, 504)


class TooMuch(Exception):
    """A request that is refused, and may do with less in it."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects turn a POST into a GET, and would carry the token elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Later(Exception):
    """Why no answer came that may come later."""

    def __init__(self, why: str, after: float = 0.0, nobody: bool = False) -> None:
        super().__init__(why)
        self.after = after  # seconds
        self.nobody = nobody  # is there


class Endpoint:
    """An address that answers JSON with JSON.

    Args:
        spec: the address, and behind `#` a label of it.
        what: what it is called in messages.
        token: the environment variable of its token.
        patience: seconds for one answer; default `PATIENCE`.
        pauses: seconds before each further try; default `PAUSES`.

    Attributes:
        shown: the address without what is nobody's business.
        label: what stood behind `#`.
        kind: the last part of the address.

    Raises:
        DeraError: that is no address, or one with a password in it.
    """

    def __init__(
        self, spec: str, what: str, token: str, patience: float | None = None, pauses: Sequence[float] | None = None
    ) -> None:
        try:
            parts = urlsplit(spec)
            if not parts.hostname or parts.port == 0:
                raise ValueError("there is no host")
        except ValueError as error:
            raise DeraError(f"{spec!r} is no address of a {what}: {error}") from error
        if parts.username or parts.password:
            raise DeraError(f"give the password of {parts.hostname} as a token in {token}, not in the address")
        self.label = parts.fragment
        self.address = urlunsplit(parts._replace(fragment=""))
        # A query may hold a key, which no report is to show.
        self.shown = urlunsplit(parts._replace(fragment="", query=""))
        self.kind = parts.path.rstrip("/").rpartition("/")[2]
        self.what, self._variable, self._patience, self._pauses = what, token, patience, pauses
        own = parts.hostname in ("localhost", "127.0.0.1", "::1")  # which no proxy reaches
        self._heard, self._waiting = False, False  # whether it ever answered, and whether its silence has been told
        self._opener = urllib.request.build_opener(_NoRedirect, *([urllib.request.ProxyHandler({})] if own else []))

    def post(self, body: dict[str, Any], alone: bool = True) -> Any:
        """What it answers, asked again where it may answer later; not where nobody was there from the first.

        Args:
            body: of the request.
            alone: whether there could not be less in it.

        Raises:
            TooMuch: it refuses this request.
            RewardDown: it cannot be reached, does not answer in time, or refuses every request.
            DeraError: it answers with something else than JSON.
        """
        pauses = PAUSES if self._pauses is None else self._pauses
        for number, pause in enumerate((*pauses, None)):
            try:
                return self._once(body, alone)
            except _Later as later:
                if pause is None or (later.nobody and not self._heard):
                    raise RewardDown(
                        f"the {self.what} {self.shown} does not answer: {later}; start it, and go on with --resume "
                        "if there are texts already"
                    ) from later
                wait = max(pause, later.after)
                if wait >= QUIET and not self._waiting:  # of many requests at once, one says so
                    self._waiting = True
                    left = wait + sum(pauses[number + 1 :])
                    warn(f"the {self.what} {self.shown} does not answer ({later}); asking again for {left:.0f} s")
                time.sleep(wait)
        raise AssertionError

    def hidden(self, text: str) -> str:
        """A text without the token."""
        token = self._token()
        return text.replace(token, "…") if token else text

    def _token(self) -> str:
        token = os.environ.get(self._variable, "").strip()
        if not (token.isascii() and token.isprintable()):  # urllib would say so, and show it
            raise RewardDown(f"the token in {self._variable} holds characters that no header can have")
        return token

    def _once(self, body: dict[str, Any], alone: bool) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        patience = PATIENCE if self._patience is None else self._patience
        deadline, content = time.monotonic() + patience, b""
        request = urllib.request.Request(self.address, json.dumps(body, default=str).encode(), headers)
        try:
            with self._opener.open(request, timeout=patience) as answer:
                self._heard = True
                while part := answer.read1(1 << 16):
                    content += part
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    if len(content) > LARGEST:
                        raise DeraError(f"the {self.what} {self.shown} answers with more than {LARGEST >> 20} MB")
            self._waiting = False
        except urllib.error.HTTPError as error:
            self._heard = True
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._late(patience, alone) from error
            nobody = isinstance(reason, ConnectionRefusedError | socket.gaierror)
            raise _Later(str(reason) or type(reason).__name__, nobody=nobody) from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            said = " ".join(self.hidden(content[:4000].decode(errors="replace")).split())
            raise DeraError(f"the {self.what} {self.shown} answers, but not with JSON: {said:.80}") from error

    def _late(self, patience: float, alone: bool) -> Exception:
        """Of an answer that did not come in time."""
        late = f"no answer in {patience:g} seconds"
        if not alone:
            return TooMuch(late)
        return RewardDown(f"the {self.what} {self.shown} gives {late} to a single text; is it at work?")

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Of a status that says no."""
        said = self.hidden(" ".join(error.read(4000).decode(errors="replace").split()))
        what = f"status {error.code} {error.reason}"
        if error.code in _BUSY:
            after = error.headers.get("Retry-After", "")
            return _Later(what, min(float(after), LONGEST) if after.isdigit() else 0.0)
        told = f"the {self.what} {self.shown} refuses ({what}): {said:.160}".rstrip(": ")
        if error.code in (401, 403):
            return RewardDown(f"{told}; a token goes into {self._variable}")
        if error.code < 400 or error.code in (404, 405, 501):
            return RewardDown(f"{told}; is the address right?")
        return TooMuch(told)
