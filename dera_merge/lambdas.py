"""λ as people type it: `0.5`, `0.25,0.5`, `0:2:0.25`; and λ as files are named: `lambda-0.5`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation

LARGEST = 3.4e38  # logits are mixed in float32
MOST = 10_000  # a range with more points than this is a slip of the finger


def parse_lambdas(texts: Iterable[str]) -> list[float]:
    """Parse λ arguments: numbers, comma-separated lists, and ranges `start:stop:step` in decimal arithmetic.

    Returns:
        The values in the order given, duplicates dropped, -0 as 0.

    Raises:
        ValueError: not a number, not finite, a range that has a zero step or misses its end, or two values that `%g`
            prints alike.
    """
    values: dict[float, None] = {}
    for text in texts:
        for part in text.split(","):
            for number in _range(part.strip()) if ":" in part else [_number(part.strip())]:
                values[float(number) + 0.0] = None  # -0.0 + 0.0 is 0.0
    if not values:
        raise ValueError("no λ given")
    check_names(values)
    return list(values)


def check_names(lams: Iterable[float]) -> None:
    """Raise ValueError where two λ would get one name."""
    names: dict[str, float] = {}
    for lam in lams:
        if not math.isfinite(lam):
            raise ValueError(f"λ must be finite, not {lam}")
        if abs(lam) > LARGEST:
            raise ValueError(f"λ must be within ±{LARGEST:g}, not {lam:g}")
        if names.setdefault(name(lam), lam) != lam:
            raise ValueError(f"λ {names[name(lam)]!r} and {lam!r} are both called {name(lam)}; use fewer digits")


def name(lam: float) -> str:
    """λ as files and tables show it (`%g`)."""
    return f"{lam:g}"


def folder_name(lam: float) -> str:
    return f"lambda-{name(lam)}"


def _number(text: str) -> Decimal:
    try:
        value = Decimal(text if "_" not in text else "")
    except InvalidOperation:
        if "+" in text:
            raise ValueError(f"{text!r} is a λ for several aligned models, but there is one") from None
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
