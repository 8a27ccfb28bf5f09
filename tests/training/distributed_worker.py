"""Runs run_stage.py's command line in a process that a test wants out of the ordinary: ``WORKER MODE recipe.yaml ...``.

``sharded``: FSDP on the CPU, where accelerate would turn to DDP: it is told that each process has a device, the CPU.
``dies:RANK:STEP``: this process kills itself in the middle of a step, when the others are about to gather embeddings.
``terminated:RANK:STEP``: this process, and no other, receives a SIGTERM in this step.
``forks:PROCESSES:PORT``: so many processes, which share the time of the imports, as torchrun would start them.

Modes are joined by ``+``.
"""

from __future__ import annotations

import os
import signal
import sys
from unittest import mock

from accelerate import PartialState
from accelerate.utils import DistributedType

from training.run_stage import main
from training.trainer import trainer


def _shard():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def _at(rank, step, action):
    training_step = trainer.F2LLMTrainer.training_step

    def acting(self, *args, **kwargs):
        if self.args.process_index == rank and self.state.global_step == step:
            action()
        return training_step(self, *args, **kwargs)

    trainer.F2LLMTrainer.training_step = acting


def _die(rank, step):
    gather = "training.trainer.step.gather_rows"
    _at(rank, step, lambda: mock.patch(gather, lambda *args: os.kill(os.getpid(), signal.SIGKILL)).start())


def _terminate(rank, step):
    _at(rank, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _fork(processes, port):
    """Returns in every child; the parent waits for all of them and ends with the worst of their statuses."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
        children.append(child)
    raise SystemExit(max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children))


if __name__ == "__main__":
    modes = {"sharded": _shard, "dies": _die, "terminated": _terminate, "forks": _fork}
    for mode, *numbers in (words.split(":") for words in sys.argv[1].split("+")):
        modes[mode](*map(int, numbers))
    raise SystemExit(main(sys.argv[2:]))
