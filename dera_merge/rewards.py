"""Rewards of texts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from .errors import DeraError


def load_reward(spec: str) -> Callable[[str], float]:
    """A reward from `module:function`, text → number; modules of the working directory count.

    Raises:
        DeraError: there is no such function.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise DeraError(f"{spec!r} is no reward; give module:function, dera_merge.demo:reward for example")
    sys.path.insert(0, "")  # as python -m does
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DeraError(f"the reward {spec} cannot be loaded: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise DeraError(f"{spec} is no function")
    return found
