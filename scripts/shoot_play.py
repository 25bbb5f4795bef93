"""docs/play.png: the page of `dera-merge play` as it is, at λ = 2, with a token clicked.

    python scripts/shoot_play.py [-o docs/play.png] [--dark] [--width 1100]

Needs the extras `play` and `images`, playwright, and chromium. Colours are made a palette: 200 kB at most.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

LAMBDA, SIDE, TOKEN = "2", "exact", 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/play.png"))
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1100)
    chosen = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-m", "dera_merge", "play", "--json"], stdout=subprocess.PIPE, text=True)
    try:
        url = json.loads(server.stdout.readline())["url"]
        shot = _shot(url, chosen.width, chosen.dark)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    picture = Image.open(BytesIO(shot)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    picture.save(chosen.output, optimize=True)
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1000:.0f} kB, {picture.width} × {picture.height}")


def _shot(url: str, width: int, dark: bool) -> bytes:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(url)
        expect(page.locator("#note")).to_contain_text("Under the same noise", timeout=60_000)
        page.locator(".typed input").fill(LAMBDA)
        expect(page.locator("#note")).to_contain_text(f"λ = {LAMBDA}. Under", timeout=60_000)
        page.wait_for_selector("svg.chart")
        page.locator(f"#{SIDE} [data-n='{TOKEN}']").click()
        expect(page.locator("#likeliest table")).to_be_visible()
        page.wait_for_timeout(500)
        shot = page.screenshot(full_page=True)
        browser.close()
        return shot


if __name__ == "__main__":
    main()
