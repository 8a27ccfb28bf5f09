"""Trainings in other processes: bounded in time, sent signals, killed, or run out of room.

`start` forks the process of the tests, which has everything imported: it starts in milliseconds.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pkgutil
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import yaml

from training.run_stage import main

ROOT = Path(__file__).parents[2]
_CONTEXT = multiprocessing.get_context("fork")
_POINTS = {
    "setup": "training.stages.setup.set_seed",
    "step": "training.trainer.trainer.F2LLMTrainer.training_step",
    "evaluation": "training.evaluation.runner.evaluate",
    "checkpoint": "training.trainer.saving.move_into_place",
    "finish": "training.stages.stage._save",
}


def run_bounded(command, seconds=240):
    """Runs a command with all processes that it starts; after ``seconds`` they are killed and the test fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not finished after {seconds} s: {' '.join(command)}\n{output[-4000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def torchrun(processes, script, *words):
    """The command that runs a script on so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    rendezvous = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [*launcher, *rendezvous, str(script), *map(str, words)]


def accelerate(folder, processes, script, *words):
    """The command that runs a script under FSDP2; its configuration is written to ``folder``."""
    config = yaml.safe_load((ROOT / "training/launch/fsdp.yaml").read_text())
    config |= {"use_cpu": True, "mixed_precision": "no", "num_processes": processes}
    config |= {"main_process_ip": "127.0.0.1", "main_process_port": free_port()}
    config["fsdp_config"]["fsdp_cpu_ram_efficient_loading"] = False
    path = folder / "fsdp2.yaml"
    path.write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*launcher, str(script), *map(str, words)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class SignalAt(NamedTuple):
    """A signal that a training sends itself, or its process group, at the nth time (from 0) that it gets to a place."""

    place: str
    nth: int
    number: int
    group: bool = False


class Run:
    """A training that has been started; its output is in ``log``."""

    def __init__(self, words, log, signals, file_size):
        self.log = log
        self._process = _CONTEXT.Process(target=_train, args=(list(words), log, list(signals), file_size))
        self._process.start()

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def line(self):
        assert "Traceback" not in self.output, self.output
        complaints = [line for line in self.output.splitlines() if line.startswith(("error: ", "stopped: "))]
        assert len(complaints) == 1 and self.output.rstrip().endswith(complaints[0]), self.output
        return complaints[0]

    def wait(self, timeout=120):
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(self.output)
        return self._process.exitcode

    def wait_for(self, condition, timeout=120):
        """Whether the condition came true before the training ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self._process.is_alive():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(self.output)
            time.sleep(0.001)
        return True

    def kill(self):
        self._process.kill()
        self._process.join()


def start(words, folder, signals=(), file_size=None):
    """Starts ``run_stage.py`` with these words; a file that outgrows ``file_size`` bytes finds the disk full."""
    number = len(list(folder.glob("*.log")))
    return Run([str(word) for word in words], folder / f"{number}.log", signals, file_size)


def launch(command, words, folder, processes=2, timeout=120):
    """Runs a command as torchrun would start it; returns the exit status of each process and what it wrote."""
    port, logs = free_port(), [folder / f"process-{rank}.log" for rank in range(processes)]
    variables = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes} for rank in range(processes)]
    variables = [{**each, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for each in variables]
    arguments = [(command, list(map(str, words)), *each) for each in zip(logs, variables, strict=True)]
    started = [_CONTEXT.Process(target=_run, args=each) for each in arguments]
    for process in started:
        process.start()
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in started], [log.read_text() for log in logs]


def _run(command, words, log, variables):
    os.environ |= {name: str(value) for name, value in variables.items()}
    _write_to(log)
    sys.exit(command(words))


def _write_to(log):
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    logging.getLogger().handlers.clear()


def _train(words, log, signals, file_size):
    os.setsid()
    _write_to(log)
    for place, name in _POINTS.items():
        due = [each for each in signals if each.place == place]
        if due:
            _patch(name, due)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(main(words))


def _send(due):
    if due.group:
        # From outside of the group: loader workers know a signal of the trainer's own.
        command = ["kill", f"-{int(due.number)}", "--", f"-{os.getpid()}"]
        subprocess.run(command, start_new_session=True, check=True)
    else:
        os.kill(os.getpid(), due.number)


def _patch(name, signals):
    original, calls = pkgutil.resolve_name(name), []

    def sending(*args, **kwargs):
        for each in signals:
            if each.nth == len(calls):
                _send(each)
        calls.append(None)
        return original(*args, **kwargs)

    mock.patch(name, sending).start()
