"""Where a model encodes: on one device, on a pool of several, or on all processes of a launch, with the same numbers.

sentence-transformers divides texts over workers and processes before it sorts them by length. Here they are sorted
first and dealt out by whole batches, so that each batch holds what it holds in one process.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache, partial
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from training.common.command import run_command
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.executor import end_with_the_command

logger = logging.getLogger("training")

# Stands for the devices of all processes that accelerate or torchrun has started.
LAUNCHED = ("launched",)
# Parts per worker of a pool: the more, the less the workers wait for the last one. Each costs an open file.
_PARTS = 16
_QUIET = {"show_progress_bar": False}
# The others wait while the first process searches or scores. Gloo notices at once when a process ends.
_LONGEST_WAIT = timedelta(days=7)


def is_launched() -> bool:
    """Return whether this is one of several processes that accelerate or torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def choose_devices(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the devices of ``--devices``; by default those of a launch or several CUDA devices, else none."""
    count = torch.cuda.device_count()
    if is_launched():
        if names:
            raise UserError("--devices: each process of a launch has its own device; take the option out")
        return LAUNCHED
    if not names:
        return tuple(f"cuda:{number}" for number in range(count)) if count > 1 else ()
    here = torch.accelerator.current_accelerator()
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            device = torch.device("meta")
        most = torch.accelerator.device_count() if here and here.type == device.type else 0
        if device.type != "cpu" and (device.index or 0) >= most:
            known = ["cpu", *(f"{here.type}:{number}" for number in range(torch.accelerator.device_count()) if here)]
            raise UserError(f"--devices {name}: this machine has no such device; choose from {', '.join(known)}")
    return tuple(names)


class SharedEncoder:
    """A SentenceTransformer that encodes on given devices; :meth:`close` ends the workers, as does the command's end.

    ``load`` loads it, here and in the other processes of a launch, and must survive pickling. ``devices`` are from
    :func:`choose_devices`; without any, the model stays where ``load`` puts it.
    """

    def __init__(self, load: Callable[[], SentenceTransformer], devices: Sequence[str] = ()) -> None:
        self.model, self.devices = load(), tuple(devices)
        self._load, self._started = load, False
        self._pool: dict[str, Any] = {}
        self.close: Callable[[], object] = lambda: None
        if len(self.devices) == 1 and self.devices != LAUNCHED:
            self.model.to(self.devices[0])

    def start(self) -> None:
        """Start the workers and wait for them; :meth:`encode` does it, too."""
        if self._started:
            return
        self._started = True
        if self.devices == LAUNCHED:
            self._on_processes("encode", [[] for _ in range(dist.get_world_size())], {})
        elif len(self.devices) > 1:
            logger.info("encoding on %s", ", ".join(self.devices))
            self.model.worker_setup = _WorkerSetup()
            self._pool = self.model.start_multi_process_pool(list(self.devices))
            self.close = weakref.finalize(self, SentenceTransformer.stop_multi_process_pool, self._pool)
            self._in_pool("encode", ["a text"] * len(self.devices), 1, _QUIET)

    def encode(self, method: str, texts: Sequence[str], batch_size: int, **options: Any) -> NDArray[np.float32]:
        """Return what ``model.encode``, ``encode_query`` or ``encode_document`` does: ``(n, dimensions)``."""
        self.start()
        if self.devices != LAUNCHED and not self._pool:
            return getattr(self.model, method)(texts, batch_size=batch_size, **options)
        order = np.argsort([-len(text) for text in texts])
        batches = np.split(order, range(batch_size, len(order), batch_size))
        options["batch_size"] = batch_size
        if self._pool:
            size = batch_size * -(-len(batches) // (_PARTS * len(self.devices)))
            parts = [_as_sorted(texts, part) for part in np.split(order, range(size, len(order), size))]
            rows = np.concatenate(parts)
            vectors = self._in_pool(method, [texts[row] for row in rows], size, options)
        else:
            number = dist.get_world_size()
            parts = [np.concatenate([order[:0], *batches[rank::number]]) for rank in range(number)]
            parts = [_as_sorted(texts, part) for part in parts]
            rows = np.concatenate(parts)
            vectors = self._on_processes(method, [[texts[row] for row in part] for part in parts], options)
        found = np.empty_like(vectors)
        found[rows] = vectors
        return found

    def _in_pool(self, method: str, texts: list[str], size: int, options: dict[str, Any]) -> NDArray[np.float32]:
        try:
            return getattr(self.model, method)(texts, pool=self._pool, chunk_size=size, **options)
        except RuntimeError:
            if all(process.is_alive() for process in self._pool["processes"]):
                raise
            remedy = "give fewer devices or a smaller batch"
            raise StoppedError(f"a worker process ended, perhaps killed for want of memory; {remedy}") from None

    def _on_processes(self, method: str, parts: list[list[str]], options: dict[str, Any]) -> NDArray[np.float32]:
        load, (own, *others) = pickle.dumps(self._load), parts
        calls = [partial(_encode, load, method, part, options | _QUIET) for part in others]
        answers = on_all_processes([partial(getattr(self.model, method), own, **options), *calls])
        return np.concatenate([answer for answer in answers if len(answer)] or answers[:1])


def _as_sorted(texts: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order rows, sorted by length, so that ``encode``, whose own sort is not stable, restores their order."""
    again = np.argsort([-len(texts[row]) for row in rows])
    placed = np.empty_like(rows)
    placed[again] = rows
    return placed


class _WorkerSetup:
    """Sets up the worker of a pool in which it is unpickled, as a part of the model."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _set_up_worker, ()


def _set_up_worker() -> None:
    # The command stops its workers, also after Ctrl-C, and reports their errors. Killed, it can do neither.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.ERROR)
    # tqdm's own lock is a semaphore, of whose loss Python warns when the worker is stopped.
    tqdm.set_lock(RLock())
    end_with_the_command()


def with_all_processes(command: Callable[[], int]) -> int:
    """Run a command in the first process of a launch, while the others work for it; return its exit status in all.

    The others do nothing but what :func:`on_all_processes` sends. Without a launch, the command is only called.
    """
    if not is_launched():
        return command()
    if int(os.environ["RANK"]):
        return run_command(_serve)
    status = run_command(_join) or command()
    # After a signal, others may still be at work for this process; they notice that it is gone.
    if dist.is_initialized() and status <= 128:
        # One that is gone needs no word, and its loss has been reported.
        with suppress(RuntimeError):
            _leave(status)
    return status


def _join() -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        raise UserError("this command does not shard models; launch it with training/launch/ddp.yaml")
    # Texts and embeddings are in the memory of the CPU.
    dist.init_process_group("gloo", timeout=_LONGEST_WAIT)


def _leave(status: int) -> None:
    dist.scatter_object_list([None], [status] * dist.get_world_size())
    # Together: a process that is still at work crashes when another closes the connections.
    dist.barrier()
    dist.destroy_process_group()


def _serve() -> int:
    """Answer the calls of the first process until it sends its exit status, and return that."""
    _join()
    # One bar is enough.
    disable_progress_bar()
    while True:
        received: list[Any] = [None]
        dist.scatter_object_list(received)
        if isinstance(received[0], int):
            dist.barrier()
            dist.destroy_process_group()
            return received[0]
        dist.gather_object(_answer(received[0]))


def process_count() -> int:
    """Return the number of processes that :func:`on_all_processes` calls."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_all_processes(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Make one call in each process of a launch, the first one here, and return their results when all are done.

    The others must survive pickling. The error of a process is raised here, with its number; what the calls of the
    others have done stays. Without a launch, there is one call.
    """
    if not dist.is_initialized():
        return [call() for call in calls]
    dist.scatter_object_list([None], [None, *calls[1:]])
    answers: list[Any] = [None] * len(calls)
    dist.gather_object(_answer(calls[0]), answers)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


@lru_cache(maxsize=1)
def _loaded(load: bytes) -> SentenceTransformer:
    return pickle.loads(load)()


def _encode(load: bytes, method: str, texts: list[str], options: dict[str, Any]) -> NDArray[np.float32]:
    return getattr(_loaded(load), method)(texts, **options)


def _answer(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or the error to raise in the first process."""
    try:
        return call()
    except UserError as error:
        return error
    # An exception here would leave the other processes waiting.
    except Exception as error:
        return StoppedError(f"process {dist.get_rank()}: {type(error).__name__}: {in_one_line(error)}")
