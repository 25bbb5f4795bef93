"""Gumbel noise as a function of (seed, stream, position, token id), made where the logits are.

The maximum of log-probabilities plus independent Gumbel noise is an exact sample (Gumbel, 1954). There is no generator
with a state: the bits of a token are a hash of four integers (counter-based random numbers: Salmon et al., *Parallel
random numbers: as easy as 1, 2, 3*, SC 2011). So they are the same on every device, in every batch, and in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

_WORD, _WORDS = 2**32 - 1, 2**64 - 1
_CACHED = 1 << 17  # numbers of 4 bytes


def _mixed(word: int) -> int:
    """One step of SplitMix64 (Steele, Lea and Flood, 2014): a permutation of 64 bits that looks random."""
    word = (word + 0x9E3779B97F4A7C15) & _WORDS
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _WORDS
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _WORDS
    return word ^ word >> 31


def _signed(word: int) -> int:
    """The 32-bit integer with these lowest bits; torch multiplies int32 modulo 2³²."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


def key_of(seed: int, stream: int, position: int) -> tuple[int, int]:
    """Two 32-bit integers that stand for one text at one position."""
    key = _mixed(_mixed(_mixed(seed) ^ stream & _WORDS) ^ position)
    return _signed(key), _signed(key >> 32)


def _hash(words: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A keyed hash of int32 words (rows, count), in place; the halves of the keys have shape (rows, 1).

    Three multiplications between shifts, the best of their kind that Wellons found for 32 bits ("triple32" of
    hash-prospector; with two, tokens 256 apart were not independent). The halves of the key go in before and between
    them. torch shifts int32 with the sign, hence the masks.
    """
    words ^= first
    words ^= (words >> 17) & 0x7FFF
    words *= _signed(0xED5AD4BB)
    words += second
    words ^= (words >> 11) & 0x1FFFFF
    words *= _signed(0xAC4C1B51)
    words ^= (words >> 15) & 0x1FFFF
    words *= _signed(0x31848BAB)
    words ^= (words >> 14) & 0x3FFFF
    return words


def bits(keys: Sequence[tuple[int, int]], count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform 31-bit integers, the same on every device.

    Args:
        keys: of each row, from `key_of`.
        count: token ids 0 to count - 1.
        device: where they are made.

    Returns:
        int32 tensor of shape (rows, count), values in [0, 2³¹).
    """
    ids = torch.arange(count, dtype=torch.int32, device=device).repeat(len(keys), 1)
    key = torch.tensor(keys, dtype=torch.int32, device=device)
    return _hash(ids, key[:, :1], key[:, 1:]).bitwise_and_(0x7FFFFFFF)


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, from uniform 31-bit integers; the same on every device within a few ulps.

    u = (w + ½) / 2³¹ in (0, 1), and -log(-log(1 - u)). Small u make the large values, those that decide a sample, and a
    float32 is finest near 0; the largest value is 22.2 (u = 2⁻³²), which noise exceeds once in 4·10⁹.
    """
    noise = words.to(torch.float32)
    # Rounded to float32, 2³¹ - 1 is 2³¹; the factor keeps u below 1 for it. In place, since each pass takes time.
    return noise.mul_((2**-31) * (1 - 2**-24)).add_(2**-32).neg_().log1p_().neg_().log_().neg_()


class GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise to the scores, so that greedy decoding samples at temperature 1.

    Args:
        streams: one integer per row of the batch; rows with the same stream get the same noise.
        seed: of all streams.
        vocab_size: rows of the vocabulary that may be sampled, and get noise; default all. Models that are to be
            coupled must have the same number of them.

    The noise of a step belongs to its position, counted from the first call: for one call of `generate`.
    """

    def __init__(self, streams: Sequence[int], seed: int = 0, vocab_size: int | None = None) -> None:
        self._streams, self._seed, self._vocab_size = list(streams), seed, vocab_size
        self._start: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) with the noise of this position; -inf on rows that may not be sampled."""
        self._start = input_ids.shape[1] if self._start is None else self._start
        position = input_ids.shape[1] - self._start
        keys = [key_of(self._seed, stream, position) for stream in self._streams]
        count = self._vocab_size or scores.shape[1]
        noisy = torch.full_like(scores, -torch.inf)
        # On a CPU, as many rows as stay in a core's cache; elsewhere all.
        at_once = max(1, _CACHED // count) if scores.device.type == "cpu" else len(keys)
        for start in range(0, len(keys), at_once):
            rows = slice(start, start + at_once)
            noise = gumbel(bits(keys[rows], count, scores.device))
            torch.add(scores[rows, :count], noise, out=noisy[rows, :count])
        return noisy
