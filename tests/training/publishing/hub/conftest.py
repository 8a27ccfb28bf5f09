"""What the tests of uploads share: a packed run, a dataset release, a Hub that does not wait, killed processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server.client import environment
from tests.hub_server.faults import Fault
from tests.hub_server.server import HubServer
from tests.training.publishing.packed import NAME, write_packed
from tests.training.recipes import write_sources
from training.data.releasing import release
from training.publishing.hub.hub import Hub
from training.publishing.hub.retries import RetryPolicy


@pytest.fixture(scope="session")
def packed_run(tmp_path_factory):
    """The folder of a ``run`` and its ``packed`` folder; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("packed-run")
    write_packed(folder)
    return folder


@pytest.fixture
def packed(packed_run, tmp_path):
    return Path(shutil.copytree(packed_run / "packed" / NAME, tmp_path / NAME))


@pytest.fixture(scope="session")
def released_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    return release(write_sources(folder / "data"), folder / "tiny-data")


@pytest.fixture
def released(released_once, tmp_path):
    return Path(shutil.copytree(released_once, tmp_path / "tiny-data"))


@pytest.fixture
def waits() -> list[float]:
    """The seconds that ``hub`` would have waited."""
    return []


@pytest.fixture
def hub(client_waits: list[float], waits: list[float]) -> Hub:
    """A Hub with three tries and no waits."""
    return Hub(retries=RetryPolicy(tries=3, sleep=waits.append))


@pytest.fixture
def kill_when_met(hub_server: HubServer, tmp_path: Path) -> Callable[..., None]:
    """``kill_when_met(fault, script, *words)`` runs a command, and kills it when its request meets the fault."""

    def run(fault: Fault, script: str, *words: str, ready: Callable[[], bool] = lambda: True) -> None:
        process = subprocess.Popen(
            [sys.executable, script, *words],
            env=environment(hub_server, tmp_path / "home"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until = time.monotonic() + 120
            while not (fault.met and ready()):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()

    return run
