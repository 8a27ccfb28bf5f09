"""Worker processes of a command: they end with it, and it hears of it when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from training.common.errors import StoppedError


def run_in_workers(
    work: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    workers: int,
    start_method: str = "spawn",
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Calls a function in processes of their own and yields arguments and result of each call as it is done.

    After an exception, calls that have begun end and no other begins.

    Args:
        work: The function; it must survive pickling, as must arguments and results.
        arguments: Those of each call.
        workers: Processes at once.
        start_method: Of ``multiprocessing``.
        initializer: Called in each process first.

    Raises:
        StoppedError: If the system killed a process. Whatever else a call raises arrives as it is.
    """
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(workers, context, initializer=_Start(initializer)) as pool:
        calls: dict[Future[Any], tuple[Any, ...]] = {pool.submit(work, *each): each for each in arguments}
        try:
            for done in as_completed(calls):
                yield calls[done], done.result()
        except BrokenProcessPool:
            raise StoppedError(
                "the system killed a worker process, most likely for want of memory; give fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


class _Start:
    """What a process does first."""

    def __init__(self, initializer: Callable[[], None] | None) -> None:
        self.initializer = initializer

    def __call__(self) -> None:
        threading.Thread(target=_end_with_the_command, daemon=True).start()
        if self.initializer is not None:
            self.initializer()


def _end_with_the_command() -> None:
    """Ends this process when the command that started it is gone, killed perhaps: it would work on unseen."""
    multiprocessing.parent_process().join()
    os._exit(1)
