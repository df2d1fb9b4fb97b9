"""Processes that do a suite's work: they end with the one that started them, and tell it what they do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from benchmarks.progress import RunProgress, Sender, show

_LOOK = 0.05  # seconds between two looks at what the workers told
_sender: Sender | None = None  # of this process, where it is a worker


def sender() -> RunProgress:
    """The progress of this worker; a silent one in any other process."""
    return _sender if _sender is not None else RunProgress(enabled=False)


@contextmanager
def workers(jobs: int, progress: RunProgress, say: Callable[[str], None]) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes; what waits is dropped where one of them fails.

    Args:
        jobs: their number.
        progress, say: where the bars and the lines go that they tell of, see ``sender``.

    Raises:
        OSError: one of them was killed.
    """
    context = get_context("spawn")
    told = context.SimpleQueue()
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=(told, over, progress, say), daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(jobs, context, _start, (os.getpid(), told)) as pool:
            try:
                yield pool
            except BrokenProcessPool as error:
                raise OSError("a worker was killed (out of memory?): the same command goes on") from error
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        over.set()
        listener.join(timeout=5)  # a worker that was killed in the middle of a message keeps it waiting
        progress.clear()


def _listen(told: Any, over: threading.Event, progress: RunProgress, say: Callable[[str], None]) -> None:
    while not (over.is_set() and told.empty()):
        if told.empty():
            time.sleep(_LOOK)
        else:
            show(progress, told.get(), say)


def _start(parent: int, told: Any) -> None:
    """End this worker when the process that started it has gone, however that went; let it tell what it does."""
    global _sender

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _sender = Sender(told.put)
