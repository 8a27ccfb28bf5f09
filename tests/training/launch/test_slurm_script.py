"""The batch script for several nodes: what its launchers are told, and when the job is queued again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

SCRIPT = Path(__file__).resolve().parents[3] / "training/launch/slurm.sh"
# One node after the other; like the real one, it returns the highest status.
SRUN = """while [ "$1" != bash ]; do shift; done
highest=0
for node in $(seq 0 $((SLURM_NNODES - 1))); do
  SLURM_NODEID=$node "$@" || { status=$?; [ $status -lt $highest ] || highest=$status; }
done
exit $highest"""
SCONTROL = """case $1 in
  show) printf 'node1\\nnode2\\n' ;;
  requeue) echo "$2" >> requeued ;;
esac"""
ACCELERATE = 'printf "%s\\n" "$@" > "launch$SLURM_NODEID"; end=END$SLURM_NODEID; eval "${!end}"'
# To the shell that waits for the launcher, which ends with 1 on its signal.
STOPPED = "kill -TERM $PPID; exit 1"


def batch(folder, words=(), **variables):
    """Runs the script as the batch shell of a job on two nodes, with stand-ins for Slurm and the launcher."""
    for name, text in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/accelerate": ACCELERATE}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    job = {"SLURM_JOB_ID": "20007", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "4"}
    environment = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", **job, **variables}
    return subprocess.run(["bash", SCRIPT, *words], cwd=folder, env=environment, timeout=60).returncode


@pytest.mark.parametrize(
    ("variables", "processes"),
    [({"SLURM_GPUS_ON_NODE": "4"}, 8), ({}, 16), ({"SLURM_GPUS_ON_NODE": "4", "PROCESSES": "1"}, 2)],
)
def test_one_launcher_on_each_node(tmp_path, variables, processes):
    assert batch(tmp_path, ["my recipe.yaml", "--seed", "1"], **variables) == 0
    for node in range(2):
        command, *words = (tmp_path / f"launch{node}").read_text().splitlines()
        assert command == "launch"
        given = launch_command_parser().parse_args(words)
        assert (given.num_machines, given.machine_rank, given.num_processes) == (2, node, processes)
        assert (given.main_process_ip, given.main_process_port) == ("node1", 20007)
        assert given.training_script == "training/run_stage.py"
        assert given.training_script_args == ["my recipe.yaml", "--seed", "1", "--resume"]
        assert (SCRIPT.parents[2] / given.config_file).is_file()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "again"),
    [
        *[((STOPPED, STOPPED), "0", 0, True), (("exit 0", STOPPED), "99", 0, True)],
        *[((STOPPED, STOPPED), "100", 75, False), (("exit 2", "exit 2"), "0", 100, False)],
        # The launcher of the other node was stopped because the first had failed.
        (("exit 1", STOPPED), "0", 100, False),
    ],
)
def test_a_stopped_job_is_queued_again_and_a_failed_one_is_not(tmp_path, ends, restarts, status, again):
    assert batch(tmp_path, END0=ends[0], END1=ends[1], SLURM_RESTART_COUNT=restarts) == status
    assert (tmp_path / "requeued").exists() == again
    if again:
        assert (tmp_path / "requeued").read_text() == "20007\n"
