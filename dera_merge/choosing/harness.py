"""lm-evaluation-harness: its tasks, the requests that they make, and what they make of answers.

Requests, metrics and their aggregation are the harness's own; only the answers come from elsewhere. So a score here is
what the harness itself reports of a model that gives these answers.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DeraError
from ..models import doors
from ..models.pair import Pair
from ..statistics.paired import Form, resampled, resampled_ratios

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234  # the harness's own default
READ = ("loglikelihood", "loglikelihood_rolling")  # kinds of requests that are answered by reading
Pairs = list[tuple[tuple[int, ...], tuple[int, ...]]]  # context and continuation, as token ids
Answer = Callable[[Pairs], tuple[np.ndarray, np.ndarray]]
Items = dict[str, list[Any]]  # metric → what it is made of, one value for each item


def check() -> None:
    """Raises DeraError where the harness is not installed, or is too old."""
    try:
        from lm_eval.api.group import Group  # noqa: F401
        from lm_eval.models.huggingface import HFLM  # noqa: F401
        from lm_eval.tasks import TaskManager

        TaskManager.load  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise DeraError(f"tasks need lm-eval ({error}): pip install 'lm-eval>=0.4.12'") from error
    doors.check("benchmarks")


def installed() -> str:
    """The harness's version."""
    return version("lm_eval")


class Suite:
    """The tasks that were asked for, with their requests.

    Args:
        names: of tasks, groups and tags.
        include_path: a directory with task files of one's own.
        num_fewshot: examples before each question, where a task does not forbid them; default: what each task says.

    Attributes:
        tasks, groups: by name.
        part_of: the group that a task or group is in, by its name.

    Raises:
        DeraError: a name is not known, or data cannot be loaded.
    """

    def __init__(
        self, names: Sequence[str], include_path: Path | None = None, num_fewshot: int | None = None
    ) -> None:
        loaded = _loaded(names, include_path)
        self.tasks: dict[str, Task] = loaded["tasks"]
        self.groups: dict[str, Any] = loaded.get("groups", {})
        families = loaded.get("group_map", {})
        self.part_of = {child: group for group, children in families.items() for child in children}
        for name, task in self.tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                raise DeraError(f"the task {name} runs code that a model wrote, which bench does not")
            if getattr(task, "MULTIMODAL", False):
                raise DeraError(f"the task {name} shows images, which bench cannot yet; use lm_eval on a merged model")
            own = task.get_config("num_fewshot")
            if num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def build(self, lm: HFLM, limit: int | None, chat: bool) -> None:
        """Make the requests of each task, of its first `limit` items. Raises DeraError where a task cannot."""
        for name, task in self.tasks.items():
            # Its own bar goes nowhere.
            with _named(f"the task {name} makes no requests"), contextlib.redirect_stderr(io.StringIO()):
                task.build_all_requests(
                    limit=limit, rank=0, world_size=1, apply_chat_template=chat, fewshot_as_multiturn=chat,
                    chat_template=lm.apply_chat_template if chat else None,
                    tokenizer_name=lm.tokenizer_name if chat else "",
                )  # fmt: skip
            if unknown := {request.request_type for request in task.instances} - {*READ, "generate_until"}:
                raise DeraError(f"the task {name} asks for {unknown.pop()}, which bench cannot answer")

    def requests(self, kind: str) -> list[Instance]:
        """All requests of a kind, in the order of tasks."""
        return [request for task in self.tasks.values() for request in task.instances if request.request_type == kind]

    def fingerprint(self) -> str:
        """SHA-256 of all requests."""
        digest = hashlib.sha256()
        for task in self.tasks.values():
            for request in task.instances:
                digest.update(repr((request.request_type, request.arguments)).encode())
        return digest.hexdigest()

    def items(self, name: str, answer: Callable[[Instance], Any]) -> Items:
        """What a task makes of an answer to each of its requests."""
        task = self.tasks[name]
        by_item: dict[int, list[Instance]] = defaultdict(list)
        for request in task.instances:
            request.resps = [answer(request)] * (request.repeats or 1)
            by_item[request.doc_id].append(request)
        task.apply_filters()
        found: Items = defaultdict(list)
        for requests in by_item.values():
            requests.sort(key=lambda request: request.idx)
            for key in requests[0].filtered_resps:
                with _named(f"the task {name} cannot judge an answer"):
                    results = task.process_results(requests[0].doc, [each.filtered_resps[key] for each in requests])
                for metric, value in results.items():
                    found[metric if key == "none" else f"{metric},{key}"].append(value)
        return dict(found)

    def higher_is_better(self, name: str, metric: str) -> bool:
        """Of a task's metric; of a group's, as its first task has it."""
        task = self.tasks[name] if name in self.tasks else self.groups[name].get_all_tasks()[0]
        return task.higher_is_better().get(metric.partition(",")[0]) is not False

    def score(self, name: str, metric: str, columns: Sequence[list[Any]], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A task's metric under each setting, and of resampled items.

        Args:
            columns: for each setting, what the metric is made of, one value for each item.

        Returns:
            (settings,), and (draws, settings); no draws of fewer than two items.
        """
        from lm_eval.api import metrics

        aggregate = self.tasks[name].aggregation().get(metric.partition(",")[0], metrics.mean)
        with _named(f"the task {name} cannot make its {metric} of its items"):
            value = np.array([aggregate(column) for column in columns], dtype=float)
        count = len(columns[0])
        if count < 2:
            return value, np.empty((0, len(columns)))
        if (form := _forms().get(aggregate)) is None:
            draws = resampled(count, lambda at: [aggregate([column[i] for i in at]) for column in columns], seed)
            return value, draws
        pairs = np.array(columns, dtype=float).reshape(len(columns), count, -1)  # (settings, items, 1 or 2)
        weights = pairs[0, :, 1] if pairs.shape[2] == 2 else np.ones(count)
        return value, form(resampled_ratios(pairs[:, :, 0].T, weights, seed))

    def group_score(self, name: str, metric: str, of_tasks: dict[str, tuple[np.ndarray, int]]) -> np.ndarray | None:
        """A group's metric, made of those of its tasks, arrays of any one shape; None where the group has no such.

        Args:
            of_tasks: task → its metric, and how many items it has.
        """
        key = metric if "," in metric else f"{metric},none"
        rows = {task: {key: value, "sample_len": count} for task, (value, count) in of_tasks.items()}
        return self.groups[name].aggregate(rows).get(key)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Makes a DeraError of whatever the harness, or a task's own code, raises."""
    try:
        yield
    except Exception as error:
        raise DeraError(f"{what}: {type(error).__name__}: {error}") from error


def manager_of(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """What knows these tasks; of the harness's thousands of task files only where one's own do not have them.

    Raises:
        DeraError: there is no such task, or no directory of one's own.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise DeraError(f"{include_path} is no directory with task files")
    own = None if include_path is None else TaskManager(include_path=include_path, include_defaults=False)
    whole = own is not None and all(name in own.all_tasks for name in names)
    manager = own if whole else TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            mine = f"; {include_path} has {', '.join(sorted(own.all_tasks)[:8])}" if own and own.all_tasks else ""
            meant = f"; did you mean {', '.join(near)}?" if near else f"{mine}; lm_eval ls tasks lists its own"
            raise DeraError(f"lm-eval knows no task {name}{meant}")
    return manager


def _loaded(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """The harness's tasks of these names."""
    import datasets

    datasets.disable_progress_bars()
    manager = manager_of(names, include_path)
    with _named(f"the tasks {', '.join(names)} cannot be loaded"):  # a network, a data set
        return manager.load(list(names))


def _forms() -> dict[Callable[..., Any], Form]:
    """The harness's aggregations that are made of Σ values / Σ weights."""
    from lm_eval.api import metrics

    return {
        metrics.mean: lambda ratio: ratio,
        metrics.perplexity: lambda ratio: np.exp(-ratio),
        metrics.weighted_perplexity: lambda ratio: np.exp(-ratio),
        metrics.bits_per_byte: lambda ratio: -ratio / np.log(2),
    }


def reader(pair: Pair, answer: Answer) -> HFLM:
    """The harness's own model for transformers, whose tokens `answer` reads: it has many log-probabilities at once.

    `loglikelihood` gives for each request log-probabilities (settings,) and whether each is greedy's (settings,);
    `loglikelihood_rolling` the sums over windows.

    It has the pair's tokenizer and its architecture, and no weights.

    Args:
        answer: (context, continuation) pairs of token ids → arrays (pairs, settings), float64 and bool.
    """
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[Any]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            if any(not 0 < len(continuation) <= self.max_length for _, continuation in pairs):
                raise DeraError(f"a continuation is empty, or longer than the {self.max_length} tokens of the models")
            whole = [((*c, *y)[-(self.max_length + 1) :], len(y)) for c, y in pairs]  # cut as the harness does
            logp, greedy = answer([(ids[:-length], ids[-length:]) for ids, length in whole])
            return list(zip(logp, greedy, strict=True))

    with quiet():
        return Reader(
            pretrained=pair.architecture.model, tokenizer=pair.tokenizer, max_length=pair.context_length,
            batch_size=1 << 30,
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the warnings of the harness's model back: it is given a model, and remarks on that."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
