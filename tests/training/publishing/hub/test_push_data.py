"""Uploading a dataset release."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.hub_server.client import connected
from tests.hub_server.server import HubServer
from tests.training.recipes import write_sources
from training.data.release import release
from training.publish import main

REPO, NAME = "org/tiny-data", "tiny-data"


@pytest.fixture(scope="module")
def released_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    return release(write_sources(folder / "data"), folder / "tiny-data")


@pytest.fixture
def released(released_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(released_once, tmp_path / "tiny-data"))


@pytest.mark.usefixtures("client_waits")
def test_push_data_uploads_the_release_and_changes_nothing_the_second_time(
    released: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {path.relative_to(released).as_posix(): path.read_bytes() for path in released.rglob("*.*")}
    assert main(["push-data", str(released), "--repo", REPO, "--tag", "v1.0", "--private"]) == 0
    repository = hub_server.repository(REPO, "dataset")
    uploaded = repository.files()
    assert uploaded.keys() == written.keys()
    assert {path for path in written if uploaded[path] != written[path]} == {"README.md", "release.json"}
    card = uploaded["README.md"].decode()
    assert card.count(f'load_dataset("{REPO}", "tiny_') == written["README.md"].count(b"load_dataset(") > 0
    assert f"`{REPO}` is the name on the Hub" in card
    assert '"tiny-data"' not in card
    assert json.loads(uploaded["release.json"])["files"]["README.md"] == len(uploaded["README.md"])
    assert repository.private
    assert repository.tags == {"v1.0": repository.branches["main"]}
    assert f"{hub_server.address}/datasets/{REPO}: " in capsys.readouterr().out
    assert main(["push-data", str(released), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert len(repository.commits) == 2


def test_a_dry_run_ends_in_a_summary_without_login_or_network(
    released: Path, hub_server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with connected(hub_server, tmp_path / "home", token=None):
        assert main(["push-data", str(released), "--repo", REPO, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "data/" in shown and "| " not in shown
    card = released.with_name("tiny-data.card.md")
    assert f'load_dataset("{REPO}"' in card.read_text()
    summary = shown.split("\n\n")[-1].splitlines()
    assert f"to {hub_server.address}/datasets/{REPO}, branch main" in summary[0]
    assert [line.split(maxsplit=1)[1].partition(";")[0] for line in summary[1:6]] == [
        *("cc0-1.0", "none", "a new repository as its owner's settings say"),
        *("the files are those that release.json lists", str(card)),
    ]
    assert summary[6:] == ["Nothing was uploaded."]
    assert hub_server.log == []


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (None, "no record of a dataset release"),
        ("{}", "no record of a dataset release"),
        ("no json", "no record of a dataset release"),
        ('{"name": "tiny-embedder", "stages": []}', "no record of a dataset release"),
        ('{"name": "x", "made_of": {}, "sources": {}, "files": {}, "sha256": {}}', "is not as release.json says"),
    ],
)
@pytest.mark.usefixtures("client_waits")
def test_a_folder_that_is_no_release_is_refused(
    released: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str], record: str | None, part: str
) -> None:
    (released / "release.json").unlink()
    if record is not None:
        (released / "release.json").write_text(record)
    assert main(["push-data", str(released), "--repo", REPO]) == 2
    assert part in capsys.readouterr().err
    assert hub_server.log == []


@pytest.mark.usefixtures("client_waits")
def test_a_release_that_was_changed_is_refused(
    released: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with next(released.glob("data/**/*.parquet")).open("ab") as file:
        file.write(b"more")
    assert main(["push-data", str(released), "--repo", REPO]) == 2
    assert "is not as release.json says; release the data again" in capsys.readouterr().err
    assert hub_server.log == []


@pytest.mark.usefixtures("client_waits")
def test_a_source_is_lost_only_when_told(
    released: Path, hub_server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push-data", str(released), "--repo", REPO]) == 0
    repository = hub_server.repository(REPO, "dataset")
    first = repository.branches["main"]
    fewer = release(write_sources(tmp_path / "data"), tmp_path / "fewer", sources=["tiny_retrieval"], name=NAME)
    assert main(["push-data", str(fewer), "--repo", REPO]) == 2
    told = capsys.readouterr().err
    assert "tiny_classification" in told
    assert "--replace" in told
    assert repository.branches["main"] == first
    assert main(["push-data", str(fewer), "--repo", REPO, "--replace"]) == 0
    assert not [path for path in repository.files() if "tiny_classification" in path]
    # More sources are an update.
    assert main(["push-data", str(released), "--repo", REPO]) == 0
    assert repository.files() == repository.files(first)


@pytest.mark.usefixtures("client_waits")
def test_a_model_of_that_name_is_refused(
    released: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_server.store.create("model", REPO)
    assert main(["push-data", str(released), "--repo", REPO]) == 2
    assert "is a model" in capsys.readouterr().err
    assert ("dataset", REPO) not in hub_server.store.repositories


@pytest.mark.usefixtures("client_waits")
def test_data_of_somebody_else_is_replaced_only_when_told(
    released: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = hub_server.store.create("dataset", REPO)
    repository.commit("main", "theirs", {"rows.csv": repository.add_blob(b"a,b\n")}, [])
    assert main(["push-data", str(released), "--repo", REPO]) == 2
    assert "no release.json tells of" in capsys.readouterr().err
    assert repository.files() == {"rows.csv": b"a,b\n"}
    assert main(["push-data", str(released), "--repo", REPO, "--replace"]) == 0
    assert "rows.csv" not in repository.files()


@pytest.mark.usefixtures("client_waits")
def test_another_dataset_is_not_replaced_though_its_sources_have_the_same_names(
    released: Path, hub_server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push-data", str(released), "--repo", REPO]) == 0
    other = release(write_sources(tmp_path / "data"), tmp_path / "other-data")
    before = hub_server.repository(REPO, "dataset").branches["main"]
    assert main(["push-data", str(other), "--repo", REPO]) == 2
    assert "holds another dataset (tiny-data, not other-data)" in capsys.readouterr().err
    assert hub_server.repository(REPO, "dataset").branches["main"] == before
    assert main(["push-data", str(other), "--repo", REPO, "--replace"]) == 0
