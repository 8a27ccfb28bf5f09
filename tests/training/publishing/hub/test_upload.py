"""Uploading packed models: what is sent, what is refused, and that no fault leaves half of it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from tests.hub_server.client import connected, environment
from tests.hub_server.server import TOKEN, HubServer
from tests.hub_server.store import Repository
from tests.training.publishing.broken import QUICK
from tests.training.publishing.packed import NAME, spoil
from training import publish
from training.publish import main
from training.publishing.card import model_card
from training.publishing.hub.upload import packed_contents, write_card
from training.publishing.record import Reference, StageRecord
from training.publishing.verify import examine

pytestmark = pytest.mark.usefixtures("client_waits")

REPO = "org/tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hold(hub_server: HubServer, files: dict[str, bytes], name: str = REPO, kind: str = "model") -> Repository:
    """A repository that holds some files."""
    repository = hub_server.store.create(kind, name)
    repository.commit("main", "held", {path: repository.add_blob(content) for path, content in files.items()}, [])
    return repository


def hold_model(hub_server: HubServer, folder: Path, **fields: object) -> Repository:
    """A repository that holds a packed folder, as ``hf upload`` leaves it, with other fields in its record."""
    files = contents(folder)
    return hold(hub_server, {**files, "release.json": json.dumps(json.loads(files["release.json"]) | fields).encode()})


def test_push_uploads_the_folder_and_changes_nothing_the_second_time(packed, hub_server, capsys):
    written = contents(packed)
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    repository = hub_server.repository(REPO)
    uploaded = repository.files()
    assert uploaded.keys() == written.keys()
    assert {path for path in written if uploaded[path] != written[path]} == {"README.md", "release.json"}
    assert f'"{REPO}"' in uploaded["README.md"].decode()
    assert json.loads(uploaded["release.json"])["files"]["README.md"] == len(uploaded["README.md"])
    assert contents(packed) == written
    assert repository.tags == {"v1.0": repository.branches["main"]}
    assert f"{hub_server.address}/{REPO}: {len(written)} files added" in capsys.readouterr().out

    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert len(repository.commits) == 2
    assert "nothing to change" in capsys.readouterr().out


def test_message_branch_and_visibility_are_as_given(packed, hub_server):
    words = ["--private", "--revision", "draft", "--message", "First draft"]
    assert main(["push", str(packed), "--repo", REPO, *words]) == 0
    repository = hub_server.repository(REPO)
    assert repository.private
    assert repository.find("draft").title == "First draft"
    assert "model.safetensors" in repository.files("draft")
    assert repository.files() == {}


def test_a_dry_run_ends_in_a_summary_without_login_or_network(packed, hub_server, tmp_path, capsys):
    before = contents(packed)
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
    assert contents(packed) == before
    assert hub_server.log == []


def test_a_card_is_written_beside_its_folder_if_possible(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "packed"
    assert write_card(folder, "# A") == tmp_path / "packed.card.md"
    assert write_card(folder, "# B").read_text() == "# B"
    # As on a read-only disk: the parent is not a folder.
    elsewhere = write_card(tmp_path / "packed.card.md/packed", "# C")
    assert elsewhere.name == "packed.card.md" and elsewhere.parent.parent == tmp_path and elsewhere.read_text() == "# C"


def test_the_card_names_the_given_datasets(packed, hub_server, capsys):
    words = ["push", str(packed), "--repo", REPO, "--data", "org/first", "--data", "org/second"]
    assert main([*words, "--data", "none"]) == 2
    assert "--data 'none'" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    uploaded = hub_server.repository(REPO).files()["README.md"].decode()
    assert "datasets:\n- org/first\n- org/second\n" in uploaded
    assert uploaded == packed.with_name(f"{NAME}.card.md").read_text()


def test_a_hidden_file_is_not_uploaded(packed):
    for path in (".DS_Store", ".cache/huggingface/token", "1_Pooling/.hidden"):
        (packed / path).parent.mkdir(parents=True, exist_ok=True)
        (packed / path).write_text("private")
    assert not [path for path in packed_contents(packed) if "/." in f"/{path}"]


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
def test_a_bad_name_is_refused_before_anything_is_sent(packed, hub_server, capsys, words, parts):
    assert main(["push", str(packed), *words]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert all(part in shown for part in parts)
    assert hub_server.log == []


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("release.json", None, ["release.json", "pack it"]),
        ("release.json", "{}", ["release.json", "pack it"]),
        ("release.json", '{"made_of": {}, "sources": {}, "files": {}}', ["release.json", "pack it"]),
        ("model.safetensors", None, ["model.safetensors is not as release.json says", "pack the run again"]),
        ("config.json", "{}", ["config.json is not as release.json says"]),
        ("notes.txt", "mine", ["notes.txt is not as release.json says"]),
    ],
)
def test_a_folder_that_is_not_packed_or_was_changed_is_refused(packed, hub_server, capsys, name, content, parts):
    (packed / name).unlink(missing_ok=True)
    if content is not None:
        (packed / name).write_text(content)
    for words in ([], ["--dry-run"]):
        assert main(["push", str(packed), "--repo", REPO, *words]) == 2
        shown = capsys.readouterr().err
        assert all(part in shown for part in [str(packed), *parts])
    assert hub_server.log == []


def test_a_folder_with_a_fault_is_uploaded_only_when_asked(packed, hub_server, capsys):
    spoil(packed)
    assert main(["push", str(packed), "--repo", REPO]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "1_Pooling/config.json" in shown and "--no-verify" in shown
    assert hub_server.log == []
    assert main(["push", str(packed), "--repo", REPO, "--no-verify"]) == 0
    assert "1_Pooling/config.json" in hub_server.repository(REPO).files()


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
def test_another_model_is_replaced_only_when_asked(packed, hub_server, capsys, fields, part, words):
    repository = hold_model(hub_server, packed, **fields)
    before = dict(repository.branches)
    assert main(["push", str(packed), "--repo", REPO, *words]) == 2
    shown = capsys.readouterr().err
    assert part in shown and "--replace" in shown
    assert repository.branches == before
    assert main(["push", str(packed), "--repo", REPO, "--replace"]) == 0
    assert repository.find("main").parent == before["main"]
    assert json.loads(repository.files()["release.json"])["name"] == NAME


def test_a_version_trained_again_takes_the_place_of_the_old_one(packed, hub_server):
    repository = hold_model(hub_server, packed, parameters=1)
    repository.tags["v1.0"] = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.1"]) == 0
    assert json.loads(repository.files("v1.0")["release.json"])["parameters"] == 1
    assert json.loads(repository.files("v1.1")["release.json"])["parameters"] > 1


@pytest.mark.parametrize("held", [{"config.json": b"{}"}, {"release.json": b"no json"}, {"release.json": b"[]"}])
def test_files_without_a_record_are_replaced_only_when_asked(packed, hub_server, capsys, held):
    repository = hold(hub_server, held)
    assert main(["push", str(packed), "--repo", REPO]) == 2
    assert "release.json" in capsys.readouterr().err
    assert repository.files() == held
    assert main(["push", str(packed), "--repo", REPO, "--replace"]) == 0
    assert "model.safetensors" in repository.files()


def test_a_repository_made_on_the_site_counts_as_empty(packed, hub_server):
    hold(hub_server, {"README.md": b"---\nlicense: mit\n---\n"})
    assert main(["push", str(packed), "--repo", REPO]) == 0


def test_a_tag_on_other_content_is_refused_before_the_upload(packed, hub_server, capsys):
    repository = hold_model(hub_server, packed, parameters=1)
    first = repository.tags["v1.0"] = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 2
    assert "v1.0" in capsys.readouterr().err
    assert repository.branches == {"main": first}
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0", "--replace"]) == 0
    assert repository.tags["v1.0"] == repository.branches["main"] != first


@pytest.mark.parametrize("login", ["environment", "file"])
def test_the_token_is_given_to_nobody_but_the_hub(packed, hub_server, tmp_path, capsys, caplog, login):
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


def test_a_killed_push_leaves_nothing_visible_and_the_next_completes(hub_server, packed, kill_when_met):
    slow = hub_server.faults.add("PUT", "storage", delay=60)
    words = ["push", str(packed), "--repo", REPO, "--revision", "v2", "--tag", "v2.0"]
    kill_when_met(slow, publish.__file__, *words)
    repository = hub_server.repository(REPO)
    assert set(repository.branches) == {"main", "v2.partial"}
    assert repository.files("v2.partial") == {}
    assert main(words) == 0
    assert set(repository.branches) == {"main", "v2"}
    assert [name for name, _ in repository.moves] == ["main", "v2.partial", "v2.partial", "v2.partial", "v2", "v2.0"]
    assert repository.files("v2.0").keys() == contents(packed).keys()


def test_hf_upload_takes_the_folder_as_it_is(hub_server, packed, tmp_path):
    command = [str(Path(sys.executable).with_name("hf")), "upload", REPO, str(packed)]
    known = environment(hub_server, tmp_path / "home")
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    repository = hub_server.repository(REPO)
    assert repository.files() == contents(packed)
    # What hf uploaded is known as the same model, and only its card is another.
    first = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO]) == 0
    assert repository.find("main").parent == first


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_a_downloaded_release_is_verified_and_pushed_again(packed, hub_server, tmp_path, where):
    repo, copy = f"org/{NAME}", f"ada/{NAME}"
    assert main(["push", str(packed), "--repo", repo]) == 0
    folder = Path(snapshot_download(repo, local_dir=tmp_path / "copy" / NAME if where == "folder" else None))
    assert (folder / ".gitattributes").is_file()
    assert (folder / ".cache/huggingface").is_dir() == (where == "folder")
    assert (folder / "model.safetensors").is_symlink() == (where == "cache")
    assert examine(folder, QUICK).faults == ()
    assert main(["push", str(folder), "--repo", copy]) == 0
    before, after = (hub_server.repository(name).files() for name in (repo, copy))
    assert after.keys() == before.keys() and not [path for path in after if path.startswith(".cache")]
    assert {path for path in after if after[path] != before[path]} == {"README.md", "release.json"}


def test_a_link_elsewhere_and_a_hidden_file_are_still_faults(packed, hub_server, tmp_path):
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
