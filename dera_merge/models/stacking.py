"""Adapters on adapters: whether ALIGNED's adapter stands on REF's, beside it, or is it trained further.

SFT by an adapter and then DPO by another leaves three layouts. DPO went on with the SFT adapter: then ALIGNED is the
base and its own adapter. Or DPO trained a new adapter on top of the SFT adapter, and its config names that, or the
model that it was merged into, or the base: then ALIGNED is the base and both adapters.
"""

from __future__ import annotations

import shlex

from ..errors import warn
from .adapter import Adapter
from .source import Source

_ALIKE = 0.7  # cosine of two adapters' B above which one is the other trained further; new ones begin with B = 0
_LOOKED_AT = 8  # modules


def stacks(adapter: Adapter, source: Source, below: Adapter, ref: Source, stack: bool | None) -> bool:
    """Whether an aligned adapter stands on the reference's.

    Args:
        adapter, source: of the aligned model.
        below, ref: the reference's adapter, and what was typed for it.
        stack: what the user says; None leaves it to the adapter's config, which may name the reference.
    """
    if stack is not True:
        return stack is None and _names(adapter, ref)
    if is_further_trained(adapter, below):
        warn(f"{source.name} looks like {ref.name} trained further, and --stack puts it on top of that again; "
             "without --stack it stands alone")  # fmt: skip
    return True


def on_another(source: Source, named: Source, ref: Source, otherwise: str) -> str:
    """What to say where an aligned adapter was trained on an adapter that is not REF."""
    place, _ = named.address
    typed = shlex.join(["dera-merge", "merge", place, source.name])
    return (f"{source.name} was trained on {place}, an adapter itself, which is not REF ({ref.name}); give that "
            f"as REF ({typed} …), or pass {otherwise}")  # fmt: skip


def warn_of_one_base(adapter: Adapter, source: Source, below: Adapter, ref: Source) -> None:
    """Warn where two adapters have one base and nothing says whether one was trained on top of the other."""
    if not is_further_trained(adapter, below):
        warn(f"{ref.name} and {source.name} are adapters of one base, and nothing says whether the second "
             "was trained with the first in place; it is taken to stand alone. --stack puts it on REF's adapter, "
             "--no-stack hides this line")  # fmt: skip


def is_further_trained(adapter: Adapter, other: Adapter) -> bool:
    """Whether an adapter began as another one: the B of both, which begin at zero, point the same way."""
    keys = sorted(key for key in adapter.checkpoint.tensors.keys() & other.checkpoint.tensors.keys() if "lora_B" in key)
    dot = squares = others = 0.0
    for key in keys[:_LOOKED_AT]:
        one, two = (side.checkpoint.read_whole(key).flatten().double() for side in (adapter, other))
        if one.shape != two.shape:
            return False
        dot, squares, others = dot + float(one @ two), squares + float(one @ one), others + float(two @ two)
    return bool(squares and others) and dot > _ALIKE * (squares * others) ** 0.5


def _names(adapter: Adapter, ref: Source) -> bool:
    """Whether the base that an adapter names is REF."""
    if any(place.resolve() == ref.folder for place in adapter.named_places()):
        return True
    return adapter.base_name is not None and adapter.base_name == ref.name.partition("@")[0]
