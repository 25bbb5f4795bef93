"""A sweep's target in words and as charts: a KL or a length that was to be hit, a share of the reward to be kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..lambdas import Vector, is_end, name
from .frame import draw_curve, number, span

CUT = 0.02  # share of cut texts above which they are told of
_AXES = {"kl_token": "KL from the reference, nats a token", "length": "tokens a text"}
_COSTS = {"tokens": "length", "kl": "kl"}


def target_sentences(sweep: dict[str, Any]) -> list[str]:
    """Whether the target is met, by which λ, and what that costs; nothing where none was given."""
    best, target = sweep["best"], sweep["best"].get("target")
    if target is None:
        return []
    said = _kept(best, target) if target["by"] == "keep" else _hit(best, target)
    if best.get("reward") is not None and target["by"] != "keep":
        gain = f", {best['gain']:+.2g} ({span(best['gain_ci'])}) beside λ = 1" if best.get("gain") is not None else ""
        said.append(f"It earns {number(best['reward'])} ({span(best['reward_ci'])}){gain}.")
    return said


def cut_sentence(sweep: dict[str, Any]) -> list[str]:
    """What texts that reach the limit of tokens mean for a target; nothing where there are few, or no target."""
    best, most = sweep["best"], sweep["settings"]["max_new_tokens"]
    if "target" not in best or not best["cut"] > CUT:
        return []
    return [
        f"{best['cut']:.0%} of the texts at λ = {name(best['lambda'])} reach the limit of {most} tokens and are cut "
        "off there: these figures are of cut texts. More --max-new-tokens tell of whole ones."
    ]


def _hit(best: dict[str, Any], target: dict[str, Any]) -> list[str]:
    lam, by_kl = name(best["lambda"]), target["by"] == "kl"
    wanted = f"a KL of {target['value']:g} nats a token" if by_kl else f"{target['value']:g} tokens on average"
    if not target["met"]:
        known = f"what is known goes from {_plain(target['known_from'])} to {_plain(target['known_to'])}"
        nearest = f"λ = {lam} is nearest, with {_plain(target['reached'])}"
        return [f"No λ has {wanted}: {known}. {nearest}; a wider -l may do."]
    low, high = best["interval"]
    reached = f"{_plain(target['reached'])} ({_bounds(target['reached_ci'])})"
    if by_kl:
        an_answer = f"{_plain(best['kl'])} ({_bounds(best['kl_ci'])}) an answer of {best['length']:.1f} tokens"
        what = f"KL from the reference on its own texts is {reached} nats a token, {an_answer}"
    else:
        what = f"its texts have {reached} tokens, at {_plain(best['kl_token'])} nats a token from the reference"
    return [f"λ = {lam} has {wanted}: {what}. Resampled prompts choose λ between {low:.3g} and {high:.3g} (95 %)."]


def _kept(best: dict[str, Any], target: dict[str, Any]) -> list[str]:
    share, less = f"{target['value']:.0%}", {"tokens": "fewer tokens", "kl": "less KL"}[target["minimise"]]
    if target["value"] * 100 % 1:
        share = f"{target['value']:.1%}"
    if not target["of_ci"][0] > 0:
        return [
            f"λ = 1 does not surely earn more than 0, so that {share} of its reward says nothing: "
            f"{span(target['of_ci'])}. More prompts, or a reward that is above 0, may."
        ]
    if not target["met"]:
        return [
            f"No λ surely keeps {share} of λ=1's reward with {less}: λ = 1 itself is left. More prompts or --samples "
            "narrow the intervals; a smaller --keep asks for less."
        ]
    cost = _COSTS[target["minimise"]]
    unit = "tokens" if cost == "length" else "nats"
    low, high = best["interval"]
    return [
        f"λ = {name(best['lambda'])} costs least of the λ that surely keep {share} of λ=1's reward: "
        f"{_plain(best[cost])} ({_bounds(best[cost + '_ci'])}) {unit} a text, {target['saved']:.0%} "
        f"({_share(target['saved_ci'][0])} to {_share(target['saved_ci'][1])}) less than λ=1, for "
        f"{target['reached']:.1%} ({target['reached_ci'][0]:.1%} to {target['reached_ci'][1]:.1%}) of its reward.",
        f"These keep it: {_spans(target['keeping'])}. Among them resampled prompts choose λ between {low:g} and "
        f"{high:g} (95 %).",
    ]


def _share(value: float) -> str:
    """As a percentage, without a minus before 0."""
    return f"{round(value, 2) + 0.0:.0%}"


def _spans(lams: Sequence[float]) -> str:
    """λ in words; of more than four the first and the last."""
    if len(lams) <= 4:
        return ", ".join(f"{lam:g}" for lam in lams)
    return f"{len(lams)} λ from {lams[0]:g} to {lams[-1]:g}"


def _plain(value: float) -> str:
    """Three digits, and no exponent for what people count."""
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _bounds(bounds: Sequence[float]) -> str:
    return f"{_plain(bounds[0])} to {_plain(bounds[1])}"


def front(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the curve that no other beats in reward and tokens at once, shortest first."""
    best: list[dict[str, Any]] = []
    for row in sorted((r for r in sweep["curve"] if r["known"]), key=lambda r: (r["length"], -r["reward"])):
        if not best or row["reward"] > best[-1]["reward"]:
            best.append(row)
    return best


def draw_effort(axis: Any, sweep: dict[str, Any]) -> None:
    """Reward against tokens, λ along the curve; what nothing beats in both; what was chosen."""
    rows, chosen = [row for row in sweep["curve"] if row["known"]], sweep["best"]["lambda"]
    several, target = isinstance(chosen, Vector), sweep["best"].get("target", {})
    style = {"linestyle": "", "marker": "."} if several else {}
    at = [row["length"] for row in rows], [row["reward"] for row in rows]
    alone = sweep["settings"].get("mode") == "merged"
    axis.plot(*at, color="C0", linewidth=1, label="merged" if alone else "exact DeRa", **style)
    best = front(sweep)
    axis.plot([r["length"] for r in best], [r["reward"] for r in best], "o", color="C0", markersize=6, alpha=0.35,
              label="none earns more in fewer tokens")  # fmt: skip
    merged = [p for p in sweep["points"] if p["mode"] == "merged" and "reward" in p]
    if merged and not alone:
        axis.plot([p["length"] for p in merged], [p["reward"] for p in merged], "s", color="C1", markersize=4,
                  label="merged, sampled")  # fmt: skip
    sampled = {point["lambda"] for point in sweep["points"]}
    for row in rows:
        if row["lambda"] == chosen or row["lambda"] in sampled or is_end(row["lambda"]):
            axis.plot(row["length"], row["reward"], "o", color="C0", markersize=3)
            axis.annotate(f" λ={name(row['lambda'])}", (row["length"], row["reward"]), fontsize=8, va="bottom")
    (row,) = (row for row in sweep["curve"] if row["lambda"] == chosen)
    axis.plot(row["length"], row["reward"], "*", color="C2", markersize=11, label=f"chosen: {name(chosen)}")
    if target.get("by") == "keep":
        one = next(row for row in rows if row["lambda"] == 1.0)
        axis.axhline(target["value"] * one["reward"], color="C3", linewidth=0.8, linestyle="--",
                     label=f"{target['value']:.3g} of λ=1's")  # fmt: skip
    if target.get("by") == "length":
        axis.axvline(target["value"], color="C3", linewidth=0.8, linestyle="--", label="asked for")
    axis.set(xlabel="tokens a text", ylabel="reward", title="What it takes")
    axis.legend(frameon=False, fontsize=7)


def draw_figure(axis: Any, sweep: dict[str, Any], column: str) -> None:
    """A figure of the curve over λ with its band, the one that was asked for, and the λ that was chosen."""
    rows, best = sweep["curve"], sweep["best"]
    target = best["target"]
    draw_curve(axis, rows, lambda r: r[column], color="C0", linestyle=":", linewidth=1)
    draw_curve(axis, rows, lambda r: r[column] if r["known"] else None, color="C0")
    known = [row for row in rows if row["known"]]
    low, high = zip(*(row[f"{column}_ci"] for row in known), strict=True)
    axis.fill_between([row["lambda"] for row in known], low, high, color="C0", alpha=0.2, lw=0)
    if column == target["column"]:
        axis.axhline(target["value"], color="C3", linewidth=0.8, linestyle="--", label="asked for")
    axis.axvspan(*best["interval"], color="C2", alpha=0.12, lw=0)
    axis.axvline(best["lambda"], color="C2", linewidth=1, label=f"chosen: {name(best['lambda'])}")
    title = "What it takes" if column == "length" else "How far it goes"
    axis.set(xlabel="λ", ylabel=_AXES[column], title=title)
    axis.legend(frameon=False, fontsize=8)


def target_charts(sweep: dict[str, Any]) -> dict[str, Callable[[Any], None]]:
    """The charts that show a target over λ, by name."""
    target = sweep["best"].get("target")
    if target is None or target["by"] == "keep":
        return {}
    columns: list[str] = [target["column"]]
    if "reward" not in sweep["best"]:  # then there is room for the other one
        columns += [column for column in _AXES if column not in columns]
    return {column: lambda axis, column=column: draw_figure(axis, sweep, column) for column in columns}
