"""λ as people type it (`0.5`, `0.25,0.5`, `0:2:0.25`, `0.5+0.25` for two models), and as files are named."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

LARGEST = 3.4e38  # logits are mixed in float32
MOST = 10_000  # a range with more points than this is a slip of the finger


_JOINED = re.compile(r"(?<=[\d.])\s*\+")  # not the + of 1e+05


class Vector(tuple[float, ...]):
    """λ of several aligned models, one number for each. `f"{lam:g}"` is its name, `0.5+0.25`; JSON has it as a list."""

    def __format__(self, spec: str) -> str:
        return "+".join(format(value, spec) for value in self)


Lam = float | Vector


def parse_lambdas(texts: Iterable[str], models: int = 1) -> list[Lam]:
    """Parse λ arguments: numbers, comma-separated lists, and ranges `start:stop:step` in decimal arithmetic.

    Args:
        texts: the arguments.
        models: how many aligned models there are. With several, each λ is that many numbers or ranges joined by `+`,
            and ranges give every combination.

    Returns:
        The values in the order given, duplicates dropped, -0 as 0.

    Raises:
        ValueError: not a number, not finite, a range that has a zero step or misses its end, a λ for another number of
            aligned models, or two values that `%g` prints alike.
    """
    values: dict[Lam, None] = {}
    for text in texts:
        for part in text.split(","):
            words = [word.strip() for word in _JOINED.split(part.strip())]
            if len(words) != models and len(words) > 1:
                raise ValueError(f"{part.strip()!r} is a λ for {len(words)} models, but there {_are(models)}")
            if len(words) != models:
                raise ValueError(
                    f"{part.strip()!r} is one number, but there {_are(models)}; join as many by +: 0.5+0.25"
                )
            each = [_range(word) if ":" in word else [_number(word)] for word in words]
            if math.prod(map(len, each)) > MOST:
                raise ValueError(f"{part.strip()!r} has more than {MOST} values")
            for numbers in itertools.product(*each):
                floats = [float(number) + 0.0 for number in numbers]  # -0.0 + 0.0 is 0.0
                values[floats[0] if models == 1 else Vector(floats)] = None
    if not values:
        raise ValueError("no λ given")
    check_names(values)
    return list(values)


def width(text: str) -> int:
    """How many aligned models a λ is for, as it is typed."""
    return len(_JOINED.split(text.strip()))


def _are(models: int) -> str:
    return "is one aligned model" if models == 1 else f"are {models} aligned models"


def known(lam: Any, models: int = 1) -> Lam:
    """One λ from a program: a number, or as many in a sequence as there are aligned models.

    Raises:
        ValueError: it has another number of them.
    """
    numbers = [float(value) + 0.0 for value in (lam if isinstance(lam, Sequence) else [lam])]
    if len(numbers) != models:
        raise ValueError(f"λ {lam!r} has {len(numbers)} numbers, but there {_are(models)}")
    return numbers[0] if models == 1 else Vector(numbers)


def loaded(lam: Any) -> Any:
    """λ as JSON has it."""
    return Vector(lam) if isinstance(lam, list) else lam


def numbers(lam: Lam) -> tuple[float, ...]:
    """λ of each aligned model."""
    return tuple(lam) if isinstance(lam, Vector) else (lam,)


def ends(models: int = 1) -> list[Lam]:
    """λ of the reference and of each aligned model alone."""
    if models == 1:
        return [0.0, 1.0]
    return [Vector(float(k == number) for k in range(1, models + 1)) for number in range(models + 1)]


def is_end(lam: Lam) -> bool:
    """Whether λ is that of the reference or of one aligned model alone, where every path is exact."""
    return sorted(numbers(lam))[:-1] == [0.0] * (len(numbers(lam)) - 1) and max(numbers(lam)) in (0.0, 1.0)


def check_names(lams: Iterable[Lam]) -> None:
    """Raise ValueError where two λ would get one name."""
    names: dict[str, Lam] = {}
    for lam in lams:
        for number in numbers(lam):
            if not math.isfinite(number):
                raise ValueError(f"λ must be finite, not {number}")
            if abs(number) > LARGEST:
                raise ValueError(f"λ must be within ±{LARGEST:g}, not {number:g}")
        if names.setdefault(name(lam), lam) != lam:
            raise ValueError(f"λ {names[name(lam)]!r} and {lam!r} are both called {name(lam)}; use fewer digits")


def name(lam: Lam) -> str:
    """λ as files and tables show it (`%g`)."""
    return f"{lam:g}"


def folder_name(lam: Lam) -> str:
    return f"lambda-{name(lam)}"


def _number(text: str) -> Decimal:
    try:
        value = Decimal(text if "_" not in text else "")
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a number, a list 0.25,0.5 or a range 0:2:0.25") from None
    if not value.is_finite() or not math.isfinite(float(value)):
        raise ValueError(f"λ must be finite, not {text}")
    return value


def _range(text: str) -> list[Decimal]:
    parts = text.split(":")
    if len(parts) != 3:
        raise ValueError(f"{text!r} is not a range start:stop:step")
    start, stop, step = map(_number, parts)
    if step == 0:
        raise ValueError(f"the range {text} has a zero step")
    try:
        count = (stop - start) / step
    except ArithmeticError:
        raise ValueError(f"the range {text} has more than {MOST} values") from None
    if count < 0 or count != count.to_integral_value():
        raise ValueError(f"the range {text} does not hit its end")
    if count > MOST:
        raise ValueError(f"the range {text} has more than {MOST} values")
    return [start + step * n for n in range(int(count) + 1)]
