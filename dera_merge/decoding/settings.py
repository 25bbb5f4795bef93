"""What a checkpoint's generation_config.json asks for beyond the distribution: warpers, penalties, beams.

Exact DeRa is a distribution. A checkpoint's own settings (`top_k`, `repetition_penalty`, …) change it, and transformers
applies them to every call that says nothing else; where nobody says anything it even takes the 50 likeliest tokens
alone. So a model that is to be exact gets a config without them, and they are named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

# What leaves the distribution of the next token as it is: where texts end, what is returned, how it is computed.
# Whatever else a config holds, in this release of transformers or a later one, counts as a change.
_HARMLESS = frozenset((
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "max_cache_len",
    "compile_config", "disable_compile", "prefill_chunk_size", "low_memory", "num_return_sequences",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "continuous_batching_config", "transformers_version",
))  # fmt: skip
# Without effect at 1; others are at 0.
_FACTORS = frozenset((
    "temperature", "top_p", "typical_p", "top_h", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
    "num_beams", "num_beam_groups", "guidance_scale",
))  # fmt: skip
_ONLY_SAMPLING = frozenset((
    "temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff",
))  # fmt: skip
_ONLY_BEAMS = frozenset(("early_stopping", "length_penalty"))


def changes(config: GenerationConfig) -> dict[str, Any]:
    """Settings of a config that change what is sampled, or what greedy decoding finds: name → value."""
    known = vars(GenerationConfig())
    return {
        name: value for name, value in config.to_dict().items()
        if name in known and name[0] != "_" and name not in _HARMLESS
        and value not in (None, False, [], {}) and value != (1 if name in _FACTORS else 0)
    }  # fmt: skip


def applied(config: GenerationConfig) -> dict[str, Any]:
    """Those `changes` that count in the way of decoding that a config asks for: `top_k` only where it samples, say."""
    idle = set() if config.do_sample else set(_ONLY_SAMPLING)
    if (config.num_beams or 1) == 1:
        idle |= _ONLY_BEAMS
    return {name: value for name, value in changes(config).items() if name not in idle}


def plain(config: GenerationConfig) -> GenerationConfig:
    """A copy without `changes`, and without the `top_k` of 50 that transformers takes where nobody gives one."""
    kept = {name: value for name, value in config.to_dict().items() if name in _HARMLESS and value is not None}
    bare = GenerationConfig(**kept)
    bare.top_k = 0  # not as an argument, which would be complained of where the config is greedy
    return bare


@contextmanager
def unremarked() -> Iterator[None]:
    """Within, transformers does not remark that the `top_k` of `plain` has no effect on greedy decoding."""

    def is_news(record: logging.LogRecord) -> bool:
        return "flags are not valid and may be ignored: ['top_k']" not in record.getMessage()

    log = logging.getLogger(GenerationConfig.__module__)
    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)
