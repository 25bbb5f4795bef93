#!/usr/bin/env python3
"""The README's pictures, from real runs on the demo pair: what λ is chosen by, merged with, decoded at, measured by.

    python scripts/make_pictures.py [-o docs/pictures]

Writes choose.png, merge.png, decode.png and measure.png, in about three minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dera_merge import ModelPair, compare, demo, sweep
from dera_merge.texts.prompts import encode
from dera_merge.texts.sampling import sample

LAMS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
SHOWN = [0.0, 0.5, 1.0, 2.0]
PROMPT = 2  # a test prompt whose answers are short
LINE = 62  # characters of a text's line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/pictures"))
    out = parser.parse_args().output
    out.mkdir(parents=True, exist_ok=True)
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep(pair, demo.prompts("validation"), [demo.reward]).save(folder / "sweep")
        compare(pair, LAMS, demo.prompts()).save(folder / "report")
        shutil.copyfile(folder / "sweep" / "sweep.png", out / "choose.png")
        shutil.copyfile(folder / "report" / "fidelity.png", out / "measure.png")
        kept(folder, out / "merge.png")
    texts(pair, out / "decode.png")


def kept(folder: Path, file: Path) -> None:
    """How much of λΔ two ways of rounding keep, of the dense pair, whose Δ is mostly below a bfloat16 ulp."""
    pair = ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE)
    lams = np.linspace(0.1, 0.9, 17).round(3).tolist()
    figure, axes = blank(6.4, 3.4)
    for rounding, style in (("nearest", "s--"), ("stochastic", "o-")):
        places = pair.merge(folder / rounding, lams, rounding=rounding)
        values = [json.loads((place / "dera_merge.json").read_text())["statistics"]["kept"] for place in places]
        axes.plot(lams, values, style, markersize=4, label=f"{rounding} rounding{' (default)' * (style == 'o-')}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="λ", ylabel="part of λΔ that bfloat16 keeps", ylim=(0, None))
    axes.legend()
    figure.savefig(file)


def texts(pair: ModelPair, file: Path) -> None:
    """One prompt's answers under the same noise, words of praise bold, words of blame in italics."""
    prompt = demo.prompts()[PROMPT]
    ids = encode([prompt], pair.tokenizer)[0].ids
    exact = pair.exact()
    figure, axes = blank(6.4, 4.4)
    axes.axis("off")
    lines: list[tuple[str, str]] = [("", f"“{prompt['messages'][-1]['content']}”"), ("", "")]
    for lam in SHOWN:
        (answer,) = sample(exact, pair.tokenizer, [[*ids]], max_new_tokens=64, lams=[lam])
        rows = textwrap.wrap(pair.tokenizer.decode(answer, skip_special_tokens=True), LINE)
        lines += [(f"λ = {lam:g}" if not number else "", row) for number, row in enumerate(rows)] + [("", "")]
    for number, (label, line) in enumerate(lines):
        y = 1 - (number + 0.5) / len(lines)
        axes.text(0, y, label, weight="bold", va="center", transform=axes.transAxes, size=9)
        axes.text(0.14, y, marked(line), va="center", transform=axes.transAxes, size=9, family="monospace")
    figure.savefig(file)


def marked(line: str) -> str:
    """A line in which words of praise and of blame stand out, in print too."""
    def mark(match: re.Match[str]) -> str:
        word = match[0]
        if word.lower() in demo.POSITIVE:
            return rf"$\mathbf{{{word}}}$"
        return rf"$\mathit{{{word}}}$" if word.lower() in demo.NEGATIVE else word

    return re.sub(r"[A-Za-z]+", mark, line)


def blank(width: float, height: float) -> tuple[Figure, object]:
    """A figure with one pair of axes."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


if __name__ == "__main__":
    main()
