"""Exact DeRa by the name that people import it by, which registers it with transformers; it lives in `decoding/`."""

from .decoding.dial import DialForCausalLM
from .decoding.exact import DeraForCausalLM
from .decoding.mix import mix

__all__ = ["DeraForCausalLM", "DialForCausalLM", "mix"]
