"""A few threads that work ahead, and results in the order of the tasks.

Reading, arithmetic, writing and hashing all leave Python's lock, so that threads keep the cores and the disk busy
together. The order of the results, and the arithmetic within one task, do not depend on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from .buffers import Buffers

Task = TypeVar("Task")
Result = TypeVar("Result")
MOST_WORKERS = 8  # with more, writing and hashing, a thread each, set the pace


def in_order(tasks: Iterable[Task], work: Callable[[Task, Buffers, Buffers], Result]) -> Iterator[Result]:
    """Yield `work(task, scratch, kept)` for each task, in the order of the tasks.

    Args:
        tasks: what to work on, in the order of the results.
        work: called on one torch thread, so that its bits do not depend on how many cores there are. `scratch` is the
            thread's own memory, which stays in its core's cache. A result may lie in `kept`: it is then valid until the
            next one is asked for.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(max(cores - 1, 1), MOST_WORKERS)  # one core is for the thread that takes the results
    threads = torch.get_num_threads()
    waiting = iter(tasks)
    running: deque[tuple[Buffers, Future[Result]]] = deque()
    per_thread = threading.local()

    def set_up() -> None:
        torch.set_num_threads(1)
        per_thread.scratch = Buffers()

    def run(task: Task, kept: Buffers) -> Result:
        return work(task, per_thread.scratch, kept)

    def start(kept: Buffers) -> None:
        for task in waiting:
            running.append((kept, pool.submit(run, task, kept)))
            return

    pool = ThreadPoolExecutor(workers, initializer=set_up)
    try:
        for _ in range(workers + 2):  # two results may lie finished while each worker has one under way
            start(Buffers())
        while running:
            kept, future = running.popleft()
            yield future.result()
            start(kept)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the workers' setting would be that of threads started from now on
