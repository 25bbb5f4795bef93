"""What several commands take, declared once: types of options, and the pair that most commands begin with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from .. import lambdas
from .help import how, trust, what, where
from .show import json_alone

if TYPE_CHECKING:
    from ..api import ModelPair

Rounding = Literal["stochastic", "nearest"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Mode = Literal["exact", "merged", "speculative"]
BaseQuantisation = Literal["none", "nf4", "nf4-double", "fp4", "fp4-double"]

_REF = "Reference model: a directory or a Hub id (id@revision)."
_ALIGNED = "Aligned model: a full checkpoint or a PEFT adapter."
Ref = Annotated[str, typer.Argument(metavar="REF", help=_REF)]
Aligned = Annotated[str, typer.Argument(metavar="ALIGNED", help=_ALIGNED)]
MaybeRef = Annotated[str | None, typer.Argument(metavar="REF", help=_REF)]
MaybeAligned = Annotated[str | None, typer.Argument(metavar="ALIGNED", help=_ALIGNED)]
Lambdas = Annotated[
    list[str],
    what("-l", "--lambda", metavar="λ", help="A number, a list 0.25,0.5 or a range 0:2:0.25; repeatable."),
]
OneLambda = Annotated[list[str], what("-l", "--lambda", metavar="λ", help="A number.")]
LambdaFor = Annotated[
    list[str] | None,
    what(metavar="PART=λ", help="λ of a part: mlp=0.8, layers.0-7=0.2; repeatable, the last that fits counts."),
]
More = Annotated[
    list[str] | None,
    what("--aligned", help="A further aligned model, repeatable; λ is then a vector: 0.5+0.25."),
]
Base = Annotated[str | None, what(help="Base model of adapters, instead of the one that their config names.")]
BaseQuantization = Annotated[
    BaseQuantisation | None,
    what(help="What the adapter's base was quantised to in training; REF is then that."),
]
Stack = Annotated[
    bool | None,
    what("--stack/--no-stack", help="ALIGNED's adapter was trained on top of REF's (or not: no warning then)."),
]
NewTokens = Annotated[
    Literal["aligned", "refuse"],
    what(help="Tokens that only ALIGNED has: its rows at every λ (docs/theory.md), or refused but at λ=1."),
]
AllowPickle = Annotated[bool, trust("--allow-pickle", help="Read .bin files (with weights_only=True).")]
TrustRemoteCode = Annotated[bool, trust("--trust-remote-code", help="Let transformers run code from checkpoints.")]
AsJson = Annotated[bool, where("--json", callback=json_alone, help="Print exactly one JSON object on stdout.")]
Resume = Annotated[bool, where("--resume", help="Go on with what an interrupted run left.")]
Overwrite = Annotated[bool, where("--overwrite", help="Throw away what an earlier run left.")]
Seed = Annotated[int, how(min=0, max=2**32 - 1, help="Seed of sampling and of stochastic rounding.")]
PathFile = Annotated[Path | None, how("--path", help="A path that calibrate learned, instead of the line.")]
_PROMPTS = "JSON (Lines), CSV, TSV, parquet or text lines; a directory; or a data set of the Hub, ID:SPLIT."
Prompts = Annotated[str, what(metavar="FILE", help=_PROMPTS)]
MaybePrompts = Annotated[str | None, what(metavar="FILE", help=f"{_PROMPTS} Default: 32 general ones.")]
OwnPrompts = Annotated[str | None, what(metavar="FILE", help=f"{_PROMPTS} Default: REF writes some.")]
Limit = Annotated[int | None, what(min=1, help="Read this many prompts at most.")]
SampleEngine = Annotated[
    str | None, where("--engine", help="Sample by vLLM: the address of a server of export-exact's DIR, or vllm.")
]
BatchSize = Annotated[int | None, where(min=1, help="Texts that a model takes at a time. Default: as many as fit.")]
MaxMemory = Annotated[
    str | None, where(metavar="SIZE", help="What models may take: 8GB. Default: what is free. Above: in ways that fit.")
]
ComputeDtype = Annotated[Dtype, how(help="auto: float32, or bfloat16 where only that fits in free memory.")]
Device = Annotated[str, where(help="auto, cpu, cuda, cuda:1, mps, …")]
Devices = Annotated[str, where(help="auto, cpu, cuda, cuda:1, mps, …; spread: layers over all GPUs.")]


@dataclass(frozen=True)
class Given:
    """The models that a command was given, as they were typed, and whether its result is to be JSON."""

    ref: str | None
    aligned: str | None
    more: list[str] | None = None
    base: str | None = None
    base_quantization: BaseQuantisation | None = None
    stack: bool | None = None
    new_tokens: Literal["aligned", "refuse"] = "refuse"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    as_json: bool = False

    @property
    def models(self) -> int:
        """How many aligned models there are."""
        return 1 + len(self.more or ())

    @property
    def names(self) -> dict[str, Any]:
        """What JSON says of them."""
        return {"ref": self.ref, "aligned": [self.aligned, *self.more] if self.more else self.aligned}

    @property
    def how(self) -> list[str]:
        """The words of a command line that say how they are read."""
        words = ["--base-quantization", self.base_quantization] if self.base_quantization else []
        words += [] if self.stack is None else ["--stack" if self.stack else "--no-stack"]
        words += ["--new-tokens", self.new_tokens] if self.new_tokens != "refuse" else []
        return words + ["--allow-pickle"] * self.allow_pickle + ["--trust-remote-code"] * self.trust_remote_code

    @property
    def words(self) -> list[str]:
        """The words of a command line that give these models."""
        more = [word for model in self.more or () for word in ("--aligned", model)]
        return [self.ref, self.aligned, *more, *(["--base", self.base] if self.base else []), *self.how]

    def open(self) -> ModelPair:
        """The pair, checked. Raises DeraError where the models do not belong together."""
        from ..api import ModelPair

        return ModelPair.from_pretrained(
            self.ref, [self.aligned, *(self.more or ())], base=self.base, base_quantization=self.base_quantization,
            stack=self.stack, new_tokens=self.new_tokens, allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def lams(self, texts: list[str]) -> list[Any]:
        """λ as typed, for as many aligned models as there are."""
        return parse(texts, self.models)

    def lambda_for(self, texts: list[str] | None) -> dict[str, Any] | None:
        """λ of parts of the model as typed, `PART=λ`; None where there are none. Raises BadParameter."""
        rules: dict[str, Any] = {}
        for text in texts or ():
            pattern, equals, lam = text.rpartition("=")
            if not (pattern and equals):
                raise typer.BadParameter(f"{text!r} is no PART=λ, such as mlp=0.8", param_hint="--lambda-for")
            rules.pop(pattern, None)  # the last one stands last
            rules[pattern] = parse_one([lam], self.models, "--lambda-for")
        return rules or None

    def lam(self, texts: list[str]) -> Any:
        """The one λ of a command that takes one."""
        return parse_one(texts, self.models)


def with_models(
    ref: Any = Ref, aligned: Any = Aligned, several: bool = False, base_quantization: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command REF and ALIGNED before its own parameters, and the options of models behind them.

    The command's first parameter is the `Given` that these make.

    Args:
        ref, aligned: the types of REF and ALIGNED; one that may be None need not be given.
        several: take further aligned models.
        base_quantization: take what the base was quantised to.
    """
    ahead = {"ref": (ref, ... if ref is Ref else None), "aligned": (aligned, ... if aligned is Aligned else None)}
    behind: dict[str, tuple[Any, Any]] = {
        **({"more": (More, None)} if several else {}), "base": (Base, None),
        **({"base_quantization": (BaseQuantization, None)} if base_quantization else {}),
        "stack": (Stack, None), "new_tokens": (NewTokens, "refuse"),
        "allow_pickle": (AllowPickle, False), "trust_remote_code": (TrustRemoteCode, False), "as_json": (AsJson, False),
    }  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        (_, *rest) = inspect.signature(command).parameters.values()

        def run(**values: Any) -> None:
            given = Given(**{name: values.pop(name) for name in (*ahead, *behind)})
            command(given, **values)

        def declared(entries: dict[str, tuple[Any, Any]]) -> list[inspect.Parameter]:
            kind = inspect.Parameter.KEYWORD_ONLY
            return [
                inspect.Parameter(
                    name, kind, annotation=hint, default=inspect.Parameter.empty if value is ... else value
                )
                for name, (hint, value) in entries.items()
            ]

        middle = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in rest]
        parameters = [*declared(ahead), *middle, *declared(behind)]
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def parse(texts: list[str], models: int = 1, hint: str = "--lambda") -> list[Any]:
    """λ as typed. Raises BadParameter where it is none."""
    try:
        return lambdas.parse_lambdas(texts, models)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from None


def parse_one(texts: list[str], models: int = 1, hint: str = "--lambda") -> Any:
    """The one λ where one is taken. Raises BadParameter where there are several."""
    values = parse(texts, models, hint)
    if len(values) != 1:
        raise typer.BadParameter(f"takes one λ, not {len(values)}", param_hint=hint)
    return values[0]
