"""What the tests of uploads share: a packed run, a dataset release, a Hub that does not wait, killed processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.hub_server import load_worker
from tests.hub_server.client import environment
from tests.training.publishing.packed import NAME, write_packed
from tests.training.recipes import write_sources
from training.data.releasing import release
from training.publishing.hub import hub as hub_module
from training.publishing.hub.hub import Hub


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
def waits(client_waits, monkeypatch):
    """The seconds that the client would have waited between its tries."""
    waits = []
    monkeypatch.setattr(hub_module, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def hub(waits):
    return Hub(tries=3)


@pytest.fixture
def kill_when_met(hub_server, tmp_path):
    """``kill_when_met(fault, script, *words)`` runs a command, and kills it when its request meets the fault."""

    def run(fault, script, *words, ready=lambda: True):
        known = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        known["env"] = environment(hub_server, tmp_path / "home")
        process = subprocess.Popen([sys.executable, script, *words], **known)
        try:
            until = time.monotonic() + 120
            while not (fault.met and ready()):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()

    return run


@pytest.fixture
def run_python(hub_server, tmp_path):
    """Runs a Python program that knows only this Hub, and returns what it printed."""

    def run(*words):
        known = {"env": environment(hub_server, tmp_path / "home"), "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, *map(str, words)], timeout=120, **known)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def load_back(run_python, tmp_path):
    """What ``load_worker`` loads of a model, and of a dataset if one is named."""

    def load(*words):
        run_python(load_worker.__file__, tmp_path / "loaded.npz", *words)
        return np.load(tmp_path / "loaded.npz")

    return load
