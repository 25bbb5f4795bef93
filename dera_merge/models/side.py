"""One model of a pair: a base checkpoint and, maybe, an adapter on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeraError, warn
from ..files.checkpoint import Checkpoint
from .adapter import Adapter
from .damage import leave_out_value_head
from .kinds import check_kind, config_of, text_config
from .quantized import quantised_tensor
from .source import Source, check_sizes, load_config
from .stacking import on_another, stacks, warn_of_one_base
from .trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, eq=False)
class Side:
    """The reference or an aligned model, as its files say; no weights.

    Attributes:
        source: what was typed.
        base: the full model: `source` itself, or what the adapter is put on.
        adapter: None where the side is a full model.
        checkpoint: of the base.
        config: the base's config.json.
        text: what it says of the text decoder, for its sizes.
        below: REF's adapter, where this side's is stacked on it.
    """

    source: Source
    base: Source
    adapter: Adapter | None
    checkpoint: Checkpoint
    config: dict[str, Any]
    text: dict[str, Any]
    below: tuple[Adapter, ...] = ()

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Its adapters, in the order in which they change the base."""
        return (*self.below, self.adapter) if self.adapter else ()

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the vocabulary that it has: its adapter's, or else those of the base; None where nothing says."""
        brought = [adapter.vocabulary_rows for adapter in self.adapters if adapter.vocabulary_rows]
        return brought[-1] if brought else self.text.get("vocab_size")

    @property
    def quantisation(self) -> str | None:
        """How the checkpoint is quantised: `fp8`, `gptq`, …; None where no tensor is, whatever its config says."""
        settings = self.config.get("quantization_config")
        if not settings or quantised_tensor(self.checkpoint.tensors) is None:
            return None
        return str(settings.get("quant_method", "quantised") if isinstance(settings, dict) else settings)

    def built_config(self, code: bool = False) -> PreTrainedConfig:
        """transformers' config of the base, without settings of a quantisation that no tensor has.

        Args:
            code: let transformers run code that comes with the checkpoint.

        Raises:
            DeraError: transformers does not know the model.
        """
        config = config_of(self.base.folder, Trust(code=code))
        if self.quantisation is None and hasattr(config, "quantization_config"):
            del config.quantization_config
        return config

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Everything that its weights are read from."""
        return [self.checkpoint, *(adapter.checkpoint for adapter in self.adapters)]


def open_sides(
    ref: Source, aligned: Iterable[Source], base: Source | None, trust: Trust, stack: bool | None = None
) -> tuple[Side, ...]:
    """The reference and each aligned model; a checkpoint that several stand on is opened once.

    Args:
        ref: a full model, or an adapter on the base that its config names.
        aligned: likewise; an adapter beside a full `ref` applies to `ref`, one on REF's adapter is stacked on it.
        base: the base of all adapters, where it is not to be the one that is named.
        trust: what may be read and run of the files.
        stack: whether aligned adapters stand on REF's; None: those whose config names REF do.

    Raises:
        DeraError: something is not what it should be, or has no weights that can be read.
    """
    opened: dict[Path, Checkpoint] = {}

    def open_side(source: Source, reference: Side | None) -> Side:
        adapter, home, below = None, source, ()
        if source.is_adapter:
            adapter = Adapter(source.folder, trust.pickle)
            if (source.folder / "config.json").is_file() and any(source.folder.glob("model*.safetensors")):
                warn(f"{source.name} holds an adapter and a full model; the adapter is read, as transformers does")
            on = reference.adapter if reference else None
            if on and stacks(adapter, source, on, reference.source, stack):
                home, below = reference.base, reference.adapters
            elif base:
                home = base
            elif reference and not reference.adapter:
                home = _same_base(adapter, source, reference.source)
            else:
                home = named_base(adapter, source, trust, reference)
            if on and stack is None and not below and home.folder == reference.base.folder:
                warn_of_one_base(adapter, source, on, reference.source)
        config = load_config(home)
        check_kind(home, config)
        if home.folder not in opened:
            opened[home.folder] = leave_out_value_head(Checkpoint(home.folder, allow_pickle=trust.pickle))
        text = text_config(home.folder, config, trust)
        check_sizes(home, text)
        return Side(source, home, adapter, opened[home.folder], config, text, below)

    if base and base.is_adapter:
        raise DeraError(f"--base {base.name} is an adapter; give the full model that the adapters were trained on")
    reference = open_side(ref, None)
    if stack and not reference.adapter:
        raise DeraError(f"--stack puts ALIGNED's adapter on REF's, but {ref.name} is a full model; an adapter beside "
                        "it applies to it without --stack")  # fmt: skip
    sides = reference, *(open_side(source, reference) for source in aligned)
    if stack and not any(side.below for side in sides):
        raise DeraError("--stack puts ALIGNED's adapter on REF's, but ALIGNED is a full model; leave --stack out")
    return sides


def named_base(adapter: Adapter, source: Source, trust: Trust, reference: Side | None = None) -> Source:
    """The base that an adapter names: relative to the adapter, then to the working directory, then a Hub id."""
    name = adapter.base_name
    if not name:
        raise DeraError(f"{source.name} does not say what model it adapts; pass --base")
    beside = source.folder / name
    try:
        base = Source.locate(beside if beside.is_dir() else name, trust=trust)
    except DeraError as error:
        if reference is None:
            raise DeraError(f"{source.name} names {name} as its base: {error}; --base names where it is") from error
        raise DeraError(f"{source.name} names {name} as its base: {error}; if that was REF's adapter merged into its "
                        "base, pass --stack; else --base names where it is") from error  # fmt: skip
    if not base.is_adapter:
        return Source(name, base.folder, base.revision)
    if reference is None:
        raise DeraError(f"{source.name} adapts {name}, which is an adapter itself; merge that into its base first "
                        f"(dera-merge merge BASE {base.address[0]} -l 1 -o DIR) and pass --base DIR")  # fmt: skip
    raise DeraError(on_another(source, base, reference.source, f"--stack if {reference.source.name} is a copy of it"))


def _same_base(adapter: Adapter, source: Source, ref: Source) -> Source:
    """REF as the base of an aligned adapter; warns where the adapter's config does not name it.

    Raises:
        DeraError: its config names an adapter.
    """
    name = adapter.base_name
    places = adapter.named_places()
    if name != ref.name and not any(place.resolve() == ref.folder for place in places):
        if places and (places[0] / "adapter_config.json").is_file():
            raise DeraError(on_another(source, Source(str(places[0]), places[0].resolve()), ref,
                                       f"--base {ref.name} if that is the model with that adapter in it"))  # fmt: skip
        warn(f"the adapter {adapter.folder} names {name or 'no model'} as its base; it is applied to REF ({ref.name})")
    return ref
