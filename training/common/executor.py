"""Where data work runs: phases of independent tasks on a ``datatrove`` executor.

Preparation, mining and deduplication all come through here: local processes by default; Ray, Slurm or Hugging Face Jobs
by the recipe key ``executor``. A task that is done stays done: killed at any moment and started again, a run goes on
with the tasks that are left.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from training.common.errors import StoppedError, UserError, in_one_line

logger = logging.getLogger(__name__)

EXECUTORS = ("local", "ray", "slurm", "jobs")
# Arguments of datatrove's executors that are not the user's to give.
_OURS = ("pipeline", "tasks", "logging_dir", "depends", "skip_completed")
# A run copies its recipe to where others may read it.
_SECRET = ("token", "secrets")


class SubmittedError(StoppedError):
    """The work was handed to a cluster that does it on its own; run the same command again when its jobs are done."""


@dataclass(frozen=True)
class Executor:
    """How tasks run.

    Attributes:
        name: One of ``EXECUTORS``.
        workers: Tasks at once; all cores' worth of them on the local executor, all at once on the others, if None.
        options: Further arguments of the datatrove executor of that name (``partition`` and ``time`` for Slurm).
    """

    name: str = "local"
    workers: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def read_executor(value: str | None) -> Executor | None:
    """Reads the recipe key ``executor``: a name, or JSON of ``name``, ``workers`` and datatrove's own arguments.

    Raises:
        UserError: If it says something else, or there is no such executor.
    """
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
    for key in _OURS:
        if key in options:
            raise UserError(f"executor: {key!r} follows from the work; take it out")
    for key in _SECRET:
        if key in options:
            raise UserError(
                f"executor: {key!r} would be copied to the run's folder; take it out, and log in with `hf auth login`: "
                "jobs get that token"
            )
    return Executor(name, workers, options)


class Phase(NamedTuple):
    """Tasks that need nothing of one another.

    Attributes:
        name: A folder name; what the log says.
        work: Called with the number of a task, from 0. It must survive pickling, put its results where no other task
            writes, and do the same whenever it is called again.
        tasks: Number of tasks.
    """

    name: str
    work: Callable[[int], None]
    tasks: int


def run_phases(phases: Sequence[Phase], folder: Path | str, executor: Executor | None = None) -> None:
    """Runs phases one after the other, each as tasks of the executor, and waits for them.

    Args:
        phases: What to do.
        folder: Where datatrove notes which tasks are done; its results belong to whoever calls. On more than one
            machine it must be a folder that all of them see.
        executor: Where; local processes if None.

    Raises:
        UserError: If a task raised one, or the executor cannot be used here.
        StoppedError: If a task failed otherwise. What other tasks did is kept.
        SubmittedError: If the executor is Slurm and there was something left to do.
    """
    executor, folder = executor or Executor(), Path(folder)
    before = None
    for phase in phases:
        logs = folder / phase.name
        if executor.name == "local" and min(executor.workers or _cores(), phase.tasks) <= 1:
            _run_here(phase, logs)
            continue
        running = _make(executor, phase, logs, before)
        if not running.get_incomplete_ranks():
            continue
        logger.info("%s: %d tasks (%s)", phase.name, phase.tasks, executor.name)
        _discard_failures(logs)
        try:
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


def _cores() -> int:
    return os.cpu_count() or 1


def _run_here(phase: Phase, logs: Path) -> None:
    """Runs a phase in this process: no other has to start, and errors need not travel."""
    done = logs / "completions"
    done.mkdir(parents=True, exist_ok=True)
    for task in range(phase.tasks):
        # Where datatrove notes it: the executor may be another one next time.
        note = done / f"{task:05d}"
        if not note.exists():
            phase.work(task)
            note.touch()


class _Step:
    """One phase as a step of a datatrove pipeline."""

    def __init__(self, work: Callable[[int], None], failures: Path, quiet: bool) -> None:
        self.work, self.failures, self.quiet = work, failures, quiet
        self._hush()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a worker: the step arrives before datatrove logs its first line.
        self.__dict__.update(state)
        self._hush()

    def _hush(self) -> None:
        """Keeps datatrove's account of every task off the terminal."""
        if self.quiet:
            from loguru import logger as datatrove_logger

            datatrove_logger.disable("datatrove")

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        # Tasks share the cores: threads of their own would wait for one another.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self.work(rank)
        except Exception as error:
            # Executors differ in what they make of an exception: its message travels as a file.
            kind = "user" if isinstance(error, UserError) else "other"
            message = str(error) if kind == "user" else f"{type(error).__name__}: {in_one_line(error)}"
            self.failures.mkdir(parents=True, exist_ok=True)
            (self.failures / f"{rank:05d}.json").write_text(json.dumps({"kind": kind, "message": message}))
            raise


def _make(executor: Executor, phase: Phase, logs: Path, before: Any) -> Any:
    try:
        from datatrove import executor as datatrove
    except ImportError as error:
        raise UserError(f"preparing data needs datatrove ({error}); pip install 'f2llm[train]'") from None
    _let_workers_import()
    # On a cluster the terminal of a task is a file of its own.
    step = _Step(phase.work, logs / "failures", quiet=executor.name in ("local", "ray"))
    shared = {"pipeline": [step], "tasks": phase.tasks, "logging_dir": str(logs), **executor.options}
    workers = executor.workers
    try:
        if executor.name == "ray":
            _start_ray()
            return datatrove.RayPipelineExecutor(**{"workers": workers or -1, "mem_per_cpu_gb": 0.5, **shared})
        if executor.name == "slurm":
            return datatrove.SlurmPipelineExecutor(**{"workers": workers or -1, "depends": before, **shared})
        if executor.name == "jobs":
            return datatrove.JobsPipelineExecutor(**{"workers": workers or -1, **shared})
        from training.common.local_executor import LocalExecutor

        return LocalExecutor(**{"workers": min(workers or _cores(), phase.tasks), **shared})
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"executor {executor.name!r} cannot be used: {in_one_line(error)}") from None


def _let_workers_import() -> None:
    """Puts this checkout on the path of processes to come: training/ is no installed package."""
    root, path = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")
    if root not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, path]))


def _start_ray() -> None:
    """Joins the cluster that the environment names, or starts one on this machine."""
    try:
        import ray
    except ImportError as error:
        raise UserError(f"executor 'ray' needs Ray ({error}); pip install 'f2llm[ray]'") from None
    if not ray.is_initialized():
        path = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, runtime_env=path)


def _discard_failures(logs: Path) -> None:
    for path in (logs / "failures").glob("*.json"):
        path.unlink()


def _raise_failure(logs: Path, phase: Phase, error: Exception) -> None:
    """Raises what the first failed task said, or else the error of the executor."""
    for path in sorted((logs / "failures").glob("*.json")):
        failure = json.loads(path.read_text())
        if failure["kind"] == "user":
            raise UserError(failure["message"]) from None
        raise StoppedError(f"{phase.name}, task {int(path.stem)}: {failure['message']}") from error
    raise error
