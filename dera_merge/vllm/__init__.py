"""Exact DeRa inside vLLM: a model of two models, with a λ for each request.

vLLM finds this through the entry points of the package and calls `register` in each of its processes. Nothing here
imports vLLM before vLLM does.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about the architecture, and transformers about its config."""
    from vllm import ModelRegistry

    from ..decoding import config  # noqa: F401  (registers DeraConfig)

    ModelRegistry.register_model("DeraForCausalLM", "dera_merge.vllm.model:DeraForCausalLM")
