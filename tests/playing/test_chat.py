"""`dera-merge chat`: λ turns in the middle of a conversation, and what each reply is computed from."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dera_merge import ModelPair, demo
from dera_merge.cli.chat import converse
from dera_merge.errors import DeraError
from dera_merge.playing.both import Both
from dera_merge.playing.chat import Conversation

FIRST, SECOND = "Is the Caszen kettle any good?", "And the Moston toaster?"


@pytest.fixture(scope="module", params=["lora", "dense"])
def both(request) -> Both:
    aligned = demo.ALIGNED_LORA if request.param == "lora" else demo.ALIGNED_DENSE
    return Both(ModelPair.from_pretrained(demo.REF, aligned))


def unheard(text: str) -> None:
    """Nobody listens."""


@pytest.fixture
def passes(both, monkeypatch):
    """How many tokens each forward pass of exact DeRa, and of the merged model, reads."""
    counts: list[int] = []

    def counted(model):
        forward = type(model).forward

        def count(self, input_ids, *args, **kwargs):
            if self is model:
                counts.append(input_ids.shape[1])
            return forward(self, input_ids, *args, **kwargs)

        # `generate` asks the signature, which is kept.
        count.__signature__ = inspect.signature(forward)
        monkeypatch.setattr(type(model), "forward", count)

    counted(both.exact)
    return counts


def template(*turns: str) -> str:
    """The demo's chat template, by hand: turns of user and assistant, and the assistant's beginning."""
    said = "".join(f"<|{'assistant' if n % 2 else 'user'}|>{turn}<|end|>" for n, turn in enumerate(turns))
    return said + "<|assistant|>"


@torch.no_grad()
def from_scratch(both: Both, lam: float, text: str, most: int) -> list[int]:
    """Greedy, token by token, from two models' logits over the whole text: no cache, nothing of `generate`."""
    ids = both.pair.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    while ids.shape[1] - start < most and (ids.shape[1] == start or int(ids[0, -1]) != 1):
        ref, aligned = (side(input_ids=ids).logits[:, -1].float() for side in both.exact.sides)
        ids = torch.cat([ids, ((1 - lam) * ref + lam * aligned).argmax(-1, keepdim=True)], -1)
    return ids[0, start:].tolist()


def test_after_lambda_turned_exact_goes_on_from_its_cache_and_says_what_it_says_from_scratch(both, passes):
    talk = Conversation(both, 0.5, max_new_tokens=24)
    one = talk.say(FIRST, unheard)
    decode = both.pair.tokenizer.decode
    assert one == decode(from_scratch(both, 0.5, template(FIRST), 24), skip_special_tokens=True)
    read = len(both.pair.tokenizer(template(FIRST), add_special_tokens=False)["input_ids"])
    assert passes[0] == read
    passes.clear()
    talk.lam = 3.0
    two = talk.say(SECOND, unheard)
    assert two == decode(from_scratch(both, 3.0, template(FIRST, one, SECOND), 24), skip_special_tokens=True)
    whole = len(both.pair.tokenizer(template(FIRST, one, SECOND), add_special_tokens=False)["input_ids"])
    assert passes[0] < whole - read, "the first turn and its reply are not read again"
    assert set(passes[1:]) <= {1}


def test_merged_reads_the_conversation_again_once_lambda_has_turned(both):
    talk = Conversation(both, 0.5, mode="merged", max_new_tokens=16)
    talk.say(FIRST, unheard)
    assert talk._kept.of == ("merged", 0.5)
    talk.lam = 2.0
    reply = talk.say(SECOND, unheard)
    with both.merged(2.0) as (model, at):
        text = template(FIRST, talk.turns[1]["content"], SECOND)
        ids = both.pair.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids.shape[1] - start < 16 and (ids.shape[1] == start or int(ids[0, -1]) != 1):
            ids = torch.cat([ids, model(input_ids=ids, **at).logits[:, -1].argmax(-1, keepdim=True)], -1)
    assert reply == both.pair.tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_again_is_the_last_reply_at_the_lambda_of_now(both):
    talk = Conversation(both, 0.0, max_new_tokens=24)
    talk.say(FIRST, unheard)
    talk.lam = 2.0
    again = talk.again(unheard)
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
    assert again == Conversation(both, 2.0, max_new_tokens=24).say(FIRST, unheard)
    with pytest.raises(DeraError, match="nothing has been said"):
        Conversation(both, 0.0).again(unheard)


def test_a_conversation_that_fills_the_context_is_told_so_and_can_begin_anew(both):
    talk = Conversation(both, 0.5, max_new_tokens=4)
    with pytest.raises(DeraError, match="begin a new one"):
        talk.say("kettle " * 300, unheard)
    assert talk.turns == [], "what was not answered was not said"
    talk.say(FIRST, unheard)


def test_a_stopped_reply_stays_as_far_as_it_came_and_is_gone_on_from(both):
    stop = threading.Event()
    talk = Conversation(both, 0.5, max_new_tokens=64)
    talk.say(FIRST, lambda _: stop.set(), stop)
    cut = talk.turns[-1]["content"]
    assert 0 < len(cut) < 60
    second = talk.say(SECOND, unheard)
    ids = from_scratch(both, 0.5, template(FIRST, cut, SECOND), 64)
    assert second == both.pair.tokenizer.decode(ids, skip_special_tokens=True)


def test_lines_are_said_or_obeyed_and_a_wrong_one_costs_one_line(both, capsys, tmp_path):
    file = tmp_path / "talk.json"
    talk = Conversation(both, 0.5, max_new_tokens=8)
    lines = ["", FIRST, "/lambda 1.5", "/mode merged", "/again", "/lambda x", "/lambda 0,1", "/nothing", "/mode best",
             f"/save {file}", f"/save {file}", f"/save {file}/in/it", "/save", "/help", "/quit", SECOND]  # fmt: skip
    converse(talk, iter(lines))
    said = capsys.readouterr()
    assert len(talk.turns) == 2, "after /quit nobody listens"
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 7
    assert "there is no /nothing" in errors[2]
    assert "in/it cannot be written: Not a directory" in errors[5]
    assert said.out.splitlines()[1].strip() == talk.turns[1]["content"].strip()
    saved = json.loads(file.read_text())
    assert saved["replies"] == [{"lambda": 1.5, "mode": "merged"}]
    assert [turn["role"] for turn in saved["messages"]] == ["user", "assistant"]


def test_ctrl_c_ends_the_reply_and_not_the_conversation(both, capsys):
    talk = Conversation(both, 0.5, max_new_tokens=64)
    say = talk.say

    def interrupted(text, hear, stop):
        def heard(piece):
            hear(piece)
            if not stop.is_set():
                signal.raise_signal(signal.SIGINT)

        return say(text, heard if text == FIRST else hear, stop)

    talk.say = interrupted
    handler = signal.getsignal(signal.SIGINT)
    converse(talk, iter([FIRST, SECOND]))
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(talk.turns) == 4
    assert capsys.readouterr().err.count("(stopped)") == 1


def test_a_system_turn_is_read_and_without_a_chat_template_there_is_a_text_that_goes_on(both):
    talk = Conversation(both, 0.5, max_new_tokens=8, system="Be brief.")
    assert both.pair.tokenizer.decode(talk._ids([{"role": "user", "content": "Hi"}])).startswith("<|system|>")
    template_text, both.pair.tokenizer.chat_template = both.pair.tokenizer.chat_template, None
    try:
        raw = Conversation(both, 0.5, max_new_tokens=8)
        reply = raw.say("The hotel is", unheard)
        ids = from_scratch(both, 0.5, "The hotel is", 8)
        assert reply == both.pair.tokenizer.decode(ids, skip_special_tokens=True)
        with pytest.raises(DeraError, match="no system's turn"):
            raw.system = "Be brief."
    finally:
        both.pair.tokenizer.chat_template = template_text


@pytest.mark.slow
def test_it_works_in_a_pipe_and_says_one_object_of_json():
    words = [sys.executable, "-m", "dera_merge", "chat", str(demo.REF), str(demo.ALIGNED_LORA), "-l", "0.5"]
    lines = f"{FIRST}\n/lambda 2\n{SECOND}\n"
    root = Path(__file__).parents[2]
    done = subprocess.run(words, input=lines, capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    done = subprocess.run([*words, "--json"], input=lines, capture_output=True, text=True, timeout=120, cwd=root)
    result = json.loads(done.stdout)
    assert [reply["lambda"] for reply in result["replies"]] == [0.5, 2]
