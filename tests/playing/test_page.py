"""The page of `dera-merge play` in a real browser: turned, typed, clicked, read, in two windows, on a phone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dera_merge import demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
ROOT = Path(__file__).parents[2]


class Served:
    """`dera-merge play`, running."""

    def __init__(self, *models: Path) -> None:
        words = [sys.executable, "-m", "dera_merge", "play", *map(str, models), "--json"]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
                                        env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
        self.url = json.loads(self.process.stdout.readline())["url"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    assert server.stop() == 130


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, url: str, width: int = 1200) -> sync_api.Page:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(url)
    says(page, "λ = 0.5. Under")
    return page


def says(page, words: str) -> str:
    """Wait until the line above the answers has these words."""
    sync_api.expect(page.locator("#note")).to_contain_text(words, timeout=60_000)
    return page.inner_text("#note")


def type_lambda(page, text: str) -> None:
    page.locator(".typed input").fill(text)


def test_nothing_comes_from_elsewhere_and_nothing_of_this_machine_is_told(served, browser):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    says(page, "λ = 0.5. Under")
    page.wait_for_selector("svg.chart")
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((served.url, "data:", "blob:"))] == []
    config = page.evaluate("fetch('config').then((answer) => answer.text())")
    for text in (config, page.content()):
        assert str(demo.FOLDER) not in text
        assert str(ROOT) not in text
    page.close()


def test_lambda_turns_by_slider_and_by_hand_and_the_text_with_it(served, browser):
    page = opened(browser, served.url)
    before = page.inner_text("#exact")
    slider = page.locator(".turn input[type=range]")
    slider.focus()
    for _ in range(30):
        slider.press("ArrowRight")
    assert "then part" in says(page, "λ = 2. Under")
    assert page.inner_text("#exact") != before
    assert page.locator(".typed input").input_value() == "2"
    assert "-l 2 -o merged-2" in page.locator("#command textarea, #command input").input_value()
    page.wait_for_selector("svg.chart")
    bar = page.locator(".chart .place").get_attribute("x1")
    type_lambda(page, "-3")
    says(page, "λ = -3. Under")
    assert slider.input_value() == "-1", "as far as it goes"
    page.wait_for_selector("svg.chart")
    assert page.locator(".chart .place").get_attribute("x1") != bar
    page.close()


def test_a_token_that_is_clicked_shows_what_each_model_would_have_said(served, browser):
    page = opened(browser, served.url)
    page.locator("#merged [data-n='3']").click()
    sync_api.expect(page.locator("#likeliest table")).to_be_visible()
    assert "Token 4 of the merged answer" in page.inner_text("#likeliest")
    page.locator("#exact [data-n='0']").focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#likeliest")).to_contain_text("Token 1 of the exact answer")
    assert page.locator("#likeliest tr").count() == 12
    page.get_by_label("log-ratio").check()
    sync_api.expect(page.locator("#legend")).to_contain_text("π_aligned")
    assert page.locator("#exact .more").count() > 0
    page.close()


def test_what_cannot_be_answered_is_said_in_one_line_and_the_next_thing_works(served, browser):
    page = opened(browser, served.url)
    prompt = page.locator("#prompt textarea")
    for text, words in (("", "empty"), ("word " * 4000, "shorten")):
        prompt.fill(text)
        page.click("#write")
        assert "\n" not in says(page, words).strip()
    prompt.fill("Is the Caszen kettle any good?")
    for value, words in (("", "no number"), ("1e9", "out of bounds")):
        type_lambda(page, value)
        says(page, words)
    type_lambda(page, "1")
    says(page, "λ = 1. Under")
    assert "kettle" in page.inner_text("#exact")
    page.close()


def test_another_seed_another_prompt_and_what_is_seen_is_kept(served, browser, tmp_path):
    page = opened(browser, served.url)
    before = page.inner_text("#exact")
    page.click("#other")
    page.wait_for_function("(was) => document.querySelector('#exact').innerText !== was", arg=before)
    says(page, "Under the same noise")
    with page.expect_download() as download:
        page.click("#as-json")
    state = json.loads(Path(download.value.path()).read_text())
    assert (state["seed"], state["lambda"]) == (1, 0.5)
    assert state["answers"]["exact"]["text"] in page.inner_text("#exact")
    page.wait_for_selector("svg.chart")
    with page.expect_download() as download:
        page.click("#as-html")
    download.value.save_as(tmp_path / "kept.html")
    kept = browser.new_page()
    kept.goto((tmp_path / "kept.html").as_uri())
    assert state["answers"]["exact"]["text"] in kept.inner_text("main")
    page.locator("#examples button").nth(2).click()
    sync_api.expect(page.locator("#exact")).to_contain_text("kettle", timeout=60_000)
    page.close()


@pytest.mark.parametrize("aligned", [None, demo.ALIGNED_DENSE], ids=["adapter", "dense"])
def test_two_windows_at_once_do_not_disturb_each_other(served, browser, aligned):
    server = Served(demo.REF, aligned) if aligned else served
    try:
        one, two = opened(browser, server.url), opened(browser, server.url)
        alone = {}
        for lam in ("-1", "2"):
            type_lambda(one, lam)
            says(one, f"λ = {lam}. Under")
            alone[lam] = one.inner_text("#exact") + one.inner_text("#merged")
        type_lambda(one, "-1")
        type_lambda(two, "2")
        says(one, "λ = -1. Under")
        says(two, "λ = 2. Under")
        assert one.inner_text("#exact") + one.inner_text("#merged") == alone["-1"]
        assert two.inner_text("#exact") + two.inner_text("#merged") == alone["2"]
        two.close()  # in the middle of a text, say
        type_lambda(one, "1")
        says(one, "λ = 1. Under")
        one.close()
    finally:
        if aligned:
            server.stop()


def test_it_fits_a_phone(served, browser):
    page = opened(browser, served.url, width=390)
    page.wait_for_selector("svg.chart")
    page.locator("#exact [data-n='3']").click()
    sync_api.expect(page.locator("#likeliest table")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_server_that_is_stopped_is_told_of_and_what_was_read_stays(browser):
    server = Served()
    page = opened(browser, server.url)
    text = page.inner_text("#exact")
    server.stop()
    time.sleep(1)
    type_lambda(page, "2")
    sync_api.expect(page.locator("#gone")).to_contain_text("The server has stopped", timeout=60_000)
    assert page.inner_text("#exact") == text
    page.close()


def test_the_space_starts_and_answers(browser):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": "7959", "PYTHONPATH": str(ROOT)}
    space = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT / "space", env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        page = browser.new_page()
        for _ in range(120):
            try:
                page.goto("http://127.0.0.1:7959")
                break
            except sync_api.Error:
                assert space.poll() is None
                time.sleep(0.5)
        says(page, "λ = 0.5. Under")
        page.close()
    finally:
        space.send_signal(signal.SIGINT)
        space.wait(30)
