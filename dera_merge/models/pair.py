"""A reference and its aligned models that belong together: a value, found and checked from files alone.

`Pair.from_pretrained` finds all sides (directories or Hub ids, full checkpoints or adapters) and checks that they fit.
`names`, made when it is first asked for and never changed, says where each tensor of θ(λ) is on every side; both forms
of the paper need it. Nothing here loads a model; `api.ModelPair` is this with a method for each thing to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from .. import lambdas
from ..errors import DeraError, warn
from ..files.checkpoint import TensorInfo
from . import tokenizer
from .architecture import Architecture
from .checks import base_quantization_of, check_apart, check_configs, check_files
from .ends import Ending, Told, ending
from .layout import Layout
from .names import Names, is_requantised, match
from .processor import load_processor, processor_files
from .side import Side, open_sides
from .source import CONTEXT, Source
from .trust import NOTHING, Trust

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin


NewTokens = Literal["aligned", "refuse"]


@dataclass(frozen=True, eq=False)
class Pair:
    """A reference model and an aligned model, or several; make one with `from_pretrained`.

    With several aligned models λ is a vector: h_ref + Σ λ_k·(h_k - h_ref) exactly, θ_ref + Σ λ_k·Δ_k in weight space.

    Attributes:
        sides: the reference, and each aligned model.
        base_quantization: what the adapters' base was quantised to when they were trained; None and `"none"`: nothing.
        trust: what may be read and run of the files.
        new_tokens: what becomes of tokens that only ALIGNED has.
    """

    sides: tuple[Side, ...]
    base_quantization: str | None = None
    trust: Trust = NOTHING
    new_tokens: NewTokens = "refuse"

    @classmethod
    def from_pretrained(
        cls,
        ref: str | os.PathLike[str],
        aligned: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        base: str | os.PathLike[str] | None = None,
        base_quantization: str | None = None,
        stack: bool | None = None,
        new_tokens: NewTokens = "refuse",
        ref_revision: str | None = None,
        aligned_revision: str | None = None,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> Self:
        """Open a pair. Each side is a full checkpoint or a PEFT adapter, a local directory or a Hub id (`id@revision`).

        Args:
            ref: the reference (SFT) model.
            aligned: the aligned (DPO, RLHF, …) model, or several. An adapter beside a full `ref` applies to `ref`.
            base: the base model of adapters, where the one that their config names is not to be used.
            base_quantization: what the adapters' base was quantised to when they were trained: `"nf4"`, `"nf4-double"`
                (QLoRA's), `"fp4"`, `"fp4-double"`; the reference is then dequant(base). None takes what the adapters'
                configs record, `"none"` the base as it is.
            stack: whether adapters of ALIGNED were trained on top of REF's adapter, so that an aligned model is REF's
                adapter plus its own. None: where an adapter's config names REF; a warning where nothing says so.
            new_tokens: what becomes of tokens that ALIGNED's tokenizer has and REF has no rows for. `"refuse"`: only
                λ=1 is merged. `"aligned"`: ALIGNED's rows stand at every λ; exact decoding mixes log-probabilities
                then, as `mix.on_new_rows` defines.
            ref_revision: the reference's revision on the Hub.
            aligned_revision: the aligned model's; several name theirs as `id@revision`.
            allow_pickle: read `.bin` files where there is no safetensors file (never without `weights_only=True`).
            trust_remote_code: let transformers run code that comes with the checkpoints.

        Raises:
            DeraError: one of them cannot be found or read, or they do not belong together.
        """
        trust = Trust(allow_pickle, trust_remote_code)
        names = [aligned] if isinstance(aligned, str | os.PathLike) else list(aligned)
        if not names:
            raise DeraError("no aligned model is given")
        if len(names) > 1 and aligned_revision:
            raise DeraError("aligned_revision is for one aligned model; write several as id@revision")
        sources = [Source.locate(ref, ref_revision, trust)]
        sources += [Source.locate(name, aligned_revision, trust) for name in names]
        home = None if base is None else Source.locate(base, trust=trust)
        sides = open_sides(sources[0], sources[1:], home, trust, stack)
        quantised = base_quantization_of(sides, base_quantization)
        for side in sides:
            check_files(side)
        for side in sides[1:]:
            check_configs(sides[0], side, trust)
            check_apart(sides[0], side)
            tokenizer.check_tokenizers(sides[0], side, trust)
        pair = cls(sides, quantised, trust, new_tokens)
        if new_tokens == "aligned" and pair.brings_tokens:
            pair.only_pair("--new-tokens aligned is")
        elif new_tokens == "aligned" and (pair.ref.vocabulary_rows or 0) > (pair.aligned.vocabulary_rows or 0):
            warn("ALIGNED has no tokens that REF lacks, only REF has some; --new-tokens aligned changes nothing")
        return pair

    # The sides

    @property
    def ref(self) -> Side:
        """The reference."""
        return self.sides[0]

    @property
    def aligned(self) -> Side:
        """The aligned model; of several, the first."""
        return self.sides[1]

    @property
    def models(self) -> int:
        """How many aligned models there are."""
        return len(self.sides) - 1

    @property
    def aligned_name(self) -> str:
        """What reports call the aligned model, or all of them."""
        return " + ".join(side.source.name for side in self.sides[1:])

    @property
    def shared_base(self) -> bool:
        """Whether all sides stand on the same base checkpoint: LoRA adapters."""
        return len({side.checkpoint.folder for side in self.sides}) == 1

    @property
    def stacked(self) -> bool:
        """Whether an aligned adapter stands on REF's."""
        return any(side.below for side in self.sides)

    @property
    def requantises(self) -> bool:
        """Whether adapters' bases, and REF, are taken as in training: in 4 bits and back."""
        return self.base_quantization not in (None, "none")

    def is_requantised(self, side: Side) -> bool:
        """Whether that is so of a side: not of an aligned model that is a full checkpoint."""
        return self.requantises and is_requantised(side, self.ref)

    def only_pair(self, what: str) -> None:
        """Raise DeraError where there are several aligned models; `what` begins the message: `--engine is`, say."""
        if self.models > 1:
            raise DeraError(f"{what} for one aligned model; there are {self.models}")

    # λ

    def known(self, lams: Iterable[Any]) -> list[lambdas.Lam]:
        """Check λ that a program gives, a number or a vector each, and return them as this pair takes them.

        Raises:
            ValueError: not finite, a vector of another length than there are aligned models, given twice, or two with
                one name.
        """
        values = [lambdas.known(lam, self.models) for lam in lams]
        lambdas.check_names(values)
        if twice := [lam for lam in values if values.count(lam) > 1]:
            raise ValueError(f"λ {lambdas.name(twice[0])} is given twice")
        return values

    def ends(self) -> list[lambdas.Lam]:
        """λ of the reference and of each aligned model alone."""
        return lambdas.ends(self.models)

    # Tensors

    @cached_property
    def architecture(self) -> Architecture:
        """REF's architecture."""
        return Architecture.of(self.ref.base.folder, self.trust)

    @cached_property
    def names(self) -> Names:
        """Where each tensor of θ(λ) is on every side.

        Raises:
            DeraError: the sides' weights cannot be put in correspondence, or are quantised.
        """
        quantised = self.base_quantization if self.requantises else None
        return match(self.sides, lambda: self.architecture, quantised, self.trust, self.brings_tokens)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of θ(λ), in REF's names, shapes and dtypes. Raises as `names` does."""
        return self.names.tensors

    @cached_property
    def layout(self) -> Layout:
        """How the tensors of θ(λ) become those of REF's model in memory. Raises as `names` does."""
        return self.architecture.layout(self.tensors)

    # Tokenizer, generation config, sizes

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer and chat template come from: ALIGNED if it brings them, else REF.

        Raises:
            DeraError: neither brings one.
        """
        if (folder := tokenizer.tokenizer_folder((self.aligned, self.ref))) is None:
            raise DeraError(f"neither {self.ref.source.name} nor {self.aligned.source.name} brings a tokenizer")
        return folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left as generation needs it."""
        loaded = tokenizer.load_tokenizer(self.tokenizer_folder, self.ref.base.folder, self.trust)
        loaded.padding_side = "left"
        if loaded.pad_token is None:
            loaded.pad_token = loaded.eos_token or next(iter(loaded.get_vocab()))
        return loaded

    @cached_property
    def processor(self) -> ProcessorMixin:
        """What turns images and messages into a model's inputs: ALIGNED's if it brings one, else REF's.

        Raises:
            DeraError: neither brings one, or it cannot be loaded.
        """
        if not (files := processor_files((self.aligned, self.ref))):
            raise DeraError(
                f"neither {self.ref.source.name} nor {self.aligned.source.name} brings a processor for images"
            )
        return load_processor(files[0].parent, self.tokenizer, self.trust)

    @cached_property
    def brings_tokens(self) -> bool:
        """Whether an aligned model's tokenizer uses rows of the vocabulary that REF does not have."""
        rows = self.ref.vocabulary_rows
        return any(self._brings_tokens(side, rows) for side in self.sides[1:])

    def _brings_tokens(self, side: Side, rows: int | None) -> bool:
        """Whether a side's tokenizer has ids beyond REF's `rows` of the vocabulary."""
        side_rows = side.vocabulary_rows
        if rows is None or side_rows is None or side_rows <= rows:
            return False
        folder = tokenizer.tokenizer_folder((side, self.ref)) or self.tokenizer_folder
        loaded = tokenizer.load_tokenizer(folder, self.ref.base.folder, self.trust)
        return max(loaded.get_vocab().values()) >= rows

    def check_tokens(self, lams: Iterable[lambdas.Lam] = (), merged: bool = True) -> None:
        """Raise DeraError where ALIGNED has tokens that REF has no rows for, and what to do with them is not said.

        Args:
            lams: λ that are wanted.
            merged: in weight space, where ALIGNED alone is plain.
        """
        if self.brings_tokens and self.new_tokens == "refuse" and not (merged and {*lams} == {1.0}):
            alone = "only λ=1 can be merged" if merged else "use ALIGNED alone (λ=1)"
            raise DeraError(f"ALIGNED's tokenizer has tokens that REF has no embedding for; {alone}, or pass "
                            "--new-tokens aligned: ALIGNED's rows at every λ")  # fmt: skip

    @cached_property
    def _told(self) -> list[Told]:
        return [Told(side) for side in self.sides]

    def ending(self, lam: lambdas.Lam | None = None, say: bool = False) -> Ending:
        """Generation config and end tokens at λ; arguments as for `ends.ending`."""
        return ending(self._told, lam, say)

    def ends_beyond_base(self) -> list[int]:
        """End tokens that some side's files name, and not those of REF's base alone, which adapters are served over."""
        named = dict.fromkeys(token for told in self._told for token in told.all)
        return [token for token in named if token not in self._told[0].of_base]

    def generation_config(self) -> GenerationConfig | None:
        """transformers' own, for a model of which λ is turned: it ends where any side does. None where nothing says so.

        Raises:
            DeraError: a generation config is none.
        """
        from transformers import GenerationConfig

        if not (settings := self.ending().generation):
            return None
        try:
            return GenerationConfig.from_dict(settings)
        except (ValueError, TypeError, AttributeError) as error:
            raise DeraError(f"the generation config of {self.aligned.source.name} or {self.ref.source.name} "
                            f"is none that transformers takes: {error}") from error  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that all models have; with ALIGNED's new tokens at every λ, ALIGNED's.

        Raises:
            DeraError: no config says how many.
        """
        if self.brings_tokens and self.new_tokens == "aligned":
            return self.aligned.vocabulary_rows
        if sizes := [rows for side in self.sides if (rows := side.vocabulary_rows)]:
            return min(sizes)
        raise DeraError(f"{self.ref.base.name}/config.json states no vocab_size; add it: the rows of its embeddings")

    @property
    def context_length(self) -> int | None:
        """How many tokens all models take; None where their configs do not say."""
        return min((side.text[key] for side in self.sides for key in CONTEXT if side.text.get(key)), default=None)

    def opened_as(self) -> dict[str, Any]:
        """What `from_pretrained` needs to open this pair again."""
        homes = {side.base.folder: side.base for side in self.sides if side.adapter}
        aligned = [side.source.pinned for side in self.sides[1:]]
        opened: dict[str, Any] = {
            "ref": self.ref.source.pinned,
            "aligned": aligned[0] if len(aligned) == 1 else aligned,
        }
        # Left out for an adapter beside its base, and where each adapter stands on the base that it names itself.
        if len(homes) == 1 and homes.keys() != {self.ref.source.folder}:
            opened["base"] = next(iter(homes.values())).pinned
        if on_top := {bool(side.below) for side in self.sides[1:] if side.adapter and self.ref.adapter}:
            opened |= {"stack": on_top.pop()} if len(on_top) == 1 else {}
        if self.brings_tokens:
            opened["new_tokens"] = self.new_tokens
        if self.base_quantization:
            opened["base_quantization"] = self.base_quantization
        return opened
