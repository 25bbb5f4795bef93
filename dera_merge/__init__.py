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
    from .api import ModelPair
    from .calibrating.calibrate import calibrate
    from .choosing.bench import bench
    from .choosing.scores import Bench
    from .choosing.sweep import Sweep, sweep
    from .decoding.config import DeraConfig
    from .decoding.dial import DialForCausalLM
    from .decoding.exact import DeraForCausalLM
    from .decoding.plausibility import PlausibilityMask
    from .decoding.speculation import Speculation
    from .errors import DeraError, DeraWarning
    from .measuring.compare import compare
    from .measuring.report import Report
    from .merging.path import Curve
    from .publishing.push import push_to_hub
    from .texts import prompts
    from .texts.rewards import Reward, load_reward

__version__ = "0.2.0"

_HOMES = {
    "ModelPair": "api",
    "DeraForCausalLM": "decoding.exact",
    "DialForCausalLM": "decoding.dial",
    "DeraConfig": "decoding.config",
    "Speculation": "decoding.speculation",
    "PlausibilityMask": "decoding.plausibility",
    "compare": "measuring.compare",
    "Report": "measuring.report",
    "calibrate": "calibrating.calibrate",
    "Curve": "merging.path",
    "push_to_hub": "publishing.push",
    "Reward": "texts.rewards",
    "load_reward": "texts.rewards",
    "Bench": "choosing.scores",
    "bench": "choosing.bench",
    "Sweep": "choosing.sweep",
    "sweep": "choosing.sweep",
    "DeraError": "errors",
    "DeraWarning": "errors",
}
__all__ = [
    "Bench", "Curve", "DeraConfig", "DeraError", "DeraForCausalLM", "DeraWarning", "DialForCausalLM", "ModelPair",
    "PlausibilityMask",
    "Report", "Reward", "Speculation", "Sweep", "bench", "calibrate", "compare", "load_reward", "prompts",
    "push_to_hub", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: merging needs no transformers model, and `--help` needs no torch."""
    from importlib import import_module

    if name == "prompts":  # a module
        return import_module(".texts.prompts", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """What there is to complete, imported or not."""
    return sorted({*globals(), *__all__})
