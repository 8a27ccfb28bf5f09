"""The commands as a user runs them: ``publish.py``, killed in mid-upload, and ``hf upload`` of a packed folder."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hub_server.client import environment
from tests.hub_server.faults import Fault
from tests.hub_server.server import HubServer
from tests.training.publishing.packed import write_packed
from training import publish
from training.publish import main

REPO = "org/tiny"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


def wait_for(fault: Fault, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not fault.met:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.usefixtures("client_waits")
def test_a_push_that_is_killed_leaves_nothing_to_be_seen_and_the_next_completes(
    hub_server: HubServer, packed: Path, tmp_path: Path
) -> None:
    slow = hub_server.faults.add("PUT", "storage", delay=60)
    words = ["push", str(packed), "--repo", REPO, "--revision", "v2", "--tag", "v2.0"]
    process = subprocess.Popen(
        [sys.executable, publish.__file__, *words],
        env=environment(hub_server, tmp_path / "home"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(slow, process)
    finally:
        process.kill()
        process.wait()
    repository = hub_server.repository(REPO)
    assert set(repository.branches) == {"main", "v2.partial"}
    assert repository.files("v2.partial") == {}
    assert main(words) == 0
    assert set(repository.branches) == {"main", "v2"}
    assert [name for name, _ in repository.moves] == ["main", "v2.partial", "v2.partial", "v2.partial", "v2", "v2.0"]
    assert repository.files("v2.0").keys() == {
        path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()
    }


@pytest.mark.usefixtures("client_waits")
def test_hf_upload_takes_the_folder_as_it_is(hub_server: HubServer, packed: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("hf")), "upload", REPO, str(packed)]
    done = subprocess.run(
        command, env=environment(hub_server, tmp_path / "home"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    repository = hub_server.repository(REPO)
    assert repository.files() == {
        path.relative_to(packed).as_posix(): path.read_bytes() for path in packed.rglob("*") if path.is_file()
    }
    # What hf uploaded is known as the same model, and only its card is another.
    first = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO]) == 0
    assert repository.find("main").parent == first
