"""From two models to the one to ship, in one call.

Knows every room that does a step of that, and in which order; each step is that room's own call. Must not know the
command line.
"""

from .auto import Wanted, auto
from .outcome import Outcome

__all__ = ["Outcome", "Wanted", "auto"]
