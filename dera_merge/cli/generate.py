"""`dera-merge generate`: one prompt at one λ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import DeraError
from .checks import choose_device
from .help import how, what, where
from .options import Dtype, Given, MaxMemory, Mode, OneLambda, PathFile, Seed, with_models
from .show import note, print_json, say

LoadIn = Literal["4bit", "8bit"]

EXAMPLES = (
    'dera-merge generate demo/reference demo/aligned-lora -l 0.5 --prompt "The film"',
    'dera-merge generate demo/reference demo/aligned-lora -l 2 --prompt "The film" --mode speculative',
)


@with_models(several=True, base_quantization=True)
def run(
    given: Given,
    lam: OneLambda,
    prompt: Annotated[str, what(help="Raw text, tokenized with the tokenizer's defaults (but see --chat).")],
    mode: Annotated[Mode, how(help="Two models, one, or two with one drafting.")] = "exact",
    chat: Annotated[bool, what("--chat", help="Put the prompt through the chat template as a user's turn.")] = False,
    image: Annotated[
        list[Path] | None, what(help="A file with an image that the user's turn shows; repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, how(min=1, help="Length of the answer.")] = 64,
    temperature: Annotated[float | None, how(min=0.0, help="0, the default, is greedy.")] = None,
    as_configured: Annotated[
        bool,
        how("--as-configured", help="Apply the model's generation_config.json. Not exact DeRa any more."),
    ] = False,
    seed: Seed = 0,
    device: Annotated[
        str, where(help="auto, cpu, cuda, …; cuda:0,cuda:1: REF and ALIGNED; spread: layers over all GPUs.")
    ] = "auto",
    compute_dtype: Annotated[Dtype, how(help="auto: float32 on CPU, else the checkpoint's.")] = "auto",
    load_in: Annotated[LoadIn | None, how(help="Quantise both models on loading (bitsandbytes).")] = None,
    plausibility: Annotated[
        float | None, how(help="α in (0, 1]: no token below α times ALIGNED's best. Not exact DeRa any more.")
    ] = None,
    path: PathFile = None,
    max_memory: MaxMemory = None,
) -> None:
    """Decode one prompt at λ."""
    value = given.lam(lam)
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise typer.BadParameter("must be 0 (greedy) or from 0.001 to 1000", param_hint="--temperature")
    if plausibility is not None and not 0 < plausibility <= 1:
        raise typer.BadParameter("must be above 0 and at most 1", param_hint="--plausibility")
    if mode == "merged" and (load_in or plausibility):
        hint = "--load-in" if load_in else "--plausibility"
        raise typer.BadParameter("is for exact and speculative decoding", param_hint=hint)
    if max_memory and (load_in or mode == "speculative"):
        raise typer.BadParameter(
            "is for models that can be read a layer at a time; leave out --load-in and --mode speculative",
            param_hint="--max-memory",
        )
    if mode == "exact" and path:
        raise typer.BadParameter(
            "is for --mode merged and speculative; exact decoding merges nothing", param_hint="--path"
        )
    pair = given.open()
    places = [choose_device(name, spreads=True) for name in device.split(",")]
    if len(places) > 2 or (len(places) == 2 and mode == "merged"):
        raise typer.BadParameter("one device, or two for exact decoding", param_hint="--device")
    from ..texts.generate import decode

    why = None if load_in or mode == "speculative" else _too_large(given, pair, mode, places, compute_dtype, max_memory)
    if why:
        note(f"with offload: {why}; each token reads all weights from the files")
    kind = None if compute_dtype == "auto" else compute_dtype
    text = decode(
        pair, value, prompt, mode=mode, chat=chat, images=image or [], max_new_tokens=max_new_tokens,
        temperature=temperature, as_configured=as_configured, seed=seed,
        device=places if len(places) == 2 else places[0], compute_dtype=kind, load_in=load_in,
        plausibility=plausibility,
        path=path, offload=bool(why),
    )  # fmt: skip
    if given.as_json:
        settings = {"load_in": load_in, "plausibility": plausibility}
        return print_json({**given.names, "lambda": value, "mode": mode, **settings, **text})
    say(text["text"])
    notes = []
    if text.get("acceptance_rate") is not None:
        gain = f"{text['tokens_per_verification']:.1f} tokens a verification"
        notes.append(f"speculation: {text['acceptance_rate']:.0%} of {text['drafted']} drafted tokens kept, {gain}")
    if plausibility:
        notes.append(f"not exact DeRa: tokens below {plausibility:g} times the aligned model's best are masked")
    if as_configured:
        notes.append(f"not exact DeRa: decoded as the model's files say, {_named(text['applied']) or 'greedily'}")
    if text["left_out"]:
        notes.append(f"not applied: {_named(text['left_out'])} of generation_config.json; --as-configured applies them")
    for line in notes:
        note(line)


def _too_large(
    given: Given, pair: Any, mode: Mode, places: list[Any], compute_dtype: Dtype, max_memory: str | None
) -> str | None:
    """Why models cannot be held whole, and in what they could; None where they fit."""
    from ..measuring.precision import in_bytes, too_large
    from ..texts.offload import stored_dtype

    together = 1 if mode == "merged" or pair.shared_base or len(places) == 2 else 1 + given.models
    kind: Any = compute_dtype
    if kind == "auto" and places[0].type != "cpu":
        try:
            kind = stored_dtype(pair)
        except DeraError:  # it cannot be merged, and so not be made of its files; exact DeRa may run
            return None
    size = places[0], together, in_bytes(max_memory)
    why = too_large(pair, *size, kind)
    if why and compute_dtype == "auto" and too_large(pair, *size, "bfloat16") is None:
        why += ", --compute-dtype bfloat16 fits"
    return why


def _named(settings: dict[str, Any]) -> str:
    """Settings in words."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())
