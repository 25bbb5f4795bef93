"""What dera-merge raises and warns with."""

from __future__ import annotations

import warnings


class DeraError(Exception):
    """Something about the inputs that the caller can mend. The message is one line: what is wrong, and what to do."""


class DeraWarning(UserWarning):
    """Something that does not stop the work but that its user should know."""


def warn(message: str) -> None:
    warnings.warn(message, DeraWarning, stacklevel=3)
