"""Serving engines as real processes on loopback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START = 240  # seconds
ROOT = Path(__file__).parents[2]


def documented(heading: str) -> list[str]:
    """The shell commands of a section of docs/serving.md, in order, the one that copies the demo pair first."""
    text = (ROOT / "docs" / "serving.md").read_text().replace("\\\n", " ")
    begin, section = text.split("\n## ", 1)[0], text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```bash\n(.*?)```", begin + section, re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def shell(command: str, cwd: Path) -> str:
    """What a command of the docs prints, run where the demo pair is in `demo/`."""
    if not (cwd / "demo").exists():
        (cwd / "demo").symlink_to(ROOT / "dera_merge" / "demo")
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@contextmanager
def serving(command: Sequence[object], log: Path, cwd: Path | None = None, **environment: str) -> Iterator[str]:
    """Run `command … --port N` until the block ends; gives its address once /health answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in (*command, "--host", "127.0.0.1", "--port", port)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **environment}, cwd=cwd,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", process, log)
        yield address
    finally:
        for kill, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            try:
                os.killpg(process.pid, kill)
                process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"no answer from {address}:\n" + "\n".join(log.read_text().splitlines()[-30:]))


def metric(address: str, name: str) -> float:
    """The sum of one of vLLM's counters."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([\d.e+]+)$", text, re.M))
