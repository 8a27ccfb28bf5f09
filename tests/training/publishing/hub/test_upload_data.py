"""Uploading dataset releases, and files that change while they are uploaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from tests.hub_server.client import connected
from tests.training.publishing.hub.test_upload import REPO, contents, hold
from tests.training.publishing.packed import NAME
from tests.training.recipes import write_sources
from training.data.releasing.release import release
from training.publish import main
from training.publishing.hub.hub import HubRepository

pytestmark = pytest.mark.usefixtures("client_waits")

DATA = "org/tiny-data"


def test_push_data_uploads_the_release_and_changes_nothing_the_second_time(released, hub_server, tmp_path, capsys):
    written = contents(released)
    assert main(["push-data", str(released), "--repo", DATA, "--tag", "v1.0", "--private"]) == 0
    repository = hub_server.repository(DATA, "dataset")
    uploaded = repository.files()
    assert uploaded.keys() == {path for path in written if "/." not in f"/{path}"}
    assert {path for path in uploaded if uploaded[path] != written[path]} == {"README.md", "release.json"}
    card = uploaded["README.md"].decode()
    assert card.count(f'load_dataset("{DATA}", "tiny_') == written["README.md"].count(b"load_dataset(") > 0
    assert f"`{DATA}` is the name on the Hub" in card
    assert '"tiny-data"' not in card
    assert json.loads(uploaded["release.json"])["files"]["README.md"] == len(uploaded["README.md"])
    assert repository.private
    assert repository.tags == {"v1.0": repository.branches["main"]}
    assert f"{hub_server.address}/datasets/{DATA}: " in capsys.readouterr().out
    assert main(["push-data", str(released), "--repo", DATA, "--tag", "v1.0"]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert len(repository.commits) == 2

    # A downloaded release is one.
    folder = snapshot_download(DATA, repo_type="dataset", local_dir=tmp_path / "copy" / "tiny-data")
    assert main(["push-data", folder, "--repo", "ada/tiny-data"]) == 0
    assert hub_server.repository("ada/tiny-data", "dataset").files().keys() == uploaded.keys()


def test_a_dry_run_of_data_needs_neither_login_nor_network(released, hub_server, tmp_path, capsys):
    with connected(hub_server, tmp_path / "home", token=None):
        assert main(["push-data", str(released), "--repo", DATA, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "data/" in shown and "| " not in shown
    card = released.with_name("tiny-data.card.md")
    assert f'load_dataset("{DATA}"' in card.read_text()
    summary = shown.split("\n\n")[-1].splitlines()
    assert f"to {hub_server.address}/datasets/{DATA}, branch main" in summary[0]
    assert [line.split(maxsplit=1)[1].partition(";")[0] for line in summary[1:6]] == [
        *("cc0-1.0", "none", "a new repository as its owner's settings say"),
        *("the files are those that release.json lists", str(card)),
    ]
    assert summary[6:] == ["Nothing was uploaded."]
    assert hub_server.log == []


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (None, "not a record of a dataset release"),
        ("{}", "not a record of a dataset release"),
        ("no json", "not a record of a dataset release"),
        ('{"name": "tiny-embedder", "stages": []}', "not a record of a dataset release"),
        ('{"name": "x", "made_of": {}, "sources": {}, "files": {}, "sha256": {}}', "is not as release.json says"),
    ],
)
def test_a_folder_that_is_not_a_release_is_refused(released, hub_server, capsys, record, part):
    (released / "release.json").unlink()
    if record is not None:
        (released / "release.json").write_text(record)
    assert main(["push-data", str(released), "--repo", DATA]) == 2
    assert part in capsys.readouterr().err
    assert hub_server.log == []


def test_a_source_or_another_dataset_is_lost_only_when_asked(released, hub_server, tmp_path, capsys):
    assert main(["push-data", str(released), "--repo", DATA]) == 0
    repository = hub_server.repository(DATA, "dataset")
    first, manifest = repository.branches["main"], write_sources(tmp_path / "data")
    fewer = release(manifest, tmp_path / "fewer", sources=["tiny_retrieval"], name="tiny-data")
    other = release(manifest, tmp_path / "other-data")
    for folder, part in ((fewer, "tiny_classification"), (other, "another dataset (tiny-data, not other-data)")):
        assert main(["push-data", str(folder), "--repo", DATA]) == 2
        shown = capsys.readouterr().err
        assert part in shown and "--replace" in shown
        assert repository.branches["main"] == first
    assert main(["push-data", str(fewer), "--repo", DATA, "--replace"]) == 0
    assert not [path for path in repository.files() if "tiny_classification" in path]
    # More sources are an update.
    assert main(["push-data", str(released), "--repo", DATA]) == 0
    assert repository.files() == repository.files(first)


def test_data_of_somebody_else_is_replaced_only_when_asked(released, hub_server, capsys):
    repository = hold(hub_server, {"rows.csv": b"a,b\n"}, DATA, "dataset")
    assert main(["push-data", str(released), "--repo", DATA]) == 2
    assert "no release.json lists" in capsys.readouterr().err
    assert repository.files() == {"rows.csv": b"a,b\n"}
    assert main(["push-data", str(released), "--repo", DATA, "--replace"]) == 0
    assert "rows.csv" not in repository.files()


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Changes a file, without changing its size, between its upload and the commit. A kilobyte counts as large."""
    monkeypatch.setattr("training.common.hub.LARGE_BYTES", 1000)
    check = HubRepository._check_unchanged

    def change(path: Path) -> None:
        def changed(self: HubRepository, *known: object) -> None:
            flip(path)
            check(self, *known)

        monkeypatch.setattr(HubRepository, "_check_unchanged", changed)

    return change


@pytest.mark.parametrize("command", ["push", "push-family", "push-data"])
def test_a_large_file_that_changes_during_the_upload_is_not_published(
    packed, released, hub_server, meanwhile, capsys, command
):
    data = command == "push-data"
    folder, name = (released, DATA) if data else (packed, f"org/{NAME}")
    large = next(folder.glob("**/*.parquet" if data else "model.safetensors"))
    words = [command, str(folder), *(["--org", "org"] if command == "push-family" else ["--repo", name])]
    # Changed before: found by its hash.
    flip(large)
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == 2
        assert f"{large.name} is not as release.json says" in capsys.readouterr().err
    assert hub_server.store.repositories == {}
    flip(large)
    meanwhile(large)
    assert main([*words, "--tag", "v1.0"]) == (1 if command == "push-family" else 2)
    shown = capsys.readouterr()
    assert f"{large.name}: was changed while it was uploaded" in shown.out + shown.err
    repository = hub_server.repository(name, "dataset" if data else "model")
    assert repository.files() == {} and repository.tags == {}


def test_a_small_file_is_published_as_it_was_hashed(packed, hub_server, meanwhile):
    small = packed / "1_Pooling/config.json"
    before = small.read_bytes()
    meanwhile(small)
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert hub_server.repository(REPO).files("v1.0")["1_Pooling/config.json"] == before != small.read_bytes()


def test_data_that_was_changed_at_its_size_is_not_taken_for_the_release(tmp_path, refuses):
    manifest = write_sources(tmp_path / "data")
    released = release(manifest, tmp_path / "tiny-data")
    rows = next(released.glob("data/**/*.parquet"))
    flip(rows)
    with refuses(rows, "was changed since its release"):
        release(manifest, released)


def test_a_checkpoint_that_changes_during_the_upload_is_not_published(
    packed_run, tmp_path, hub_server, meanwhile, capsys
):
    run = Path(shutil.copytree(packed_run / "run", tmp_path / "run"))
    first = min(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    meanwhile(first / "model.safetensors")
    assert main(["push-checkpoints", str(run), "--repo", REPO]) == 2
    assert "was changed while it was uploaded" in capsys.readouterr().err
    assert not [name for name in hub_server.repository(REPO).branches if name.endswith(first.name.rpartition("-")[2])]
