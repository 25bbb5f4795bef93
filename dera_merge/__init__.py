"""Turn alignment strength λ at decoding time, exactly or in one model, and measure the distance between the two.

    from dera_merge import ModelPair, compare

    pair = ModelPair.from_pretrained("my-sft", "my-dpo-lora")
    exact = pair.exact(lam=0.5)                        # two models, any λ: exact DeRa
    fast = pair.merged(lam=0.5)                        # one model: θ_ref + λΔ
    compare(pair, [0.5], prompts=prompts).save("out")  # how far apart they are
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import calibrate
    from .configuration import DeraConfig
    from .curve import Curve
    from .errors import DeraError, DeraWarning
    from .exact import DeraForCausalLM, DialForCausalLM
    from .fidelity import Report, compare
    from .hub import push_to_hub
    from .pair import ModelPair
    from .plausibility import PlausibilityMask
    from .rewards import Reward, load_reward
    from .selection import Sweep, sweep
    from .speculation import Speculation

__version__ = "0.1.0"

_HOMES = {
    "ModelPair": "pair", "DeraForCausalLM": "exact", "DialForCausalLM": "exact", "DeraConfig": "configuration",
    "Speculation": "speculation", "PlausibilityMask": "plausibility", "compare": "fidelity", "Report": "fidelity",
    "calibrate": "calibration", "Curve": "curve", "push_to_hub": "hub", "Reward": "rewards", "load_reward": "rewards",
    "Sweep": "selection", "sweep": "selection", "DeraError": "errors", "DeraWarning": "errors",
}  # fmt: skip
__all__ = [
    "Curve", "DeraConfig", "DeraError", "DeraForCausalLM", "DeraWarning", "DialForCausalLM", "ModelPair", "PlausibilityMask",
    "Report", "Reward", "Speculation", "Sweep", "calibrate", "compare", "load_reward", "push_to_hub", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: merging needs no transformers model, and `--help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
