"""A Slurm of two nodes on this machine, without munge: its daemons listen on the loopback and end with the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory

from tests.training.processes import free_port

# Names that are addresses of the loopback: launchers find the first node by its name.
NODES = ("127.0.0.1", "127.0.0.2")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=cpu Nodes=ALL Default=YES GraceTime=120 PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


@contextmanager
def slurm_cluster():
    """Starts it; the commands of Slurm find it by the environment variable ``SLURM_CONF``."""
    with TemporaryDirectory(prefix="slurm-") as folder:
        node = "NodeName={0} NodeHostname={1} NodeAddr=127.0.0.1 Port={2} CPUs=2 RealMemory=8000"
        nodes = "\n".join(node.format(name, gethostname(), free_port()) for name in NODES)
        given = {"folder": folder, "host": gethostname(), "port": free_port(), "nodes": nodes}
        path = Path(folder, "slurm.conf")
        path.write_text(CONFIGURATION.format(**given, user=Path(folder).owner()))
        before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(path)
        daemons = []
        try:
            for name, words in [
                ("state", ["slurmctld", "-D"]),
                *((name, ["slurmd", "-D", "-N", name]) for name in NODES),
            ]:
                Path(folder, name).mkdir()
                program = shutil.which(words[0], path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])
                with Path(folder, f"{name}.log").open("w") as log:
                    daemons.append(subprocess.Popen([program, *words[1:]], stdout=log, stderr=log))
            wait_until(lambda: slurm("sinfo", "--noheader", "--format=%D %t", "--partition=cpu").strip() == "2 idle")
            yield
        finally:
            slurm("scancel", "--partition=cpu,urgent")
            wait_until(lambda: not slurm("squeue", "--noheader"))
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(60)
            os.environ.pop("SLURM_CONF")
            if before:
                os.environ["SLURM_CONF"] = before


def slurm(*words):
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout


def wait_until(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)
