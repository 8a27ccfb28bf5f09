"""Starting a training on several processes, bounded in time: nothing outlives the test that started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def run_bounded(command: list[str], seconds: float = 240) -> subprocess.CompletedProcess[str]:
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


def torchrun(processes: int, script: Path, *words: object) -> list[str]:
    """The command that runs a script on so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    rendezvous = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [*launcher, *rendezvous, str(script), *map(str, words)]


def accelerate(folder: Path, processes: int, script: Path, *words: object) -> list[str]:
    """The command that runs a script under FSDP2; its configuration is written to ``folder``."""
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "use_cpu": True,
        "mixed_precision": "no",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": processes,
        "main_process_ip": "127.0.0.1",
        "main_process_port": free_port(),
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": False,
        },
    }
    path = folder / "fsdp2.yaml"
    path.write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*launcher, str(script), *map(str, words)]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
