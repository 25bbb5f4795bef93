"""What a user allows to be read and run of files that come from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trust:
    """What is allowed; both are off unless someone asks for them.

    Attributes:
        pickle: read `.bin` files where there is no safetensors file (never without `weights_only=True`).
        code: let transformers run code that comes with a checkpoint.
    """

    pickle: bool = False
    code: bool = False


NOTHING = Trust()
