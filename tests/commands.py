"""The command line as processes of its own that start quickly: each is forked off one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
if FORKS:
    _forkserver = multiprocessing.get_context("forkserver")
    _forkserver.set_forkserver_preload(
        ["dera_merge.cli", "dera_merge.measuring.compare", "dera_merge.calibrating.calibrate", "dera_merge.texts.generate",
         "dera_merge.choosing.sweep", "dera_merge.tour", "peft",
         "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg"]
    )  # fmt: skip


class Started:
    """`dera-merge` at work, in a process that can be sent signals; `limit`: bytes of a file that it may write."""

    def __init__(self, folder: Path, *arguments: object, cwd: Path | None = None, limit: int | None = None) -> None:
        self._streams = [str(folder / f"{name}-{len(list(folder.iterdir()))}") for name in ("stdout", "stderr")]
        for stream in self._streams:
            Path(stream).touch()
        self._process = _forkserver.Process(
            target=_main, args=(list(map(str, arguments)), self._streams, dict(os.environ), cwd, limit)
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        """What it has written to stderr."""
        return Path(self._streams[1]).read_text()

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it wrote to stderr."""
        self._process.join(300)
        return self._process.exitcode, self.said


def run(
    *arguments: object, cwd: Path | None = None, environment: dict[str, str] | None = None, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`dera-merge` (or Python code) with these arguments, its exit status and what it wrote to stdout and stderr."""
    words, environment = list(map(str, arguments)), dict(os.environ) if environment is None else environment
    if not FORKS:
        command = [sys.executable, *(["-m", "dera_merge"] if code is None else ["-c", code]), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, cwd=cwd, env=environment
        )
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        process = _forkserver.Process(target=_main, args=(words, streams, environment, cwd, None, code))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, 300)
        written = [Path(stream).read_text() for stream in streams]
    return subprocess.CompletedProcess(words, process.exitcode, *written)


def _main(
    arguments: list[str],
    streams: list[str],
    environment: dict[str, str],
    cwd: Path | None,
    limit: int | None = None,
    code: str | None = None,
) -> None:
    os.environ.clear()  # what it was forked off has that of an earlier test
    os.environ |= environment
    for module in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[module]  # it reads the environment as it is imported
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    if cwd:
        os.chdir(cwd)
    sys.argv = ["dera-merge", *arguments]
    if code is not None:
        return exec(code, {"__name__": "__main__"})
    from dera_merge.cli import main

    main()
