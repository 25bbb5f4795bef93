"""Sampling from exact DeRa by a vLLM server, where that is faster; texts are scored here as ever.

The server is one of what `export-exact` writes, found by its address, or started for as long as it is needed. Before it
is believed it must give this pair's log-probabilities.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeraError
from .export import export_exact

if TYPE_CHECKING:
    from ..decoding.exact import DeraForCausalLM
    from ..models.pair import Pair
    from ..texts.prompts import Prompt

PATIENCE = 600.0  # seconds for one answer
START = 1800.0  # seconds until a server that we start must answer
CHECKED, CHECKED_TOKENS = 8, 32  # prompts, and tokens of an answer to each, on which a server is checked
CLOSE = 0.25  # nats: how far an answer's log-probabilities may be from ours, in the mean; bfloat16 is much nearer


class Engine:
    """A vLLM server of a pair's exact mixture: a `Sampler`.

    Args:
        address: such as `http://localhost:8000`.

    Raises:
        DeraError: nothing answers there, or not as a vLLM server does.
    """

    at_once = 256  # requests; the server queues what it cannot take

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")
        models = self._asked("models").get("data") or []
        if not models or not isinstance(models[0].get("id"), str):
            raise DeraError(
                f"{self.address} serves no model; start it with vllm serve DIR of an export-exact directory"
            )
        self.model: str = models[0]["id"]

    def check(self, exact: DeraForCausalLM, prompts: Sequence[list[int]]) -> None:
        """Make sure that the server's log-probabilities are those of `exact`, on answers of its own at two λ.

        On answers, because models of one family may agree on a prompt, which neither was trained to say; to several
        prompts, because some answers begin alike. A pair that hardly differs cannot be told from its reference.

        Raises:
            DeraError: on some answer they are not; another pair or an ordinary model is served there.
        """
        for ids, lam in ((ids, lam) for ids in prompts[:CHECKED] for lam in (0.0, 2.0)):
            choice = self._complete(ids, lam, CHECKED_TOKENS, logprobs=0)
            new, theirs = choice["token_ids"], torch.tensor(choice["logprobs"]["token_logprobs"])
            with torch.inference_mode():
                logits = exact(torch.tensor([[*ids, *new]], device=exact.device), lam=lam).logits[0, len(ids) - 1 : -1]
            ours = torch.log_softmax(logits.float(), -1).cpu().gather(1, torch.tensor(new)[:, None])[:, 0]
            apart = (ours - theirs).abs().mean().item()
            if not apart < CLOSE:
                raise DeraError(
                    f"{self.address} does not serve exact DeRa of this pair: at λ={lam:g} its log-probabilities are "
                    f"{apart:.2g} nats from ours; serve what export-exact writes of it"
                )

    def sample(
        self,
        prompts: Sequence[Prompt],
        lams: Sequence[float],
        streams: Sequence[int] = (),
        *,
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """One text a prompt at temperature 1, without any warper, each at its λ.

        The noise is the server's own: another run gives other texts. (A seed for each request would help little, as
        batches change rounding, and vLLM 0.32 on CPUs dies of one where a prompt is read in chunks.)

        Args:
            prompts: to answer.
            lams: λ of each.
            streams: not looked at.
            max_new_tokens: length limit, in tokens.
            progress: called with the number of texts done.

        Returns:
            The new tokens of each, an end token included, nothing after it.

        Raises:
            DeraError: the server refuses a request or cannot be reached any more.
        """
        new: list[list[int]] = []
        tasks = [(prompt.ids, lam) for prompt, lam in zip(prompts, lams, strict=True)]
        with ThreadPoolExecutor(self.at_once) as threads:
            answers = threads.map(lambda task: self._complete(*task, max_new_tokens), tasks)
            for answer in answers:
                new.append(answer["token_ids"])
                if progress:
                    progress(len(new))
        return new

    def _complete(self, ids: list[int], lam: float, new: int, **settings: Any) -> dict[str, Any]:
        """One answer of at most `new` tokens. Gives every setting that a checkpoint's generation config might bring."""
        body = {
            "model": self.model, "prompt": ids, "max_tokens": new, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "return_token_ids": True, "vllm_xargs": {"lambda": lam}, **settings,
        }  # fmt: skip
        return self._asked("completions", body)["choices"][0]

    def _asked(self, endpoint: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The server's answer to a GET, or with a body to a POST. Raises DeraError where it gives none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/v1/{endpoint}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            raise DeraError(f"{self.address} refuses (status {error.code}): {_reason(error):.300}") from error
        except OSError as error:
            raise DeraError(f"{self.address} cannot be asked: {getattr(error, 'reason', error)}") from error
        except ValueError as error:
            raise DeraError(f"{self.address} answers, but not as a vLLM server does") from error
        if not isinstance(content, dict):
            raise DeraError(f"{self.address} answers, but not as a vLLM server does")
        return content


def _reason(error: urllib.error.HTTPError) -> str:
    """What the server says of an error."""
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return error.reason


@contextmanager
def engine(
    where: str | None, pair: Pair, exact: Callable[[], DeraForCausalLM], prompts: Sequence[Prompt],
    max_new_tokens: int, dtype: torch.dtype | str,
) -> Iterator[Engine | None]:  # fmt: skip
    """The engine at an address, or `"vllm"`: one that is started here, and stopped at the end; or None.

    Args:
        where: the address, `"vllm"`, or None.
        pair: what it must serve.
        exact: gives the pair's own mixture, which the engine is checked against.
        prompts, max_new_tokens: what it will be asked, in tokens: how much a started engine must take.
        dtype: what a started engine computes in.

    Raises:
        DeraError: it cannot be reached or started, or serves something else.
    """
    if where is None:
        yield None
        return
    pair.only_pair("--engine is")
    if any(prompt.shown for prompt in prompts):
        raise DeraError("--engine samples texts of prompts without images; leave it out where prompts show some")
    with ExitStack() as stack:
        address = where
        if where == "vllm":
            longest = max(len(prompt.ids) for prompt in prompts) + max(max_new_tokens, CHECKED_TOKENS)
            address = stack.enter_context(_started(pair, dtype, longest))
        elif not where.startswith(("http://", "https://")):
            raise DeraError(
                f"--engine {where!r} is neither vllm nor the address of a vLLM server such as http://localhost:8000"
            )
        served = Engine(address)
        served.check(exact(), [prompt.ids for prompt in prompts])
        yield served


@contextmanager
def _started(pair: Pair, dtype: torch.dtype | str, longest: int) -> Iterator[str]:
    """The address of a server of the pair that takes `longest` tokens; it runs until the context ends."""
    if find_spec("vllm") is None:
        raise DeraError("vLLM is not installed in this environment; start a server elsewhere and give its address")
    with tempfile.TemporaryDirectory(prefix="dera-merge-") as folder, socket.socket() as free:
        place = Path(folder)
        export_exact(pair, place / "exact")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        memory = ["--gpu-memory-utilization", "0.5"] * torch.cuda.is_available()  # the scoring wants the rest
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place / "exact"),
            "--dtype", str(dtype).removeprefix("torch."), "--max-model-len", str(longest + 1), "--host", "127.0.0.1",
            "--port", str(port), *memory,
        ]  # fmt: skip
        with (place / "log").open("w+") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            try:
                address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
                while not _healthy(address):
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        said = [line for line in log.read().splitlines() if "Error" in line] or ["it gave no reason"]
                        raise DeraError(f"vLLM could not be started: {said[-1]:.300}")
                    time.sleep(0.5)
                yield address
            finally:
                server.terminate()
                try:
                    server.wait(30)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False
