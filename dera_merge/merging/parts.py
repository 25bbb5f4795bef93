"""λ for parts of a model: `mlp=0.8`, `layers.0-7=0.2`, and what no pattern matches at the λ of the whole.

A pattern is words joined by dots, and matches a tensor that has as many words of its name in a row: `mlp`, `layers.3`,
`self_attn.q_proj`. A word may be a range of numbers, `0-7`, and hold `*` and `?`. The last pattern that matches says a
tensor's λ. Which tensors those are is found once, when a pair and the patterns meet; after that it is a `path.Course`,
and goes where a learned path goes.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DeraError, warn
from ..files.atomic import json_bytes
from ..lambdas import Lam, folder_name, name, numbers
from ..models.names import layer_kind
from .path import Bend, Course

if TYPE_CHECKING:
    from ..models.pair import Pair

KIND = "by part"
_RANGE = re.compile(r"(\d+)-(\d+)", re.ASCII)
LONGEST = 80  # characters of a directory's name; of more, a hash stands there


def parse(pattern: str) -> Callable[[str], bool]:
    """What a pattern matches: a function of a tensor's name.

    Raises:
        ValueError: it is none.
    """
    tests = [_word(word, pattern) for word in pattern.split(".")]

    def matches(tensor: str) -> bool:
        words = tensor.split(".")
        starts = range(len(words) - len(tests) + 1)
        return any(all(test(words[start + n]) for n, test in enumerate(tests)) for start in starts)

    return matches


def _word(word: str, pattern: str) -> Callable[[str], bool]:
    """What one word of a pattern matches."""
    if not word or any(c.isspace() for c in word):
        raise ValueError(f"{pattern!r} is no pattern: words joined by dots, such as mlp, layers.0-7 or *norm*")
    if span := _RANGE.fullmatch(word):
        first, last = map(int, span.groups())
        if first > last:
            raise ValueError(f"{pattern!r}: the range {word} is empty; the smaller number comes first")
        return lambda text: text.isdecimal() and first <= int(text) <= last
    glob = re.compile(re.escape(word).replace(r"\*", ".*").replace(r"\?", "."))
    return lambda text: glob.fullmatch(text) is not None


@dataclass(frozen=True)
class ByPart:
    """λ of each tensor of one pair; make one with `of`.

    Attributes:
        rules: pattern and λ, in the order given.
        own: tensor → its λ, of those that a pattern matches.
        moving: λ of these that differ between the sides.
        rest: whether tensors that differ are left to the λ of the whole.
    """

    rules: tuple[tuple[str, Lam], ...]
    own: Mapping[str, Lam]
    moving: frozenset[Lam]
    rest: bool

    @classmethod
    def of(cls, pair: Pair, lambda_for: Mapping[str, float | Sequence[float]]) -> ByPart:
        """Find the tensors of each pattern.

        Raises:
            DeraError: a pattern is none, or matches no tensor.
        """
        rules, own = [], {}
        for pattern, lam in lambda_for.items():
            try:
                matches, (value,) = parse(pattern), pair.known([lam])
            except ValueError as error:
                raise DeraError(f"--lambda-for {pattern}: {error}") from None
            found = [tensor for tensor in pair.tensors if matches(tensor)]
            if not found:
                raise DeraError(_nothing(pattern, matches, pair))
            if all(map(pair.names.is_same, found)):
                warn(f"--lambda-for {pattern} changes nothing: all sides have the same {found[0]}"
                     + (f" and {len(found) - 1} more" if len(found) > 1 else ""))  # fmt: skip
            for word, last in _beyond(pattern, pair.tensors):
                warn(f"--lambda-for {pattern}: {word} goes on beyond {last}, which is the last there is")
            rules.append((pattern, value))
            own |= dict.fromkeys(found, value)
        changing = [tensor for tensor in pair.tensors if not pair.names.is_same(tensor)]
        moving = frozenset(own[tensor] for tensor in changing if tensor in own)
        return cls(tuple(rules), own, moving, any(tensor not in own for tensor in changing))

    @property
    def sha256(self) -> str:
        """SHA-256 of all that a merge depends on."""
        return hashlib.sha256(json_bytes(sorted(self.own.items()))).hexdigest()

    def check_lambda(self, lam: Lam) -> None:
        """Raises DeraError where λ asks for a change and every tensor that differs has λ = 0."""
        if any(numbers(lam)) and not any(any(numbers(value)) for value in self.used(lam)):
            raise DeraError(f"--lambda-for leaves nothing of λ={name(lam)}: all tensors that differ are at 0, the "
                            "reference")  # fmt: skip

    def used(self, lam: Lam) -> set[Lam]:
        """The λ that tensors are at which differ between the sides, where that of the whole is `lam`."""
        return {*self.moving, *([lam] if self.rest else [])}

    def at(self, tensor: str, lam: Lam) -> Bend | None:
        """A tensor's own λ; None where it is that of the whole."""
        return Bend(self.own[tensor]) if tensor in self.own else None

    def rank_at(self, tensor: str) -> int:
        """What it adds to an adapter's rank: nothing."""
        return 0

    def describe(self) -> dict[str, Any]:
        """What `dera_merge.json` and reports say of it."""
        rules = [f"{pattern}={'+'.join(map(_digits, numbers(lam)))}" for pattern, lam in self.rules]
        return {"kind": KIND, "sha256": self.sha256, "lambda_for": rules}


def along(
    pair: Pair, path: str | os.PathLike[str] | Course | None, lambda_for: Mapping[str, float | Sequence[float]] | None
) -> str | os.PathLike[str] | Course | None:
    """What a merge follows: `path`, or one λ for each part. Raises DeraError where both are given."""
    if not lambda_for:
        return path
    if path is not None:
        raise DeraError("--path was learned for one λ in all tensors; leave it out with --lambda-for")
    return ByPart.of(pair, lambda_for)


def _digits(value: float) -> str:
    """A number as people type it, all of it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def rules_of(described: Any) -> list[str]:
    """The patterns and their λ in what a recipe or a report says of its path; none where it has one λ."""
    return described["lambda_for"] if isinstance(described, dict) and described.get("kind") == KIND else []


def output_name(lam: Lam, described: Any) -> str:
    """`lambda-0.5`, and behind it the parts that have another λ: `lambda-0.5_mlp-0.8`."""
    rules = [re.sub(r"[^\w.+-]", "-", rule, flags=re.ASCII) for rule in rules_of(described)]
    whole = "_".join([folder_name(lam), *rules])
    return whole if len(whole) <= LONGEST else f"{folder_name(lam)}_parts-{described['sha256'][:8]}"


def _beyond(pattern: str, tensors: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Ranges of a pattern that run past the last number in their place, and that number."""
    words = pattern.split(".")
    for at, word in enumerate(words):
        if span := _RANGE.fullmatch(word):
            tests = [_word(before, pattern) for before in words[:at]]
            rows = (tensor.split(".") for tensor in tensors)
            last = max(
                int(row[start + at])
                for row in rows
                for start in range(len(row) - at)
                if row[start + at].isdecimal() and all(test(row[start + n]) for n, test in enumerate(tests))
            )
            if last < int(span[2]):
                yield word, last


def _nothing(pattern: str, matches: Callable[[str], bool], pair: Pair) -> str:
    """Why a pattern matches no tensor, and what is near."""
    for tied, owner in pair.architecture.tied.items():
        if matches(tied):
            return f"--lambda-for {pattern}: {tied} is {owner}, one tensor for both; name that"
    near = difflib.get_close_matches(pattern, sorted(_known(pair.tensors)), 4, 0.5)
    says = f"near are {', '.join(near)}" if near else f"one is called {next(iter(pair.tensors))}"
    return f"--lambda-for {pattern} matches no tensor of this model; {says}"


def _known(tensors: Iterable[str]) -> set[str]:
    """What parts of a model are called."""
    known = set()
    for tensor in tensors:
        words = tensor.split(".")
        known |= {layer_kind(tensor), *(word for word in words if not word.isdecimal())}
        known |= {f"{word}.{number}" for word, number in itertools.pairwise(words) if number.isdecimal()}
    return known
