"""What a session of `dera-merge play` sees: answers token by token, the ten likeliest of one, KL over λ; and to keep.

Everything is drawn from the session's JSON (`playing/reading.seen`), so that the live page and an exported one agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from ..lambdas import loaded, name, numbers
from .frame import FLOOR, number, page, shade

FULL_RATIO = 3.0  # nats: a log-ratio from which a token is coloured in full
SIZE = (440, 270)  # of a chart, in its own units; a phone shows them at about 0.8
PLOT = (52, 14, 428, 214)  # left, top, right and bottom of its axes
TITLES = {"exact": "exact", "merged": "merged"}
WHAT = {"exact": "two models, their logits mixed for every token", "merged": "one model, the weights mixed once"}


def colours(models: int) -> list[str]:
    """By what tokens can be coloured: kl, the log-ratio (of each aligned model), nothing."""
    ratios = ["log-ratio"] if models == 1 else [f"log-ratio {k}" for k in range(1, models + 1)]
    return ["KL", *ratios, "nothing"]


def tokens(seen: dict[str, Any], side: str, colour: str) -> str:
    """An answer as HTML, each token to be clicked (`data-side`, `data-n`), coloured by one of `colours`."""
    spans = []
    for place, token in enumerate(seen["answers"][side]["tokens"]):
        style, classes = _style(token, colour)
        if place == seen["part_at"]:
            classes.append("parts")
        spans.append(
            f'<span role="button" tabindex="0" data-side="{side}" data-n="{place}" class="{" ".join(classes)}" '
            f'style="{style}" title="{escape(_in_figures(token))}">{_visible(token["text"])}</span>'
        )
    return f'<div class="tokens">{"".join(spans)}</div>'


def plain(text: str) -> str:
    """A text as HTML."""
    return f'<div class="tokens">{escape(text)}</div>'


def _style(token: dict[str, Any], colour: str) -> tuple[str, list[str]]:
    """CSS of a token, and its classes."""
    kind, _, which = colour.partition(" ")
    if kind == "KL":
        return f"--k: {shade(token['kl'])}", ["heat"]
    if kind == "log-ratio":
        ratio = token["log_ratio"][int(which or 1) - 1]
        return f"--k: {min(1.0, abs(ratio) / FULL_RATIO):.2f}", [_direction(ratio)]
    return "", []


def _direction(ratio: float) -> str:
    """The class of a token by its log-ratio; one that shows no colour has none."""
    return "" if abs(ratio) < FULL_RATIO / 50 else "more" if ratio > 0 else "less"


def _in_figures(token: dict[str, Any]) -> str:
    return f"KL {_kl(token['kl'])}, log-ratio {', '.join(f'{ratio:+.2f}' for ratio in token['log_ratio'])}"


def _visible(text: str) -> str:
    """A token's text, its line breaks with a mark that can be clicked."""
    return escape(text).replace("\n", '<span class="soft">↵</span>\n') or '<span class="soft">·</span>'


def legend(colour: str) -> str:
    """What the colours mean, in a sentence."""
    kind, _, which = colour.partition(" ")
    if kind == "KL":
        return (
            '<span class="heat" style="--k: 0.15">pale</span> to <span class="heat" style="--k: 1">strong</span>: '
            "KL of the merged from the exact distribution of this token, 0.001 to 1 nats: what can part the answers."
        )
    if kind == "log-ratio":
        aligned = f"aligned model {which}" if which else "aligned model"
        return (
            '<span class="more" style="--k: 0.7">more</span> or <span class="less" style="--k: 0.7">less</span> likely '
            f"under the {aligned} than under the reference: log π_aligned - log π_ref, in full colour from ±3 nats."
        )
    return "No colours. A click on a token still shows what each model would have said there."


def likeliest(seen: dict[str, Any], side: str, place: int) -> str:
    """The ten likeliest tokens of every model at one place of an answer, as HTML."""
    answer = seen["answers"][side]["tokens"]
    token = answer[place]
    before = "".join(one["text"] for one in answer[max(0, place - 8) : place])
    columns = "".join(f"<th>{escape(model)}</th>" for model in token["likeliest"])
    rows = [
        '<tr class="own"><td>here</td>'
        + "".join(f"<td>{_percent(p)}</td>" for p in token["p"].values()) + "</tr>"
    ]  # fmt: skip
    for rank, row in enumerate(zip(*token["likeliest"].values(), strict=True), 1):
        cells = "".join(
            f'<td{" class=own" if text == token["text"] else ""}><span class="word">{_quoted(text)}</span> '
            f"<span class=soft>{_percent(p)}</span></td>"
            for text, p in row
        )
        rows.append(f"<tr><td>{rank}</td>{cells}</tr>")
    return (
        f'<p>Token {place + 1} of the {TITLES[side]} answer, <span class="word">{_quoted(token["text"])}</span> after '
        f"“…{escape(before)}”: "
        f"{escape(_in_figures(token))}.</p>"
        f'<div class="wide"><table><tr><th></th>{columns}</tr>{"".join(rows)}</table></div>'
    )


def _quoted(text: str) -> str:
    """A token's text with its white space to be seen."""
    return escape(text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")) or "·"


def _percent(p: float) -> str:
    return f"{p:.1%}" if p >= 0.001 else "&lt;0.1%"


def said(seen: dict[str, Any]) -> str:
    """What there is to see, in two sentences."""
    parts = seen["part_at"]
    if parts is None:
        first = "Under the same noise both answers are the same."
    elif parts == 0:
        first = "Under the same noise the answers part at the first token."
    else:
        count = "one token" if parts == 1 else f"{parts} tokens"
        first = f"Under the same noise the answers are the same for {count}, then part."
    kl = _kl(seen["answers"]["exact"]["kl"])
    at = name(loaded(seen["lambda"]))
    return f"λ = {at}. {first} KL of merged from exact: {kl} nats per token of the exact answer."


def _kl(value: float) -> str:
    """A KL in nats; what float32 alone leaves is 0."""
    return number(value) if value >= FLOOR else "0"


def chart(seen: dict[str, Any], along: int = 0) -> str:
    """KL over λ of the along-th aligned model as SVG, with a mark `.place` that the page moves with its slider."""
    rows, lam = seen["curves"][along], loaded(seen["lambda"])
    at = [numbers(loaded(row["lambda"]))[along] for row in rows]
    left, top, right, bottom = PLOT
    measured = seen["answers"]["exact"]["kl"]
    values = [row[key] for row in rows for key in ("kl_ref", "kl") if key in row] + [measured]
    most = max([v for v in values if math.isfinite(v)] + [10 * FLOOR])
    least = max(FLOOR, min([v for v in values if v > FLOOR] + [most / 1e4]), most / 1e6)
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))

    def x(value: float) -> float:
        return left + (right - left) * (value - at[0]) / (at[-1] - at[0])

    def y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / max(1, high - low)
        return bottom - (bottom - top) * min(1.0, share)

    def line(key: str, points: Sequence[int], kind: str) -> str:
        where = " ".join(f"{x(at[n]):.1f},{y(rows[n][key]):.1f}" for n in points)
        return f'<polyline class="{kind}" points="{where}"/>'

    marks = [f'<line class="grid" x1="{left}" x2="{right}" y1="{y(10.0**e):.1f}" y2="{y(10.0**e):.1f}"/>'
             f'<text x="{left - 6}" y="{y(10.0**e) + 4:.1f}" text-anchor="end">{10.0**e:g}</text>'
             for e in range(low, high + 1, max(1, (high - low) // 4))]  # fmt: skip
    marks += [f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{top}" y2="{bottom}"/>'
              f'<text x="{x(v):.1f}" y="{bottom + 17}" text-anchor="middle">{v:g}</text>'
              for v in range(math.ceil(at[0]), math.floor(at[-1]) + 1)]  # fmt: skip
    marks.append(line("kl_ref", range(len(rows)), "ref"))
    own = numbers(lam)[along]
    if "kl" in rows[0]:
        low_end, high_end = min(0.0, own), max(1.0, own)
        inside = [n for n, value in enumerate(at) if low_end <= value <= high_end]
        marks.append(line("kl", inside, "merge"))
        marks += [line("kl", part, "merge guess") for part in (range(inside[0] + 1), range(inside[-1], len(rows)))]
    place = min(max(own, at[0]), at[-1])
    marks += [
        f'<circle cx="{x(place):.1f}" cy="{y(measured):.1f}" r="4.5"/>',
        f'<line class="place" data-along="{along}" data-from="{at[0]}" data-to="{at[-1]}" data-left="{left}" '
        f'data-right="{right}" x1="{x(place):.1f}" x2="{x(place):.1f}" y1="{top}" y2="{bottom}"/>',
        f'<text x="{(left + right) / 2}" y="{bottom + 36}" text-anchor="middle">{_axis(lam, along)}</text>',
    ]
    title = "KL over λ: of exact from the reference, and of merged from exact"
    return (
        f'<svg class="chart" viewBox="0 0 {SIZE[0]} {SIZE[1]}" role="img" aria-label="{title}">{"".join(marks)}'
        f'<g class="key"><line class="ref" x1="{left}" x2="{left + 22}" y1="262" y2="262"/>'
        f'<text x="{left + 27}" y="266">exact from reference</text>'
        f'<line class="merge" x1="{left + 190}" x2="{left + 212}" y1="262" y2="262"/>'
        f'<text x="{left + 217}" y="266">merged from exact</text></g></svg>'
    )


def _axis(lam: Any, along: int) -> str:
    return "λ" if len(numbers(lam)) == 1 else f"λ of aligned model {along + 1}"


def charts(seen: dict[str, Any]) -> str:
    """A chart for each aligned model, and how to read it."""
    drawn = "".join(f"<figure>{chart(seen, along)}</figure>" for along in range(len(seen["curves"])))
    how = "KL in nats per token of this exact answer, from one reading of it. The dot was measured"
    if "kl" in seen["curves"][0][0]:
        how += "; the red line is predicted from one merged model, and dashed where that is a guess"
    return f'<div class="charts">{drawn}</div><p class="soft">{how}. The bar is where λ stands.</p>'


def html(seen: dict[str, Any], command: str) -> str:
    """A self-contained page of what a session sees; clicks are replaced by tables that open."""
    sides = [
        {"title": TITLES[side], "what": WHAT[side], "text": tokens(seen, side, "KL"),
         "tables": [(_quoted(token["text"]), likeliest(seen, side, place))
                    for place, token in enumerate(seen["answers"][side]["tokens"])]}
        for side in seen["answers"]
    ]  # fmt: skip
    title = f"λ = {name(loaded(seen['lambda']))}, exact and merged"
    return page(
        "play.html", title, {"ref": "REF", "aligned": "ALIGNED", **seen}, {}, said=said(seen), sides=sides,
        chart=charts(seen) if seen["curves"] else "", command=command, legend=legend("KL"),
    )  # fmt: skip
