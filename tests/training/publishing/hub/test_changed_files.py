"""Files that change while they are uploaded: what is published is what was hashed and checked, or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub_server.server import HubServer
from tests.training.publishing.packed import NAME, write_packed
from tests.training.recipes import write_sources
from training.data.release import release
from training.publish import main
from training.publishing.hub.hub_repository import HubRepository

REPO = "org/tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its packed folder."""
    folder = tmp_path_factory.mktemp("trained")
    write_packed(folder)
    return folder


@pytest.fixture
def packed(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "packed" / NAME, tmp_path / NAME))


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Changes a file, at its size, when all is uploaded and the commit comes next."""

    def change(path: Path) -> None:
        head = HubRepository.head

        def changed(self: HubRepository, branch: str) -> str | None:
            flip(path)
            return head(self, branch)

        monkeypatch.setattr(HubRepository, "head", changed)

    return change


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a kilobyte are large: they are not kept in memory."""
    monkeypatch.setattr("training.common.content.LARGE_BYTES", 1000)


def flip(path: Path) -> None:
    """Changes the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.usefixtures("client_waits", "large")
def test_a_large_file_that_changes_during_the_upload_is_not_published(
    packed: Path, hub_server: HubServer, meanwhile: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    meanwhile(packed / "model.safetensors")
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 2
    told = capsys.readouterr().err
    assert "model.safetensors: was changed while it was uploaded" in told and len(told.splitlines()) == 1
    assert hub_server.repository(REPO).files() == {} and hub_server.repository(REPO).tags == {}


@pytest.mark.usefixtures("client_waits")
def test_a_small_file_is_published_as_it_was_hashed(
    packed: Path, hub_server: HubServer, meanwhile: Callable[[Path], None]
) -> None:
    before = (packed / "config.json").read_bytes()
    meanwhile(packed / "config.json")
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert hub_server.repository(REPO).files("v1.0")["config.json"] == before != (packed / "config.json").read_bytes()


@pytest.mark.parametrize("words", [["--no-verify"], ["--dry-run", "--no-verify"]])
@pytest.mark.usefixtures("client_waits")
def test_a_file_that_was_changed_at_its_size_before_is_refused(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    flip(packed / "model.safetensors")
    for command in (["push", str(packed), "--repo", REPO], ["push-family", str(packed), "--org", "org"]):
        assert main([*command, *words]) == 2
        assert "model.safetensors is not as release.json says; pack the run again" in capsys.readouterr().err
    assert hub_server.store.repositories == {}


@pytest.mark.usefixtures("client_waits", "large")
def test_a_member_of_a_family_that_changes_after_the_check_is_not_published(
    packed: Path, hub_server: HubServer, meanwhile: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    meanwhile(packed / "model.safetensors")
    assert main(["push-family", str(packed), "--org", "org", "--tag", "v1.0"]) == 1
    assert "model.safetensors: was changed while it was uploaded" in capsys.readouterr().out
    assert hub_server.repository(f"org/{NAME}").tags == {}


@pytest.mark.usefixtures("client_waits", "large")
def test_data_that_changes_is_not_published(
    tmp_path: Path, hub_server: HubServer, meanwhile: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    released = release(write_sources(tmp_path / "data"), tmp_path / "tiny-data")
    rows = next(released.glob("data/**/*.parquet"))
    flip(rows)
    assert main(["push-data", str(released), "--repo", REPO]) == 2
    assert "is not as release.json says; release the data again" in capsys.readouterr().err
    assert main(["push-data", str(released), "--repo", REPO, "--dry-run"]) == 2
    flip(rows)
    meanwhile(rows)
    assert main(["push-data", str(released), "--repo", REPO, "--tag", "v1.0"]) == 2
    assert "was changed while it was uploaded" in capsys.readouterr().err
    repository = hub_server.repository(REPO, "dataset")
    assert repository.files() == {} and repository.tags == {}


def test_data_that_was_changed_at_its_size_is_not_taken_for_the_release(tmp_path: Path, refuses) -> None:
    manifest = write_sources(tmp_path / "data")
    released = release(manifest, tmp_path / "tiny-data")
    rows = next(released.glob("data/**/*.parquet"))
    flip(rows)
    with refuses(rows, "was changed since its release"):
        release(manifest, released)


@pytest.mark.usefixtures("client_waits", "large")
def test_a_checkpoint_that_changes_during_the_upload_is_not_published(
    trained: Path,
    tmp_path: Path,
    hub_server: HubServer,
    meanwhile: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    first = min(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    meanwhile(first / "model.safetensors")
    assert main(["push-checkpoints", str(run), "--repo", REPO]) == 2
    assert "was changed while it was uploaded" in capsys.readouterr().err
    assert not [name for name in hub_server.repository(REPO).branches if name.endswith(first.name.rpartition("-")[2])]
