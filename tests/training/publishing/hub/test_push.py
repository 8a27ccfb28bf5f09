"""Uploading a packed model: what goes there, what is refused, and that no fault leaves half of it."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.hub_server.client import connected
from tests.hub_server.server import TOKEN, HubServer
from tests.hub_server.store import Repository
from tests.training.publishing.packed import NAME, spoil, write_packed
from training.publish import main
from training.publishing.card import model_card
from training.publishing.hub.push import packed_files
from training.publishing.record import Reference, StageRecord

REPO = "org/tiny"


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed_once, tmp_path / NAME))


@pytest.mark.usefixtures("client_waits")
def test_push_uploads_the_folder_and_changes_nothing_the_second_time(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    repository = hub_server.repository(REPO)
    uploaded = repository.files()
    written = {path.relative_to(packed).as_posix(): content for path, content in before.items()}
    assert uploaded.keys() == written.keys()
    assert {path for path in written if uploaded[path] != written[path]} == {"README.md", "release.json"}
    assert f'"{REPO}"' in uploaded["README.md"].decode()
    assert json.loads(uploaded["release.json"])["files"]["README.md"] == len(uploaded["README.md"])
    assert {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()} == before
    assert repository.tags == {"v1.0": repository.branches["main"]}
    assert f"{hub_server.address}/{REPO}: {len(written)} files added" in capsys.readouterr().out

    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert len(repository.commits) == 2
    assert "nothing to change" in capsys.readouterr().out


@pytest.mark.usefixtures("client_waits")
def test_the_message_the_branch_and_a_private_repository_are_as_told(packed: Path, hub_server: HubServer) -> None:
    words = ["--private", "--revision", "draft", "--message", "First draft"]
    assert main(["push", str(packed), "--repo", REPO, *words]) == 0
    repository = hub_server.repository(REPO)
    assert repository.private
    assert repository.find("draft").title == "First draft"
    assert "model.safetensors" in repository.files("draft")
    assert repository.files() == {}


def test_a_dry_run_ends_in_a_summary_without_login_or_network(
    packed: Path, hub_server: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()}
    words = ["push", str(packed), "--repo", REPO, "--dry-run"]
    with connected(hub_server, tmp_path / "home", token=None):
        assert main([*words, "--tag", "v1.0", "--private"]) == 0
        shown = capsys.readouterr().out
        assert main([*words, "--no-verify"]) == 0
    assert f"{(packed / 'model.safetensors').stat().st_size:,}  model.safetensors" in shown
    card = packed.with_name(f"{NAME}.card.md")
    summary = shown.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in summary] == [
        *("upload", "licence", "tag", "visibility", "checks", "card", "Nothing")
    ]
    assert f"in {len(before)} files, to {hub_server.address}/{REPO}, branch main" in summary[0]
    assert [line.split(maxsplit=1)[1].partition(";")[0] for line in summary[1:6]] == [
        *("apache-2.0", "v1.0", "private", "no fault", str(card))
    ]
    assert summary[6] == "Nothing was uploaded."
    assert card.read_text() == model_card(packed, REPO) and len(shown.splitlines()) < len(before) + 10
    assert "tag         none\n" in (second := capsys.readouterr().out) and "checks      not made" in second
    assert {path: path.read_bytes() for path in packed.rglob("*") if path.is_file()} == before
    assert hub_server.log == []


@pytest.mark.usefixtures("client_waits")
def test_the_card_names_the_data_that_is_told(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(packed), "--repo", REPO, "--data", "org/first", "--data", "org/second"]
    assert main([*words, "--data", "none"]) == 2
    assert "--data 'none'" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    uploaded = hub_server.repository(REPO).files()["README.md"].decode()
    assert "datasets:\n- org/first\n- org/second\n" in uploaded
    assert uploaded == packed.with_name(f"{NAME}.card.md").read_text()


def test_a_hidden_file_is_not_uploaded(packed: Path) -> None:
    for path in (".DS_Store", ".cache/huggingface/token", "1_Pooling/.hidden"):
        (packed / path).parent.mkdir(parents=True, exist_ok=True)
        (packed / path).write_text("private")
    assert not [path for path in packed_files(packed, REPO, check=False) if "/." in f"/{path}"]


def edited(packed: Path, name: str, content: str | None) -> None:
    (packed / name).unlink(missing_ok=True)
    if content is not None:
        (packed / name).write_text(content)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--repo", "tiny"], ["'tiny'", "ORG/NAME"]),
        (["--repo", ""], ["''", "ORG/NAME"]),
        (["--repo", "org/"], ["'org/'", "ORG/NAME"]),
        (["--repo", "/tiny"], ["'/tiny'", "ORG/NAME"]),
        (["--repo", "org/a/b"], ["'org/a/b'", "ORG/NAME"]),
        (["--repo", "org/a b"], ["'org/a b'"]),
        (["--repo", REPO, "--tag", "version one"], ["--tag 'version one'"]),
        (["--repo", REPO, "--tag", ""], ["--tag ''"]),
        (["--repo", REPO, "--tag", "a..b"], ["--tag 'a..b'"]),
        (["--repo", REPO, "--revision", "refs/pr/1"], ["--revision 'refs/pr/1'"]),
        (["--repo", REPO, "--revision", "x.partial"], ["x.partial", "unfinished"]),
    ],
)
@pytest.mark.usefixtures("client_waits")
def test_a_name_that_is_none_is_refused_before_anything_is_sent(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]
) -> None:
    assert main(["push", str(packed), *words]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert all(part in told for part in parts)
    assert hub_server.log == []


@pytest.mark.usefixtures("client_waits")
def test_no_repository_named_is_refused(packed: Path, hub_server: HubServer) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(packed)])
    assert hub_server.log == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"release.json": None}, ["release.json", "pack it"]),
        ({"release.json": "{}"}, ["release.json", "pack it"]),
        ({"release.json": '{"made_of": {}, "sources": {}, "files": {}}'}, ["release.json", "pack it"]),
        ({"model.safetensors": None}, ["model.safetensors is not as release.json says", "pack the run again"]),
        ({"config.json": "{}"}, ["config.json is not as release.json says"]),
        ({"notes.txt": "mine"}, ["notes.txt is not as release.json says"]),
    ],
)
@pytest.mark.usefixtures("client_waits")
def test_a_folder_that_is_not_packed_or_was_changed_is_refused(
    packed: Path,
    hub_server: HubServer,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str | None],
    parts: list[str],
) -> None:
    for name, content in change.items():
        edited(packed, name, content)
    for words in ([], ["--dry-run"]):
        assert main(["push", str(packed), "--repo", REPO, *words]) == 2
        told = capsys.readouterr().err
        assert all(part in told for part in [str(packed), *parts])
    assert hub_server.log == []


@pytest.mark.usefixtures("client_waits")
def test_a_folder_with_a_fault_is_uploaded_only_when_told(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(packed)
    assert main(["push", str(packed), "--repo", REPO]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "1_Pooling/config.json" in told
    assert "--no-verify" in told
    assert hub_server.log == []
    assert main(["push", str(packed), "--repo", REPO, "--no-verify"]) == 0
    assert "1_Pooling/config.json" in hub_server.repository(REPO).files()


def hold(hub_server: HubServer, folder: Path, **fields: object) -> Repository:
    """A repository that holds a packed folder, as ``hf upload`` leaves it, with other fields in its record."""
    repository = hub_server.store.create("model", REPO)
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents["release.json"] = json.dumps(json.loads(contents["release.json"]) | fields).encode()
    entries = {path: repository.add_blob(content) for path, content in contents.items()}
    repository.commit("main", "held", entries, [])
    return repository


OTHER_START = [asdict(StageRecord("single", "training", Reference("hub", "their/model")))]
OTHER_STAGES = [asdict(StageRecord("stage2", "training", Reference("scratch")))]


@pytest.mark.parametrize(
    ("fields", "part", "words"),
    [
        ({"name": "other-embedder"}, "another model (other-embedder, not tiny-embedder)", []),
        ({"shape": {"hidden_size": 64}}, "another shape", []),
        ({"stages": OTHER_START}, "other stages", []),
        ({"stages": OTHER_STAGES}, "other stages", ["--revision", "draft"]),
    ],
)
@pytest.mark.usefixtures("client_waits")
def test_another_model_is_not_replaced(
    packed: Path,
    hub_server: HubServer,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, object],
    part: str,
    words: list[str],
) -> None:
    repository = hold(hub_server, packed, **fields)
    before = dict(repository.branches)
    assert main(["push", str(packed), "--repo", REPO, *words]) == 2
    told = capsys.readouterr().err
    assert part in told
    assert "--replace" in told
    assert repository.branches == before


@pytest.mark.usefixtures("client_waits")
def test_another_model_is_replaced_when_told(packed: Path, hub_server: HubServer) -> None:
    repository = hold(hub_server, packed, name="other")
    first = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO, "--replace"]) == 0
    assert repository.find("main").parent == first
    assert json.loads(repository.files()["release.json"])["name"] == NAME


@pytest.mark.usefixtures("client_waits")
def test_a_version_trained_again_takes_the_place_of_the_old_one(packed: Path, hub_server: HubServer) -> None:
    repository = hold(hub_server, packed, parameters=1)
    repository.tags["v1.0"] = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.1"]) == 0
    assert json.loads(repository.files("v1.0")["release.json"])["parameters"] == 1
    assert json.loads(repository.files("v1.1")["release.json"])["parameters"] > 1


@pytest.mark.parametrize("held", [{"config.json": b"{}"}, {"release.json": b"no json"}, {"release.json": b"[]"}])
@pytest.mark.usefixtures("client_waits")
def test_what_nobody_recorded_is_replaced_only_when_told(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str], held: dict[str, bytes]
) -> None:
    repository = hub_server.store.create("model", REPO)
    repository.commit("main", "theirs", {path: repository.add_blob(content) for path, content in held.items()}, [])
    assert main(["push", str(packed), "--repo", REPO]) == 2
    assert "release.json" in capsys.readouterr().err
    assert repository.files() == held
    assert main(["push", str(packed), "--repo", REPO, "--replace"]) == 0
    assert "model.safetensors" in repository.files()


@pytest.mark.usefixtures("client_waits")
def test_a_repository_made_on_the_site_counts_as_empty(packed: Path, hub_server: HubServer) -> None:
    repository = hub_server.store.create("model", REPO)
    repository.commit("main", "site", {"README.md": repository.add_blob(b"---\nlicense: mit\n---\n")}, [])
    assert main(["push", str(packed), "--repo", REPO]) == 0


@pytest.mark.usefixtures("client_waits")
def test_a_tag_on_other_content_is_refused_before_the_upload(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = hold(hub_server, packed, parameters=1)
    first = repository.tags["v1.0"] = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 2
    assert "v1.0" in capsys.readouterr().err
    assert repository.branches == {"main": first}
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0", "--replace"]) == 0
    assert repository.tags["v1.0"] == repository.branches["main"] != first


@pytest.mark.usefixtures("client_waits")
def test_a_dataset_of_that_name_is_refused(
    packed: Path, hub_server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_server.store.create("dataset", REPO)
    assert main(["push", str(packed), "--repo", REPO]) == 2
    assert "is a dataset" in capsys.readouterr().err
    assert ("model", REPO) not in hub_server.store.repositories


@pytest.mark.parametrize("login", ["environment", "file"])
def test_the_token_is_told_to_nobody_but_the_hub(
    packed: Path,
    hub_server: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    login: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    home = tmp_path / "home"
    home.mkdir()
    if login == "file":
        (home / "token").write_text(TOKEN)
    hub_server.faults.add("POST", "/repos/create", status=503)
    hub_server.faults.add("PUT", "storage", cut_after=10)
    hub_server.faults.add("POST", "/commit/", lose_answer=True)
    with connected(hub_server, home, TOKEN if login == "environment" else None):
        assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
        assert main(["push", str(packed), "--repo", "stranger/tiny"]) == 2
        hub_server.store.accounts.clear()
        assert main(["push", str(packed), "--repo", REPO]) == 2
    shown = capsys.readouterr()
    assert "refuses the login" in shown.err
    assert TOKEN not in shown.out + shown.err + caplog.text
    # Addresses of the storage are signed.
    assert "HTTP Request" not in caplog.text
    (home / "token").unlink(missing_ok=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    # The storage of large files is another service.
    assert {each.token for each in hub_server.log if "storage" not in each.path} == {TOKEN}
    assert {each.token for each in hub_server.requests("PUT", "storage")} == {None}
