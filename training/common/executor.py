"""Where work runs: phases of tasks on local processes, Ray, Slurm or Hugging Face Jobs; worker processes.

Elsewhere than on this machine, ``datatrove`` runs the tasks. Finished tasks are marked in the same files everywhere:
after a kill at any moment, the next run does only the tasks that are left, on any executor.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from training.common.errors import StoppedError, UserError, in_one_line

logger = logging.getLogger(__name__)

_NAMES = ("local", "ray", "slurm", "jobs")


class SubmittedError(StoppedError):
    """The work was submitted to a cluster; run the same command again when its jobs are done."""


@dataclass(frozen=True)
class Executor:
    """How tasks run."""

    name: str = "local"
    workers: int | None = None  # tasks at once; if None, one per core on this machine and all at once elsewhere
    # Of datatrove's executor (Slurm: ``partition``, ``time``).
    options: Mapping[str, Any] = field(default_factory=dict)


def read_executor(value: str | None) -> Executor | None:
    """Read the recipe key ``executor``: a name, or JSON with ``name``, ``workers`` and datatrove's own arguments."""
    if not value:
        return None
    try:
        options = json.loads(value) if value.lstrip().startswith("{") else {"name": value}
    except ValueError as error:
        raise UserError(f"executor: not valid JSON ({error})") from None
    name, workers = options.pop("name", "local"), options.pop("workers", None)
    if name not in _NAMES:
        raise UserError(f"executor: there is no {name!r}; use one of {', '.join(_NAMES)}")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise UserError(f"executor: workers must be a positive number, got {workers!r}")
    # A run copies its recipe to where others may read it.
    if secret := sorted({"token", "secrets"} & options.keys()):
        remedy = "take it out, and log in with `hf auth login`: jobs get that token"
        raise UserError(f"executor: {secret[0]!r} would be copied to the run's folder; {remedy}")
    if options and name == "local":
        raise UserError(f"executor 'local' takes workers only, not {', '.join(options)}; take that out")
    return Executor(name, workers, options)


class Phase(NamedTuple):
    """Independent tasks."""

    name: str  # for the folder and the log
    # Called with the number of a task, from 0. It must survive pickling, write where no other task writes, and give the
    # same result when it is called again.
    work: Callable[[int], None]
    tasks: int


def run_phases(phases: Sequence[Phase], folder: Path | str, executor: Executor | None = None) -> None:
    """Run phases one after the other and wait for them.

    Finished tasks are recorded in ``folder``, which all machines must share. If a task fails, the work of others is
    kept. Raises :class:`SubmittedError` if the executor is Slurm and there was work left.
    """
    executor, submitted = executor or Executor(), None
    for phase in phases:
        logs = Path(folder) / phase.name
        if executor.name == "local":
            _run_locally(phase, logs, executor.workers or os.cpu_count() or 1)
        else:
            submitted = _run_elsewhere(phase, logs, executor, submitted) or submitted
    if submitted is not None:
        what = "submitted to Slurm; when the jobs are done (squeue --me)"
        raise SubmittedError(f"{what}, run the same command again ({folder})")


def _run_locally(phase: Phase, logs: Path, workers: int) -> None:
    # Where datatrove marks finished tasks.
    done = logs / "completions"
    done.mkdir(parents=True, exist_ok=True)
    marks = {task: done / f"{task:05d}" for task in range(phase.tasks)}
    left = [(phase, task, mark) for task, mark in marks.items() if not mark.exists()]
    if min(workers, len(left)) > 1:
        logger.info("%s: %d tasks", phase.name, len(left))
        for _ in run_in_workers(_do, left, min(workers, len(left))):
            pass
        return
    for _, task, mark in left:
        phase.work(task)
        mark.touch()


def _do(phase: Phase, task: int, mark: Path | None = None) -> None:
    """Run a task in another process, from which not every library's error can be sent back."""
    # Tasks share the cores already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        phase.work(task)
    except UserError:
        raise
    except Exception as error:
        raise StoppedError(f"{phase.name}, task {task}: {type(error).__name__}: {in_one_line(error)}") from None
    if mark is not None:
        mark.touch()


def _step(phase: Phase, failures: Path, data: object, rank: int = 0, world_size: int = 1) -> None:
    """Run a task as a step of datatrove, whose executors treat exceptions differently: messages travel as files."""
    try:
        _do(phase, rank)
    except (UserError, StoppedError) as error:
        failures.mkdir(parents=True, exist_ok=True)
        failure = {"user": isinstance(error, UserError), "message": str(error)}
        (failures / f"{rank:05d}.json").write_text(json.dumps(failure))
        raise


def _run_elsewhere(phase: Phase, logs: Path, executor: Executor, before: Any) -> Any:
    """Run a phase with datatrove after the phase ``before``; return datatrove's executor if it only submitted jobs."""
    failures, failed = logs / "failures", None
    running = _make(phase, logs, failures, executor, before)
    left = running.get_incomplete_ranks()
    if not left:
        return None
    if executor.name == "slurm":
        return _submit(phase, logs, failures, running, left)
    logger.info("%s: %d tasks (%s)", phase.name, phase.tasks, executor.name)
    shutil.rmtree(failures, ignore_errors=True)
    try:
        running.run()
    except Exception as error:
        failed = error
    _raise_failure(failures, left, failed)
    # Without tasks left, datatrove only failed to sum up statistics, which tasks that ran on another executor lack.
    if left := running.get_incomplete_ranks():
        raise failed or StoppedError(f"{len(left)} of {phase.tasks} tasks did not end; see {logs}")
    return None


def _submit(phase: Phase, logs: Path, failures: Path, running: Any, left: Sequence[int]) -> Any:
    """Submit the tasks that are left, unless an earlier command did and their job has not ended."""
    job = logs / "job"
    if job.exists():
        running.job_id = job.read_text()
        # A job that Slurm has forgotten is an error.
        query = ["squeue", "--noheader", "--jobs", running.job_id]
        if shutil.which("squeue") and subprocess.run(query, capture_output=True).stdout.strip():
            logger.info("%s: job %s has not ended", phase.name, running.job_id)
            return running
        running.job_id = None
        # The next command tries again.
        _raise_failure(failures, left)
    try:
        running.run()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        where = "see the message of sbatch above, and run this where sbatch is installed"
        raise UserError(f"executor 'slurm': the job was not accepted ({in_one_line(error)}); {where}") from None
    job.write_text(running.job_id)
    logger.info("%s: job %s for %d of %d tasks", phase.name, running.job_id, len(left), phase.tasks)
    return running


def _raise_failure(failures: Path, ranks: Sequence[int], cause: Exception | None = None) -> None:
    """Raise the first error that one of these tasks has left, and forget all."""
    paths = [path for rank in ranks if (path := failures / f"{rank:05d}.json").exists()]
    failure = json.loads(paths[0].read_text()) if paths else None
    shutil.rmtree(failures, ignore_errors=True)
    if failure:
        raise (UserError if failure["user"] else StoppedError)(failure["message"]) from cause


def _make(phase: Phase, logs: Path, failures: Path, executor: Executor, before: Any) -> Any:
    # They take a second to import.
    from datatrove import executor as datatrove
    from loguru import logger as datatrove_logger

    # Processes elsewhere must find training/, which is not an installed package.
    root, path = str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")
    if root not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, path]))
    options = {"workers": executor.workers or -1, **executor.options}
    make, steps = getattr(datatrove, f"{executor.name.capitalize()}PipelineExecutor"), [partial(_step, phase, failures)]
    if executor.name in ("ray", "slurm"):
        datatrove_logger.disable("datatrove")
    try:
        if executor.name == "slurm":
            options = _slurm_options(phase, options) | {"depends": before}
        elif executor.name == "ray":
            # Optional package: pip install 'f2llm[ray]'.
            import ray

            options.setdefault("mem_per_cpu_gb", 0.5)
            env = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
            quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": False}
            # Joins the cluster that the environment names, or starts one on this machine.
            ray.init(ignore_reinit_error=True, runtime_env=env, **quiet)
        running = make(pipeline=steps, tasks=phase.tasks, logging_dir=str(logs), **options)
    # TypeError: also for arguments that datatrove does not know, or that are given here.
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"executor {executor.name!r} cannot be used: {in_one_line(error)}") from None
    if executor.name == "slurm":
        # Statistics would be one more job for each phase.
        running.launch_merge_stats = _no_statistics
    return running


def _slurm_options(phase: Phase, options: Mapping[str, Any]) -> dict[str, Any]:
    """Add what Slurm jobs need to datatrove's arguments where the user has not said otherwise."""
    own = {"job_name": f"f2llm-{phase.name}"}
    if not options.keys() & {"env_command", "condaenv", "venv_path"}:
        # The jobs start a script of datatrove's, which is beside this interpreter.
        own["env_command"] = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    # A job whose predecessor failed would wait for ever.
    extra = {"kill-on-invalid-dep": "yes", **(options.get("sbatch_args") or {})}
    return {**own, **options, "sbatch_args": extra}


def _no_statistics() -> None:
    pass


def run_in_workers(
    work: Callable[..., Any], arguments: Iterable[tuple], workers: int, initializer: Callable[[], None] | None = None
) -> Iterator[tuple[tuple, Any]]:
    """Call a function in worker processes and yield arguments and result of each call as it finishes.

    After an exception of a call, which is raised unchanged, running calls finish and no further call starts. The
    processes end with this one.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(initializer,)) as pool:
        calls = {pool.submit(work, *each): each for each in arguments}
        try:
            for done in as_completed(calls):
                yield calls[done], done.result()
        except BrokenProcessPool:
            raise StoppedError("the system killed a worker process, for want of memory; give fewer workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(initializer: Callable[[], None] | None) -> None:
    end_with_the_command()
    if initializer is not None:
        initializer()


def end_with_the_command() -> None:
    """Let this worker process end with the one that started it, even if that is killed."""

    def wait() -> None:
        # Known only when all arguments of the process are unpickled.
        while (command := multiprocessing.parent_process()) is None:
            time.sleep(0.1)
        command.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
