"""The live page: λ on a slider, both answers beside each other, and what parts them. gradio draws it.

All sessions share the models and nothing else: λ goes with each call, and what a session sees is kept for it alone.
One text is written at a time; who turns λ while a text is being written ends it and begins the next.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # which gradio asks at each of its steps, its import included

import gradio as gr

from ..errors import DeraError
from ..lambdas import Vector, name, numbers
from ..models.pair import Pair
from ..pages import play
from .answers import LARGEST_LAMBDA, MOST_NEW_TOKENS, Asked, answers
from .both import Both
from .look import CSS, INTRODUCTION, MOVE, PICK, THEME, WATCH, download
from .reading import curve, read, seen

log = logging.getLogger(__name__)

SPAN = (-1.0, 3.0)  # of the sliders; any λ can be typed
GRID = [-1.0, -0.7, -0.4, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2,
        1.4, 1.7, 2.0, 2.5, 3.0]  # fmt: skip  # where the curve is computed: closely where it falls to 0
FRAME = 0.06  # seconds between two states of a text on the page
WAITING = 16  # runs of all windows that may wait for their turn
KEPT = 100  # sessions whose answers are kept
PATIENCE = 30  # seconds for a reading that goes on when the page ends
HINT = "<p class='soft'>Click a token: what would each model have said there?</p>"


@dataclass
class _Run:
    """A text that is being written for a session."""

    settings: tuple[Any, ...]
    stop: threading.Event = field(default_factory=threading.Event)
    superseded: bool = False


class Desk:
    """What the page's events do. The state of a session comes in and goes out as an argument.

    Args:
        both: the models.
        command: what begins the command that writes a merge; λ and the output follow.
    """

    def __init__(self, both: Both, command: str) -> None:
        self.both, self.command = both, command
        self._runs: dict[str, _Run] = {}
        self._guard = threading.Lock()

    def write(self, session: str, colour: str, *settings: Any) -> Iterator[dict[str, Any]]:
        """Both answers as they come, then what parts them: parts of the page, by name.

        Args:
            session: whose.
            colour: one of `play.colours`.
            settings: prompt, whether it is a user's turn, seed, new tokens, and λ of each aligned model.
        """
        run = _Run(settings)
        with self._guard:
            if (before := self._runs.get(session)) is not None:
                before.superseded = True
                before.stop.set()
            self._runs[session] = run
        try:
            yield from self._written(run, colour, *settings)
        except DeraError as error:
            yield {"note": _alert(self._without_paths(str(error))), "seen": None}
        except Exception as error:  # whatever it is, the page goes on
            if os.environ.get("DERA_MERGE_TRACEBACK"):
                traceback.print_exc()
            log.error("a text failed: %s: %s (set DERA_MERGE_TRACEBACK=1 to see where)", type(error).__name__, error)
            what = f"this failed inside ({type(error).__name__}); the terminal says where"
            yield {"note": _alert(what), "seen": None}
        finally:
            run.stop.set()
            with self._guard:
                if self._runs.get(session) is run:
                    del self._runs[session]

    def _written(self, run: _Run, colour: str, *settings: Any) -> Iterator[dict[str, Any]]:
        blank = {"exact": "", "merged": "", "chart": "", "likeliest": HINT, "seen": None}
        try:
            asked = asked_of(*settings)
            ids = asked.ids(self.both.pair)
        except DeraError as error:
            yield {**blank, "note": _alert(self._without_paths(str(error)))}
            return
        yield {**blank, "note": f"λ = {name(asked.lam)}: reading the prompt …", "command": self.command_at(asked.lam)}
        so_far, shown = {}, 0.0
        for so_far in answers(self.both, asked, ids, run.stop):
            if time.monotonic() - shown > FRAME:
                shown = time.monotonic()
                yield {**self._plain(so_far), "note": f"λ = {name(asked.lam)}: writing …"}
        if run.superseded:
            return
        if not so_far or not all(so_far.values()):
            yield {"note": "Stopped before both answers had begun."}
            return
        yield {**self._plain(so_far), "note": f"λ = {name(asked.lam)}: all models read both answers …"}
        reads = read(self.both, ids, so_far, asked.lam)
        state = seen(self.both, asked, so_far, reads)
        yield {**colored(state, colour), "note": play.said(state), "seen": state}
        state["curves"] = [curve(reads["exact"], self.both, _along(asked.lam, k)) for k in range(self.both.pair.models)]
        yield {"chart": play.charts(state), "seen": state}

    def _plain(self, so_far: dict[str, list[int]]) -> dict[str, str]:
        decode = self.both.pair.tokenizer.decode
        return {side: play.plain(decode(tokens, skip_special_tokens=True)) for side, tokens in so_far.items()}

    def turn(self, session: str, *settings: Any) -> None:
        """End what is being written for a session with other settings than these."""
        with self._guard:
            run = self._runs.get(session)
            if run is not None and run.settings != settings:
                run.superseded = True
                run.stop.set()

    def stop(self, session: str) -> None:
        """End what is being written for a session; it is still read."""
        with self._guard:
            if (run := self._runs.get(session)) is not None:
                run.stop.set()

    def close(self) -> None:
        """End what is being written for anyone, and wait until it has ended: a program must not exit meanwhile."""
        with self._guard:
            for run in self._runs.values():
                run.superseded = True
                run.stop.set()
        patience = time.monotonic() + PATIENCE
        while self._runs and time.monotonic() < patience:
            time.sleep(0.05)

    def command_at(self, lam: Any) -> str:
        """The command that writes the merge at λ."""
        return f"{self.command} -l {name(lam)} -o merged-{name(lam)}"

    def _without_paths(self, text: str) -> str:
        """A message without what the models are called on this machine."""
        for number, side in enumerate(self.both.pair.sides):
            for source in (side.source, side.base):
                for known in (str(source.folder), source.name):
                    text = text.replace(known, "ALIGNED" if number else "REF")
        return text


def asked_of(prompt: Any, chat: Any, seed: Any, tokens: Any, *lams: Any) -> Asked:
    """What a session's fields say. Raises DeraError where one of them is empty."""
    for what, value in (("λ", lams), ("the seed", [seed]), ("the number of new tokens", [tokens])):
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in value):
            raise DeraError(f"{what} is no number; type one")
    each = [float(f"{lam:.6g}") + 0.0 for lam in lams]
    return Asked(str(prompt or ""), each[0] if len(each) == 1 else Vector(each), int(seed), int(tokens), bool(chat))


def colored(state: dict[str, Any], colour: str) -> dict[str, str]:
    """Both answers in a colour, and what it means."""
    sides = {side: play.tokens(state, side, colour) for side in state["answers"]}
    return {**sides, "legend": play.legend(colour)}


def _alert(text: str) -> str:
    return f'<span role="alert" class="alert">{escape(text)}</span>'


def _along(lam: Any, k: int) -> list[Any]:
    """λ over the span of the k-th aligned model's slider, the others as they are."""
    each, own = list(numbers(lam)), numbers(lam)[k]
    grid = sorted({*GRID, *([own] if SPAN[0] <= own <= SPAN[1] else [])})
    return grid if len(each) == 1 else [Vector([*each[:k], value, *each[k + 1 :]]) for value in grid]


def build(
    pair: Pair, desk: Desk, examples: Sequence[str], lams: Sequence[float], max_new_tokens: int = 64
) -> gr.Blocks:
    """The page.

    Args:
        pair: the models that `desk` has.
        desk: what its events do.
        examples: prompts to click; the first one is written when the page opens.
        lams: λ of each aligned model to begin with.
        max_new_tokens: length limit to begin with.

    Returns:
        gradio's Blocks; `launch(**launching())` serves it.
    """
    chats = bool(pair.tokenizer.chat_template)
    colours = play.colours(pair.models)
    with gr.Blocks(title="dera-merge play", analytics_enabled=False) as blocks:
        state = gr.State(None, time_to_live=3600)
        gr.HTML(INTRODUCTION)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(examples[0], label="Prompt", lines=3, max_lines=8, scale=5, elem_id="prompt",
                                placeholder="What should both answer?")  # fmt: skip
            with gr.Column(scale=1, min_width=150):
                write = gr.Button("Write", variant="primary", elem_id="write")
                other = gr.Button("Another seed", elem_id="other")
                stop = gr.Button("Stop", elem_id="stop")
        more = gr.Dataset(components=[prompt], samples=[[text] for text in examples], label="Or one of these",
                          type="values", elem_id="examples")  # fmt: skip
        sliders, fields = [], []
        for k, lam in enumerate(lams, 1):
            with gr.Row(equal_height=True):
                label = "λ" if len(lams) == 1 else f"λ of aligned model {k}"
                info = "0 is the reference, 1 the aligned model, beyond 1 more than was trained, below 0 the opposite."
                sliders.append(gr.Slider(*SPAN, min(max(lam, SPAN[0]), SPAN[1]), step=0.05, label=label, info=info,
                                         buttons=[], scale=5, elem_classes="turn"))  # fmt: skip
                fields.append(gr.Number(lam, label=f"{label}, typed", info=f"within ±{LARGEST_LAMBDA:g}", step=0.05,
                                        scale=1, min_width=150, elem_classes="typed"))  # fmt: skip
        note = gr.HTML("", elem_id="note")
        with gr.Row():
            cards = {}
            for side in play.TITLES:
                with gr.Column(min_width=300, elem_classes="card"):
                    gr.HTML(f"<h2>{play.TITLES[side]}</h2><p class='soft'>{play.WHAT[side]}</p>")
                    cards[side] = gr.HTML("", js_on_load=PICK, elem_id=side, elem_classes="answer")
        with gr.Row():
            colour = gr.Radio(colours, value=colours[0], label="Colour the tokens by", elem_id="colour")
            legend = gr.HTML(play.legend(colours[0]), elem_id="legend")
        with gr.Row():
            with gr.Column(min_width=300):
                chart = gr.HTML("", elem_id="chart")
            with gr.Column(min_width=300):
                likeliest = gr.HTML(HINT, elem_id="likeliest")
        with gr.Accordion("Seed, length, chat template", open=False), gr.Row(equal_height=True):
            seed = gr.Number(0, label="Seed of the noise", precision=0, min_width=150, elem_id="seed")
            tokens = gr.Slider(8, MOST_NEW_TOKENS, min(max_new_tokens, MOST_NEW_TOKENS), step=8, buttons=[],
                               label="Most new tokens", min_width=200)  # fmt: skip
            chat = gr.Checkbox(chats, label="The prompt is a user's turn; else it is text to go on with",
                               interactive=chats, min_width=200)  # fmt: skip
        command = gr.Textbox(label="To write the merged model of this λ", interactive=False, buttons=["copy"],
                             elem_id="command")  # fmt: skip
        with gr.Row():
            as_json = gr.Button("Save what is seen as JSON", elem_id="as-json")
            as_html = gr.Button("Save what is seen as a page", elem_id="as-html")
        kept = gr.Textbox(visible="hidden")
        parts = {"note": note, **cards, "chart": chart, "likeliest": likeliest, "seen": state, "legend": legend,
                 "command": command}  # fmt: skip
        settings = [prompt, chat, seed, tokens, *fields]

        def run(request: gr.Request, shade: str, *values: Any) -> Iterator[dict[Any, Any]]:
            for change in desk.write(request.session_hash or "", shade, *values):
                yield {parts[part]: value for part, value in change.items()}

        def turn(request: gr.Request, *values: Any) -> None:
            desk.turn(request.session_hash or "", *values)

        def end(request: gr.Request) -> None:
            desk.stop(request.session_hash or "")

        def pick(now: dict[str, Any] | None, event: gr.EventData) -> str:
            side, place = getattr(event, "side", None), getattr(event, "n", None)
            if now is None or side not in now["answers"] or place not in range(len(now["answers"][side]["tokens"])):
                return "<p class='soft'>These tokens are gone; write again.</p>"
            return play.likeliest(now, side, place)

        def recolour(now: dict[str, Any] | None, shade: str) -> list[Any]:
            drawn = {"legend": play.legend(shade)} if now is None else colored(now, shade)
            return [drawn.get(part, gr.skip()) for part in (*cards, "legend")]

        def kept_as(kind: str, now: dict[str, Any] | None) -> str:
            if now is None:
                return ""
            command = desk.command_at(now["lambda"])
            if kind == "html":
                return play.html(now, command)
            what = {"command": command, **now}
            return json.dumps(what, ensure_ascii=False, allow_nan=False)

        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        slow: dict[str, Any] = {
            "inputs": [colour, *settings], "outputs": list(parts.values()), "concurrency_limit": 1,
            "concurrency_id": "models", "trigger_mode": "always_last", "show_progress": "minimal",
            "show_progress_on": [note], "api_visibility": "private",
        }  # fmt: skip
        begins = [write.click, prompt.submit, seed.change, tokens.release, chat.input, *(one.change for one in fields)]
        gr.on(begins, turn, settings, None, trigger_mode="multiple", **quick)
        gr.on([blocks.load, *begins], run, **slow)
        taken = more.click(lambda sample: sample[0], more, prompt, **quick)
        taken.then(turn, settings, None, **quick).then(run, **slow)
        stop.click(end, **quick)
        blocks.unload(end)
        for slider, typed in zip(sliders, fields, strict=True):
            slider.input(None, slider, typed, js="(value) => value", **quick)
            typed.input(None, typed, slider, js=f"(v) => Math.min({SPAN[1]}, Math.max({SPAN[0]}, Number(v)))", **quick)
        gr.on([one.change for one in fields], None, fields, None, js=MOVE, **quick)
        other.click(None, seed, seed, js="(seed) => (Number(seed) || 0) + 1", **quick)
        colour.change(recolour, [state, colour], [*cards.values(), legend], **quick)
        for card in cards.values():
            card.pick(pick, state, likeliest, **quick)
        for button, kind in ((as_json, "json"), (as_html, "html")):
            button.click(lambda now, kind=kind: kept_as(kind, now), state, kept, **quick).then(
                None, kept, None, js=download(kind), **quick
            )
    return blocks.queue(max_size=WAITING, api_open=False)


def launching(host: str | None = None, port: int | None = None) -> dict[str, Any]:
    """How gradio serves the page: nothing fetched from elsewhere, nothing told to anyone, no files handed out.

    Args:
        host: address to listen on; None leaves it to gradio, which is loopback outside of a Space.
        port: None takes the first free one from 7860 on.
    """
    return {
        "server_name": host, "server_port": port, "share": False, "quiet": True, "theme": THEME, "css": CSS,
        "head": WATCH, "footer_links": [], "ssr_mode": False, "mcp_server": False, "pwa": False,
        "enable_monitoring": False, "state_session_capacity": KEPT, "max_file_size": 1, "allowed_paths": [],
    }  # fmt: skip
