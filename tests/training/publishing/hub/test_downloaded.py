"""A release that the Hub's client downloaded is one, with the client's notes beside it and as links in its cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from tests.hub_server.server import HubServer
from tests.training.publishing.broken import QUICK
from tests.training.publishing.packed import NAME, write_packed
from tests.training.recipes import write_sources
from training.data.release import release
from training.publish import main
from training.publishing.verify import examine

REPO, COPY = f"org/{NAME}", f"ada/{NAME}"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.mark.usefixtures("client_waits")
@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_downloaded_release_is_verified_and_pushed_again(
    packed: Path, hub_server: HubServer, tmp_path: Path, place: str
) -> None:
    assert main(["push", str(packed), "--repo", REPO]) == 0
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / NAME if place == "folder" else None))
    assert (folder / ".gitattributes").is_file()
    assert (folder / ".cache/huggingface").is_dir() == (place == "folder")
    assert (folder / "model.safetensors").is_symlink() == (place == "cache")
    assert examine(folder, QUICK).faults == ()
    assert main(["push", str(folder), "--repo", COPY]) == 0
    before, after = (hub_server.repository(repo).files() for repo in (REPO, COPY))
    assert after.keys() == before.keys() and not [path for path in after if path.startswith(".cache")]
    assert {path for path in after if after[path] != before[path]} == {"README.md", "release.json"}


@pytest.mark.usefixtures("client_waits")
def test_a_link_elsewhere_and_a_hidden_file_are_faults_still(
    packed: Path, hub_server: HubServer, tmp_path: Path
) -> None:
    assert main(["push", str(packed), "--repo", REPO]) == 0
    folder = Path(snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    (tmp_path / "elsewhere").write_bytes((folder / "LICENSE").read_bytes())
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(tmp_path / "elsewhere")
    (folder / ".cache").mkdir()
    (folder / ".cache/notes").write_text("mine")
    found = [str(fault) for fault in examine(folder, QUICK).faults]
    assert any(fault.startswith("LICENSE: is a link") for fault in found)
    assert any(fault.startswith(".cache/notes: does not belong") for fault in found)


@pytest.mark.usefixtures("client_waits")
def test_a_downloaded_data_release_is_pushed_again(hub_server: HubServer, tmp_path: Path) -> None:
    released = release(write_sources(tmp_path / "data"), tmp_path / "tiny-data")
    assert main(["push-data", str(released), "--repo", "org/tiny-data"]) == 0
    shutil.rmtree(released)
    folder = snapshot_download("org/tiny-data", repo_type="dataset", local_dir=tmp_path / "tiny-data")
    assert main(["push-data", folder, "--repo", "ada/tiny-data"]) == 0
    before, after = (hub_server.repository(f"{owner}/tiny-data", "dataset").files() for owner in ("org", "ada"))
    assert after.keys() == before.keys()
