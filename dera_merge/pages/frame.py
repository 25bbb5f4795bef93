"""What all pages and plots share: one self-contained file, charts in the colour of the text around them."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DeraWarning
from ..lambdas import Vector, is_end, loaded, name
from ..statistics.verdict import VERDICTS

FLOOR = 1e-7  # nats: below this a logarithmic axis shows rounding noise only
INK = "#010203"  # stands for the colour of the page's text
SHADES = (0.001, 1.0)  # nats: kl of a token that is shaded least and most


_OF_LAMBDAS = ("anchors", "failed", *VERDICTS)  # lists of λ


def read(value: Any, key: str = "") -> Any:
    """The content of a report.json or sweep.json as these pages take it: λ of several aligned models as a `Vector`."""
    if key in ("lambda", "gain_over"):
        return loaded(value)
    if isinstance(value, dict):
        return {name: read(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [read(inner, "lambda" if key in _OF_LAMBDAS else "") for inner in value]
    return value


def number(value: float | None) -> str:
    """A divergence or the like with two digits; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.2g}" if abs(value) >= 0.001 else f"{value:.1e}" if value else "0"


def span(bounds: Sequence[float]) -> str:
    """An interval as the pages show it, two digits."""
    return f"{bounds[0]:.2g} to {bounds[1]:.2g}"


def no_plots() -> None:
    """Warn that there are no plots, and why."""
    warnings.warn("no plots without matplotlib; pip install 'matplotlib>=3.9.0'", DeraWarning, stacklevel=3)


def have_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def figure_of(draw: Sequence[Callable[[Any], None]], size: tuple[float, float]) -> Any:
    """A matplotlib figure of these charts side by side, `size` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, put in zip(list(figure.subplots(1, len(draw), squeeze=False)[0]), draw, strict=True):
        put(axis)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curve(
    axis: Any, results: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float | None], **style: Any
) -> None:
    """A line over λ, its `value` of each result; None makes a gap."""
    rows, at = over_lambda(axis, results)
    values = [math.nan if (v := value(row)) is None else v for row in rows]
    if rows and isinstance(rows[0]["lambda"], Vector):  # no line leads from one to the next
        style |= {"linestyle": "", "marker": style.get("marker", "_"), "markersize": 7 if "marker" in style else 14}
    if not all(map(math.isnan, values)):
        axis.plot(at, values, **style)


def over_lambda(axis: Any, results: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[float]]:
    """Results in the order of λ, and where each is on the axis; vectors stand side by side, named."""
    rows = sorted(results, key=lambda result: result["lambda"])
    if not any(isinstance(row["lambda"], Vector) for row in rows):
        return rows, [row["lambda"] for row in rows]
    names = [name(row["lambda"]) for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=90 if len(rows) > 6 else 0, fontsize=7)
    return rows, list(range(len(rows)))


def svg(draw: Callable[[Any], None], salt: str) -> str:
    """One chart as SVG without a background, its ink in the page's own."""
    import matplotlib

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9, **ink}):
        figure = figure_of([draw], (4.8, 3.5))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")


def page(template: str, title: str, of: dict[str, Any], draw: dict[str, Callable[[Any], None]], **content: Any) -> str:
    """A template around its charts, as SVG (none without matplotlib). `of`: what it shows, with `ref` and `aligned`."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("dera_merge.pages", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "shade": shade, "lam": name}
    environment.tests["end"] = is_end
    charts = {chart: svg(put, chart) for chart, put in draw.items()} if have_matplotlib() else {}
    return environment.get_template(template).render(title=title, of=of, charts=charts, **content)


def shade(kl: float) -> str:
    """How strongly a token is shaded, 0 to 1, on a logarithmic scale of its kl."""
    low, high = map(math.log, SHADES)
    return f"{min(1.0, max(0.0, (math.log(max(kl, 1e-12)) - low) / (high - low))):.2f}"


def one_line(text: str) -> str:
    """Text as one line that can stand in backticks."""
    return " ".join(text.split()).replace("`", "'")
