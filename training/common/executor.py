"""Where work runs: phases of tasks on local processes, Ray, Slurm or Hugging Face Jobs; worker processes; ranks.

Preparation, mining and deduplication use phases; the recipe key ``executor`` chooses where. ``datatrove`` runs tasks
and records which are done: after a kill at any moment, the next run does only the tasks that are left. Local workers
are our own processes, because datatrove's pool waits for ever for a task whose process was killed.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training.common.errors import StoppedError, UserError, in_one_line

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

# Classes and default arguments of datatrove.
_CLASSES = {
    "local": ("LocalPipelineExecutor", {}),
    "ray": ("RayPipelineExecutor", {"mem_per_cpu_gb": 0.5}),
    "slurm": ("SlurmPipelineExecutor", {}),
    "jobs": ("JobsPipelineExecutor", {}),
}
EXECUTORS = tuple(_CLASSES)
_CORES = os.cpu_count() or 1
# Arguments of datatrove's executors that the user must not set.
_OURS = ("pipeline", "tasks", "logging_dir", "depends", "skip_completed")
# A run copies its recipe to where others may read it.
_SECRET = ("token", "secrets")


class SubmittedError(StoppedError):
    """The work was submitted to a cluster; run the same command again when its jobs are done."""


@dataclass(frozen=True)
class Executor:
    """How tasks run.

    Attributes:
        name: One of ``EXECUTORS``.
        workers: Tasks at once; if None, one per core on this machine and all at once elsewhere.
        options: Further arguments of the datatrove executor (``partition`` and ``time`` for Slurm).
    """

    name: str = "local"
    workers: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_executor(value: str | None) -> Executor | None:
    """Read the recipe key ``executor``: a name, or JSON with ``name``, ``workers`` and datatrove's own arguments."""
    if not value:
        return None
    options = {"name": value}
    if value.lstrip().startswith("{"):
        try:
            options = json.loads(value)
        except ValueError as error:
            raise UserError(f"executor: not valid JSON ({error})") from None
    name, workers = options.pop("name", "local"), options.pop("workers", None)
    if name not in EXECUTORS:
        raise UserError(f"executor: there is no {name!r}; use one of {', '.join(EXECUTORS)}")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise UserError(f"executor: workers must be a positive number, got {workers!r}")
    for key in options:
        if key in _OURS:
            raise UserError(f"executor: {key!r} follows from the work; take it out")
        if key in _SECRET:
            raise UserError(
                f"executor: {key!r} would be copied to the run's folder; take it out, and log in with `hf auth login`: "
                "jobs get that token"
            )
    return Executor(name, workers, options)


class Phase(NamedTuple):
    """Independent tasks.

    Attributes:
        name: Name for the folder and the log.
        work: Called with the number of a task, from 0. It must survive pickling, write where no other task writes, and
            give the same result when it is called again.
        tasks: Number of tasks.
    """

    name: str
    work: Callable[[int], None]
    tasks: int


def run_phases(phases: Sequence[Phase], folder: Path | str, executor: Executor | None = None) -> None:
    """Run phases one after the other and wait for them.

    Finished tasks are recorded in ``folder``, which all machines must share.

    Raises:
        UserError: If a task raised one, or the executor cannot be used here.
        StoppedError: If a task failed otherwise. The work of other tasks is kept.
        SubmittedError: If the executor is Slurm and there was work left.
    """
    executor, folder = executor or Executor(), Path(folder)
    before = None
    for phase in phases:
        logs = folder / phase.name
        if executor.name == "local" and min(executor.workers or _CORES, phase.tasks) <= 1:
            _run_in_this_process(phase, logs)
            continue
        running = _make(executor, phase, logs, before)
        if not running.get_incomplete_ranks():
            continue
        logger.info("%s: %d tasks (%s)", phase.name, phase.tasks, executor.name)
        for path in (logs / "failures").glob("*.json"):
            path.unlink()
        try:
            if executor.name == "local":
                _run_in_local_workers(running)
            else:
                running.run()
        except Exception as error:
            _raise_failure(logs, phase, error)
        if executor.name == "slurm":
            before = running
            continue
        left = running.get_incomplete_ranks()
        if left:
            _raise_failure(logs, phase, StoppedError(f"{len(left)} of {phase.tasks} tasks did not end; see {logs}"))
    if before is not None:
        raise SubmittedError(f"submitted to Slurm; when the jobs are done, run the same command again ({folder})")


def _run_in_this_process(phase: Phase, logs: Path) -> None:
    """Run a phase without a worker process to start, and without errors that have to travel."""
    done = logs / "completions"
    done.mkdir(parents=True, exist_ok=True)
    for task in range(phase.tasks):
        # Where datatrove records it: the next run may use another executor.
        note = done / f"{task:05d}"
        if not note.exists():
            phase.work(task)
            note.touch()


def _run_in_local_workers(running: Any) -> None:
    """Run what datatrove's ``LocalPipelineExecutor.run`` does, on processes whose death is noticed."""
    running.save_executor_as_json()
    ranks = [(rank, number % running.workers) for number, rank in enumerate(running.get_incomplete_ranks())]
    for _ in run_in_workers(running._run_for_rank, ranks, running.workers, running.start_method):
        pass


class _Step:
    """One phase as a step of a datatrove pipeline."""

    def __init__(self, work: Callable[[int], None], failures: Path, quiet: bool) -> None:
        self.work, self.failures, self.quiet = work, failures, quiet
        self._silence_datatrove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a worker, the step is unpickled before datatrove logs its first line.
        self.__dict__.update(state)
        self._silence_datatrove()

    def _silence_datatrove(self) -> None:
        if self.quiet:
            # Optional package, installed with datatrove.
            from loguru import logger as datatrove_logger

            datatrove_logger.disable("datatrove")

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        # Tasks share the cores already.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self.work(rank)
        except Exception as error:
            # Executors treat exceptions differently: the message travels as a file.
            kind = "user" if isinstance(error, UserError) else "other"
            message = str(error) if kind == "user" else f"{type(error).__name__}: {in_one_line(error)}"
            self.failures.mkdir(parents=True, exist_ok=True)
            (self.failures / f"{rank:05d}.json").write_text(json.dumps({"kind": kind, "message": message}))
            raise


def _make(executor: Executor, phase: Phase, logs: Path, before: Any) -> Any:
    try:
        # Optional package; it takes a second to import.
        from datatrove import executor as datatrove
    except ImportError as error:
        raise UserError(f"preparing data needs datatrove ({error}); pip install 'f2llm[train]'") from None
    _let_workers_import()
    # On a cluster, the terminal of each task is a file.
    step = _Step(phase.work, logs / "failures", quiet=executor.name in ("local", "ray"))
    shared = {"pipeline": [step], "tasks": phase.tasks, "logging_dir": str(logs), **executor.options}
    name, defaults = _CLASSES[executor.name]
    if executor.name == "slurm":
        shared["depends"] = before
    workers = min(executor.workers or _CORES, phase.tasks) if executor.name == "local" else executor.workers or -1
    try:
        if executor.name == "ray":
            _start_ray()
        return getattr(datatrove, name)(**{"workers": workers, **defaults, **shared})
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"executor {executor.name!r} cannot be used: {in_one_line(error)}") from None


def _let_workers_import() -> None:
    """Put this checkout on the path of new processes: training/ is not an installed package."""
    root, path = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")
    if root not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, path]))


def _start_ray() -> None:
    """Join the cluster that the environment names, or start one on this machine."""
    try:
        # Optional package.
        import ray
    except ImportError as error:
        raise UserError(f"executor 'ray' needs Ray ({error}); pip install 'f2llm[ray]'") from None
    if not ray.is_initialized():
        path = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, runtime_env=path)


def _raise_failure(logs: Path, phase: Phase, error: Exception) -> None:
    """Raise the error of the first failed task, or else that of the executor."""
    for path in sorted((logs / "failures").glob("*.json")):
        failure = json.loads(path.read_text())
        if failure["kind"] == "user":
            raise UserError(failure["message"]) from None
        raise StoppedError(f"{phase.name}, task {int(path.stem)}: {failure['message']}") from error
    raise error


# Worker processes


def run_in_workers(
    work: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    workers: int,
    start_method: str = "spawn",
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Call a function in worker processes and yield arguments and result of each call as it finishes.

    After an exception, running calls finish and no further call starts. The processes end with this one.

    Raises:
        StoppedError: If the system killed a process. Exceptions of a call are raised unchanged.
    """
    context = multiprocessing.get_context(start_method)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(initializer,)) as pool:
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


def _start_worker(initializer: Callable[[], None] | None) -> None:
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    if initializer is not None:
        initializer()


def _end_with_the_command() -> None:
    """End this process when the command that started it is gone; it would work on unseen."""
    multiprocessing.parent_process().join()
    os._exit(1)


# Ranks of a training


def as_first_process(accelerator: Accelerator, metrics: dict[str, float]) -> dict[str, float]:
    """Broadcast rank 0's metrics so that all ranks make the same decision.

    All ranks call this together, with the same names in the same order.
    """
    if accelerator.num_processes == 1 or not metrics:
        return metrics
    # Data commands do not load torch.
    import torch
    from accelerate.utils import broadcast

    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(metrics, broadcast(values).tolist(), strict=True))
