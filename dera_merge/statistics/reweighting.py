"""What texts that were drawn at a few λ say of every other λ: multiple importance sampling.

Per-token DeRa has an exact density, log π_λ(y|x) = Σ_t [(1-λ)·log p_ref + λ·log p_aligned - log Z_t(λ)], so a text
drawn at one λ, weighted by how much likelier it is at another, stands for that one too. With texts of several λ
(anchors) for each prompt, the weight is that of the balance heuristic (Veach and Guibas, 1995):

    w(y) = π_λ(y) / Σ_a (n_a/n)·π_{λ_a}(y)

It is at most n/n_a at an anchor. In between, where anchors are far apart, few texts carry all the weight, and the
effective sample size says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np

DRAWS = 2000  # samples of the bootstrap


@dataclass(frozen=True)
class Pool:
    """Texts of several λ, and their log-density at every λ of a grid.

    Attributes:
        lams: the grid, (L,); all anchors are on it.
        logp: log π_λ(y|x) of each text in nats, (texts, L).
        drawn: the grid's index of the λ that each text was drawn at, (texts,).
        prompt_of: the prompt of each text, (texts,).
        seed: of the bootstrap.
    """

    lams: np.ndarray
    logp: np.ndarray
    drawn: np.ndarray
    prompt_of: np.ndarray
    seed: int = 0

    @cached_property
    def prompts(self) -> np.ndarray:
        """Each text's prompt, counted from 0 without holes."""
        return np.unique(self.prompt_of, return_inverse=True)[1]

    @cached_property
    def weights(self) -> np.ndarray:
        """w of the balance heuristic, (texts, L); its mean over the texts of a prompt is 1 in expectation."""
        anchors = np.unique(self.drawn)
        counts = np.zeros((self.prompts.max() + 1, len(anchors)))
        np.add.at(counts, (self.prompts, np.searchsorted(anchors, self.drawn)), 1)
        with np.errstate(divide="ignore"):
            shares = np.log(counts / counts.sum(1, keepdims=True))[self.prompts]
        return np.exp(self.logp - np.logaddexp.reduce(self.logp[:, anchors] + shares, 1)[:, None])

    @cached_property
    def ess(self) -> np.ndarray:
        """Effective number of texts for each prompt at each λ, (L,): 1 is what one text drawn there would be."""
        return self.weights.sum(0) ** 2 / (self.weights**2).sum(0) / (self.prompts.max() + 1)

    def _summed(self, values: np.ndarray) -> np.ndarray:
        """Sums over the texts of each prompt, (prompts, L)."""
        sums = np.zeros((self.prompts.max() + 1, values.shape[1]))
        np.add.at(sums, self.prompts, values)
        return sums

    @cached_property
    def _resampled(self) -> np.ndarray:
        """How often each prompt is in each bootstrap sample, (DRAWS, prompts): the same for all that is estimated."""
        size = self.prompts.max() + 1
        draws = np.random.default_rng(self.seed).integers(size, size=(DRAWS, size))
        counts = np.zeros((DRAWS, size))
        np.add.at(counts, (np.arange(DRAWS)[:, None], draws), 1)
        return counts

    def mean(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The expected value at each λ, self-normalised.

        Args:
            values: of each text, (texts,), or of each text at each λ, (texts, L).

        Returns:
            Estimates (L,), and the same for each bootstrap sample of the prompts, (DRAWS, L).
        """
        values = values[:, None] if values.ndim == 1 else values
        over, under = self._summed(self.weights * values), self._summed(self.weights)
        return over.sum(0) / under.sum(0), (self._resampled @ over) / (self._resampled @ under)

    def wins(self, values: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
        """How often a text of each λ is worth more than an independent one of λ number `at`, ties counted half.

        Args:
            values: of each text, (texts,).
            at: an index of the grid.

        Returns:
            As `mean`.
        """
        size = self.prompts.max() + 1
        over, under = np.zeros((size, len(self.lams))), np.zeros((size, len(self.lams)))
        for prompt in range(size):
            of_prompt = self.prompts == prompt
            w, v = self.weights[of_prompt], values[of_prompt]
            beats = (v[:, None] > v) + 0.5 * (v[:, None] == v)
            others = 1.0 - np.eye(len(v))  # a text is not its own rival
            over[prompt] = w.T @ (beats * others) @ w[:, at]
            under[prompt] = w.T @ others @ w[:, at]
        with np.errstate(invalid="ignore"):
            return over.sum(0) / under.sum(0), (self._resampled @ over) / (self._resampled @ under)


def interval(draws: np.ndarray) -> np.ndarray:
    """95 % interval of bootstrap draws (DRAWS, …): its two bounds, (2, …)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")  # what no draw says anything of has no interval: NaN
        return np.nanquantile(draws, [0.025, 0.975], axis=0)


CURVE_COLUMNS = ("lambda", "ess", "known", "reward", "kl", "length", "wins_aligned", "wins_ref", "gain")
KNOWN = 0.25  # effective texts a prompt, below which a curve is drawn as unknown


def column_of(reward: str) -> str:
    """A reward's column in the curve: its name, or `<name>_reward` where `CURVE_COLUMNS` has that name already."""
    return f"{reward}_reward" if reward in CURVE_COLUMNS else reward
