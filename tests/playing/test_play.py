"""`dera-merge play` without a browser: what it writes, what it says of each token, and that sessions share nothing."""

from __future__ import annotations

import json
import threading
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from dera_merge import ModelPair, demo
from dera_merge.errors import DeraError
from dera_merge.pages import play
from dera_merge.playing.answers import MOST_PROMPT_TOKENS, Asked, answers
from dera_merge.playing.both import Both
from dera_merge.playing.page import Desk, build, launching
from dera_merge.playing.reading import curve, pieces_of, read, seen

PROMPT = "Write a short review of the Marwick Inn."


@pytest.fixture(scope="module")
def lora() -> Both:
    return Both(ModelPair.from_pretrained(demo.REF, demo.ALIGNED_LORA))


@pytest.fixture(scope="module")
def dense() -> Both:
    return Both(ModelPair.from_pretrained(demo.REF, demo.ALIGNED_DENSE))


@pytest.fixture(params=["lora", "dense"])
def both(request) -> Both:
    return request.getfixturevalue(request.param)


def written(both: Both, lam: float, tokens: int = 24, seed: int = 0) -> tuple[Asked, list[int], dict[str, list[int]]]:
    asked = Asked(PROMPT, lam, seed, tokens)
    ids = asked.ids(both.pair)
    return asked, ids, list(answers(both, asked, ids))[-1]


@cache
def loaded(adapted: bool) -> torch.nn.Module:
    """The reference, or the LoRA on it, in float64: nothing of ours."""
    base = AutoModelForCausalLM.from_pretrained(demo.REF, dtype=torch.float64)
    return (PeftModel.from_pretrained(base, demo.ALIGNED_LORA).double() if adapted else base).eval()


def logits_at(times: float, ids: torch.Tensor) -> torch.Tensor:
    """Logits of θ_ref + times·Δ, by PEFT's own scale."""
    model = loaded(times != 0)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    own = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling = {name: times * scale for name, scale in layer.scaling.items()}
    logits = model(ids).logits[0]
    for layer, scaling in zip(layers, own, strict=True):
        layer.scaling = scaling
    return logits


@torch.no_grad()
def log_p(lam: float, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """log π of reference, aligned, exact and merged at each token: (4, tokens, vocabulary), float64."""
    ids = torch.tensor([prompt + tokens])
    places = slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)
    ref, aligned, merged = (logits_at(times, ids)[places].double() for times in (0.0, 1.0, lam))
    mixed = (1 - lam) * ref + lam * aligned
    return torch.stack([ref, aligned, mixed, merged]).log_softmax(-1).numpy()


@pytest.mark.parametrize("lam", [2.0, -3.0])
def test_what_is_said_of_a_token_is_what_four_models_in_float64_say(lora, lam):
    asked, ids, both_texts = written(lora, lam)
    state = seen(lora, asked, both_texts, read(lora, ids, both_texts, lam))
    for side, tokens in both_texts.items():
        logs = log_p(lam, ids, tokens)
        p = np.exp(logs)
        for n, token in enumerate(state["answers"][side]["tokens"]):
            own = logs[:, n, tokens[n]]
            assert token["token"] == tokens[n]
            assert token["kl"] == pytest.approx((p[2, n] * (logs[2, n] - logs[3, n])).sum(), rel=1e-3, abs=1e-6)
            assert token["log_ratio"][0] == pytest.approx(own[1] - own[0], abs=1e-3)
            assert list(token["p"].values()) == pytest.approx(np.exp(own), rel=1e-3, abs=1e-6)
            for model, ten in enumerate(token["likeliest"].values()):
                assert [share for _, share in ten] == pytest.approx(np.sort(p[model, n])[:-11:-1], rel=1e-3, abs=1e-6)
                assert ten[0][0] == lora.pair.tokenizer.decode([int(p[model, n].argmax())])


def test_the_two_answers_part_where_the_distributions_do_and_nowhere_at_the_ends(both):
    for lam in (0.0, 1.0):
        _, _, texts = written(both, lam)
        assert texts["exact"] == texts["merged"]
    asked, ids, texts = written(both, 2.0, 40)
    state = seen(both, asked, texts, read(both, ids, texts, 2.0))
    if both.exact.rows is None:  # the dense pair's shift is too small to change a token here
        assert state["part_at"] is None
        return
    place = state["part_at"]
    assert texts["exact"][:place] == texts["merged"][:place]
    assert texts["exact"][place] != texts["merged"][place]
    assert "then part" in play.said(state)


def test_noise_is_that_of_the_seed(lora):
    assert written(lora, 0.5, seed=3)[2] == written(lora, 0.5, seed=3)[2] != written(lora, 0.5, seed=4)[2]


@torch.no_grad()
def test_the_curve_passes_through_what_was_measured_and_is_near_what_other_merges_measure(lora):
    asked, ids, texts = written(lora, 0.5, 64)
    reads = read(lora, ids, texts, 0.5)
    state = seen(lora, asked, texts, reads)
    rows = curve(reads["exact"], lora, [0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    assert [row["kl"] for row in rows if row["lambda"] in (0.0, 1.0)] == [0.0, 0.0]
    assert rows[2]["kl"] == pytest.approx(state["answers"]["exact"]["kl"], rel=1e-6)
    for row in rows:
        ref, _, exact, merged = log_p(row["lambda"], ids, texts["exact"])
        p = np.exp(exact)
        assert row["kl_ref"] == pytest.approx((p * (exact - ref)).sum(-1).mean(), rel=1e-3, abs=1e-6)
        if row["lambda"] in (0.25, 0.75, 1.5):
            assert 1 / 3 < row["kl"] / (p * (exact - merged)).sum(-1).mean() < 3


def test_at_an_end_the_curve_comes_from_a_merge_that_says_something(both):
    _, ids, texts = written(both, 1.0)
    reads = read(both, ids, texts, 1.0)
    assert reads["exact"].probe[0] == 0.5
    assert curve(reads["exact"], both, [0.5])[0]["kl"] > 0


def test_two_sessions_at_once_read_what_each_reads_alone(both):
    alone = {lam: written(both, lam, 32)[2] for lam in (-1.0, 2.0)}
    together: dict[float, dict] = {}
    threads = [threading.Thread(target=lambda lam=lam: together.update({lam: written(both, lam, 32)[2]})) for lam in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_text_that_is_not_wanted_any_more_ends_at_once(lora):
    asked = Asked(PROMPT, 0.5, 0, 128)
    so_far = answers(lora, asked, asked.ids(lora.pair))
    next(so_far)
    so_far.close()
    assert threading.active_count() < 10
    stop = threading.Event()
    count = 0
    for now in answers(lora, asked, asked.ids(lora.pair), stop):
        stop.set()
        count = max(map(len, now.values()))
    assert 1 <= count < 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " \n"}, "empty"), ({"prompt": "word " * 4000}, "shorten"), ({"prompt": "x" * 20_001}, "characters"),
        ({"lam": float("nan")}, "out of bounds"), ({"lam": 1e9}, "out of bounds"), ({"seed": -1}, "seed"),
        ({"max_new_tokens": 100_000}, "new tokens"), ({"max_new_tokens": 0}, "new tokens"),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_said_in_one_line(lora, change, words):
    with pytest.raises(DeraError, match=words) as caught:
        Asked(**{"prompt": PROMPT, "lam": 0.5, **change}).ids(lora.pair)
    assert "\n" not in str(caught.value)
    assert MOST_PROMPT_TOKENS >= 2048


def test_the_texts_of_tokens_add_up_to_the_answer_whatever_bytes_they_hold(lora):
    tokenizer = lora.pair.tokenizer
    ids = tokenizer("I loved the café 🙂, naïve as it is.")["input_ids"]
    pieces = pieces_of(ids, tokenizer)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) == len(ids)


SETTINGS = (PROMPT, True, 0, 24)


def last(changes) -> dict:
    """What a page shows in the end."""
    shown = {}
    for change in changes:
        shown |= change
    return shown


def test_the_desk_shows_both_answers_and_then_what_parts_them(lora):
    desk = Desk(lora, 'dera-merge merge "$REF" "$ALIGNED"')
    frames = list(desk.write("me", "KL", *SETTINGS, 2.0))
    shown = last(frames)
    state = shown["seen"]
    assert frames[0]["command"] == 'dera-merge merge "$REF" "$ALIGNED" -l 2 -o merged-2'
    assert shown["exact"].count("data-n=") == len(state["answers"]["exact"]["tokens"])
    assert "<svg" in shown["chart"]
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    table = play.likeliest(state, "merged", 3)
    assert table.count("<tr") == 12
    for model in ("reference", "aligned", "exact", "merged"):
        assert f"<th>{model}</th>" in table


def test_turning_ends_a_text_and_asking_for_the_same_again_does_not(lora):
    desk = Desk(lora, "")
    run = desk.write("me", "KL", *SETTINGS[:3], 200, 0.5)
    next(run)
    next(run)
    desk.turn("me", *SETTINGS[:3], 200, 0.5)
    desk.turn("another", *SETTINGS[:3], 200, 0.7)
    assert not next(run)["note"].startswith("λ = 0.5. ")
    desk.turn("me", *SETTINGS[:3], 200, 0.7)
    assert last(run).get("seen") is None, "nobody waits for what is read of it"
    stopped = desk.write("me", "KL", *SETTINGS[:3], 200, 0.5)
    shown = {}
    for number, change in enumerate(stopped):
        shown |= change
        if number == 2:
            desk.stop("me")
    assert shown["seen"]["answers"]["exact"]["ended"] is False, "what was stopped is still read"


def test_a_page_that_ends_waits_for_what_is_being_written(lora):
    desk = Desk(lora, "")
    run = desk.write("me", "KL", *SETTINGS[:3], 200, 0.5)
    next(run)
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(run))
    reader.start()
    desk.close()
    reader.join(0.5)
    assert not reader.is_alive()
    assert last(shown).get("seen") is None


def test_errors_stand_on_the_page_and_name_no_path(lora, monkeypatch):
    desk = Desk(lora, "")
    assert "empty" in last(desk.write("me", "KL", "", *SETTINGS[1:], 0.5))["note"]
    assert "λ is no number" in last(desk.write("me", "KL", *SETTINGS, None))["note"]

    def fails(*_, **__):
        raise DeraError(f"{demo.REF}/model.safetensors and {demo.ALIGNED_LORA} cannot be read <b>")

    monkeypatch.setattr("dera_merge.playing.page.read", fails)
    note = last(desk.write("me", "KL", *SETTINGS, 0.5))["note"]
    assert "REF/model.safetensors and ALIGNED cannot be read &lt;b&gt;" in note
    monkeypatch.setattr("dera_merge.playing.page.read", lambda *_, **__: 1 / 0)
    note = last(desk.write("me", "KL", *SETTINGS, 0.5))["note"]
    assert "ZeroDivisionError" in note
    assert last(desk.write("me", "KL", *SETTINGS, 0.5))["seen"] is None


def test_what_is_saved_is_one_page_without_anything_from_elsewhere_or_live_markup(lora):
    desk = Desk(lora, "")
    state = last(desk.write("me", "KL", "<script>alert(1)</script> kettle", *SETTINGS[1:], 1.5))["seen"]
    page = play.html(state, "dera-merge merge …")
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert str(demo.FOLDER) not in page
    assert page.count("<details>") == 2 + sum(len(side["tokens"]) for side in state["answers"].values())


def test_several_aligned_models_have_a_slider_and_a_curve_each():
    both = Both(ModelPair.from_pretrained(demo.REF, [demo.ALIGNED_LORA, demo.ALIGNED_BRIEF]))
    desk = Desk(both, "merge")
    shown = last(desk.write("me", "log-ratio 2", *SETTINGS, 0.5, 0.25))
    assert shown["seen"]["lambda"] == (0.5, 0.25)
    assert shown["chart"].count("<svg") == 2
    assert len(shown["seen"]["answers"]["exact"]["tokens"][0]["log_ratio"]) == 2
    assert "aligned model 2" in shown["legend"]
    assert "-l 0.5+0.25 " in shown["command"]
    blocks = build(both.pair, desk, ["Hello"], (0.5, 0.25))
    labels = [part["props"].get("label") for part in blocks.get_config_file()["components"] if part["type"] == "slider"]
    assert labels[:2] == ["λ of aligned model 1", "λ of aligned model 2"]
    assert "LAMBDA" not in play.html(json.loads(json.dumps(shown["seen"])), "")


def test_the_page_says_nothing_of_this_machine_and_listens_where_it_is_told(lora):
    config = json.dumps(build(lora.pair, Desk(lora, 'merge "$REF"'), ["Hello"], [0.5]).get_config_file(), default=str)
    for side in lora.pair.sides:
        assert str(side.source.folder) not in config
        assert side.source.name not in config
    how = launching("127.0.0.1", 7000)
    assert how["server_name"] == "127.0.0.1"
    assert how["share"] is False
    assert "googleapis" not in str(how["theme"]._stylesheets) + how["css"]


def test_the_space_asks_for_what_the_package_and_its_page_need():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["play"]}
    lines = (root / "space" / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("-")} == wanted
