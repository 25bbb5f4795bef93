r"""Rewards that check an answer: 1 where it is right, 0 where it is wrong or is none. Nothing of a text is ever run.

    answer:number[#COLUMN]   the number that a text ends at: in its last \boxed{}, else behind its last ####, else the
                             last one of all; equal to the column's, which is read in the same way
    answer:boxed[#COLUMN]    what stands in the last \boxed{} alone: equal as a number, else as written
    answer:choice[#COLUMN]   the letter of a multiple choice
    answer:python            a fenced block of Python is there, and all of them parse; takes no column

COLUMN is the prompt file's; without it the first of `COLUMNS` that its rows have. A column may hold a list of right
answers. What a reasoning model thinks ahead of `</think>` does not count; a thought that does not end holds no answer.

Numbers are equal as numbers, exactly: 1,234.50 is 1234.5, 1/2 and \frac{1}{2} are 0.5. Signs of currency, per cent and
units are not looked at. Expressions are not simplified: use a function for that.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import DeraError
from .exchanges import Exchange

COLUMNS = ("answer", "answerKey", "solution", "target", "label", "ground_truth", "final_answer")
CODE = 200_000  # characters of a text that are parsed, at most
_NUMBER = re.compile(
    r"(?<![\w.])[-+−–]?(?:\\?[$€£¥]\s*)?"  # a sign, unless it stands between two numbers; a currency
    r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?"  # 1,234.5e3
    r"(?:\s*/\s*\d+(?![\d./]))?"  # a half as 1/2
)
_FRACTION = re.compile(r"([-+−–]?)\s*\\[dt]?frac\s*\{?\s*([-+]?\d+)\s*\}?\s*\{?\s*(\d+)\s*\}?")
_SMALL = r"[b-hj-z]|[ai](?=[).:]|\W*$)"
_CHOICES = (
    # A small letter too, but "a" and "i" where they may be words.
    re.compile(rf"(?i:answer|option|choice)\b\W{{0,8}}(?i:is|would be)?\W{{0,8}}([A-Z]|{_SMALL})(?![\w'])"),
    re.compile(r"^[*\s]*([A-Z](?=[).:,]|\W*$)|[a-z](?=[).:]))"),
    re.compile(r"\(([A-Z])\)"),
    re.compile(r"\*\*\W?([A-Z])\W?\*\*"),
)
_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{[^{}]*\}|\\%|%|\^\{?\\circ\}?")
_BRACES = re.compile(r"(\\f?boxed\s*\{)|\{|(\})")
_FENCE = re.compile(r"\s*(```+|~~~+)\s*([\w+-]*)")
_PYTHON = ("", "python", "python3", "py")


@dataclass(frozen=True)
class Verified:
    """A scorer of texts that have a right answer.

    Attributes:
        name: for messages.
        column: which holds it; empty: the first of `COLUMNS` that is there.
        said: the answer that a text gives, None where it gives none.
        right: the answer that a column's value is; None where it is none.
        wants: what the column must hold, in words.
    """

    name: str
    column: str
    said: Callable[[str], Any]
    right: Callable[[Any], Any]
    wants: str

    @property
    def needs(self) -> str:
        """What to give for a pair of a prompt and a text."""
        column = self.column or COLUMNS[0]
        return (
            f"the reward {self.name} wants the right answer beside prompt and text: "
            f'dera_merge.texts.exchanges.Exchange(prompt, text, {{"{column}": …}})'
        )

    def check(self, texts: Sequence[Exchange]) -> None:
        """Raise DeraError where a prompt has no right answer."""
        for number, text in enumerate(texts, 1):
            column = self._column(text)
            if column is None:
                has = f"its other columns are {', '.join(text.columns)}" if text.columns else "it has no other columns"
                any_of = f"a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} (or name yours: {self.name}#COLUMN)"
                wanted = f"the column {self.column}" if self.column else any_of
                raise DeraError(f"the reward {self.name} wants {wanted}; prompt {number}: {has}")
            if not self._rights(text.columns[column]):
                held = " ".join(str(text.columns[column]).split())
                raise DeraError(
                    f"the reward {self.name} wants {self.wants} in column {column}; prompt {number} has {held!r:.80}"
                )

    def __call__(self, texts: Sequence[Exchange]) -> list[float | None]:
        """1 or 0 for each; None where its prompt has no right answer."""
        values: list[float | None] = []
        for text in texts:
            column = self._column(text)
            rights = self._rights(text.columns[column]) if column is not None else []
            thought = after_thought(text.completion)
            said = None if thought is None else self.said(thought)
            values.append(float(said is not None and said in rights) if rights else None)
        return values

    def _column(self, text: Exchange) -> str | None:
        wanted = (self.column,) if self.column else COLUMNS
        return next((name for name in wanted if text.columns.get(name) is not None), None)

    def _rights(self, value: Any) -> list[Any]:
        """The right answers in a column; none where one of them is unfit."""
        rights = [self.right(one) for one in (value if isinstance(value, list | tuple) else [value])]
        return [] if None in rights else rights


def after_thought(text: str) -> str | None:
    """What stands behind `</think>`; None where a thought has begun and not ended."""
    _, ended, answer = text.rpartition("</think>")
    return answer if ended or "<think>" not in text else None


def boxed(text: str) -> str | None:
    r"""What stands in the last whole \boxed{…}."""
    opened: list[int | None] = []  # where what is boxed begins, None for another brace
    last, inside = -1, None
    for brace in _BRACES.finditer(text):
        if not brace[2]:
            opened.append(brace.end() if brace[1] else None)
        elif opened and (start := opened.pop()) is not None and start > last:
            last, inside = start, text[start : brace.start()]
    return inside


def numbers_in(text: str) -> list[Fraction]:
    """All numbers of a text, in order."""
    text = _FRACTION.sub(lambda m: f" {m[1]}{m[2]}/{m[3]} ", text).replace("{,}", ",").replace("\\!", "")
    found = []
    for match in _NUMBER.finditer(text):
        plain = re.sub(r"[^\d./eE+-]", "", match[0].translate({0x2212: "-", 0x2013: "-"}))
        try:
            over, _, under = plain.partition("/")
            found.append(Fraction(over) / Fraction(under or 1))
        except (ValueError, ZeroDivisionError):  # nothing but a sign; x/0
            continue
    return found


def number_of(text: str) -> Fraction | None:
    """The number that a text ends at."""
    inside = boxed(text)
    if inside is None and "####" in text:
        inside = text.rpartition("####")[2].strip().partition("\n")[0]
    found = numbers_in(text if inside is None else inside)
    return found[-1] if found else None


def written(text: str) -> Fraction | str:
    """A boxed answer: a number where it is one, maybe with a unit, else as written, without spaces and dressing."""
    bare = _FRACTION.sub(r"\1\2/\3", _UNIT.sub("", text.replace("{,}", ",")).replace("$", "")).strip("{} .\n\t")
    if len(found := numbers_in(bare)) == 1 and not _NUMBER.sub("", bare):
        return found[0]
    plain = re.sub(r"\\(?:left|right|[,;:!])|\\(?:text|mathrm|mathbf|textbf|mbox)\s*(?=\{)|[\s$]", "", text).rstrip(".")
    plain = re.sub(r"\\[dt]frac", r"\\frac", plain)
    return plain[1:-1] if plain.startswith("{") and plain.find("}") == len(plain) - 1 else plain


def letter_of(text: str) -> str | None:
    """The letter that a text chooses."""
    if (inside := boxed(text)) is not None:
        letters = re.findall(r"(?<![A-Za-z\\])[A-Z](?![A-Za-z])", re.sub(r"\\[a-z]+\{", "{", inside))
        return letters[-1] if letters else None
    if re.fullmatch(r"\W*[a-z]\W*", text):
        return text.strip("\n\t .():*").upper() or None
    for form in _CHOICES:
        if found := form.findall(text.strip()):
            return found[-1].upper()
    return None


def _right_number(value: Any) -> Fraction | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            return Fraction(str(value))
        except ValueError:  # nan
            return None
    return number_of(value) if isinstance(value, str) else None


def _right_boxed(value: Any) -> Fraction | str | None:
    if isinstance(value, str) and value.strip():
        inside = boxed(value)
        return written(value if inside is None else inside)
    return _right_number(value)


def _right_letter(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 26:
        return chr(ord("A") + value)  # as MMLU counts
    plain = value.strip(" .()").upper() if isinstance(value, str) else ""
    return plain if re.fullmatch(r"[A-Z]", plain) else None


def parses(texts: Sequence[Exchange]) -> list[float]:
    """1 for each text that holds fenced Python, all of which parses. It is parsed, never run."""
    return [_parses(after_thought(text.completion) or "") for text in texts]


def _parses(text: str) -> float:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            blocks = [block for kind, block in _fenced(text[:CODE]) if kind.lower() in _PYTHON]
            for block in blocks:
                ast.parse(textwrap.dedent(block))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return float(any(block.strip() for block in blocks))


def _fenced(text: str) -> list[tuple[str, str]]:
    """The fenced blocks that end: language and content of each."""
    blocks, fence, kind, lines = [], "", "", []
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if not fence and found:
            fence, kind, lines = found[1], found[2], []
        elif fence and line.strip() == fence:
            blocks.append((kind, "".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    return blocks


KINDS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any], str]] = {
    "number": (number_of, _right_number, "a number"),
    "boxed": (lambda text: None if (inside := boxed(text)) is None else written(inside), _right_boxed, "an answer"),
    "choice": (letter_of, _right_letter, "a letter (or, in JSON, a number from 0; digits in a text may count from 1)"),
}


def verified(spec: str) -> Verified:
    """The scorer of `answer:KIND[#COLUMN]`. Raises DeraError where there is no such kind."""
    kind, _, column = spec.removeprefix("answer:").partition("#")
    if kind == "python":
        raise DeraError("answer:python takes no column: it asks whether code parses")
    if kind not in KINDS:
        known = [f"answer:{name}" for name in KINDS]
        raise DeraError(f"{spec!r} is no reward; answers are checked by {', '.join(known)} or answer:python")
    return Verified(f"answer:{kind}", column, *KINDS[kind])
