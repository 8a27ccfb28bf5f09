"""Uploading packed models and dataset releases: what is sent, what is refused, and what is never sent."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer

from modeling_f2llm import F2LLMModel
from tests.hub_server.client import connected
from tests.hub_server.load_worker import TEXTS
from tests.hub_server.server import TOKEN
from tests.training.publishing.packed import BASE, NAME, QUICK, content_of, spoil, write_packed
from tests.training.recipes import write_sources
from training.data.releasing import release
from training.publish import main
from training.publishing.pack import PackOptions, pack
from training.publishing.record import Reference, StageRecord
from training.publishing.verify import examine

pytestmark = pytest.mark.usefixtures("client_waits")

REPO, DATA = "org/tiny", "org/tiny-data"
LOAD = f"""
import sys
import numpy as np
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
texts = {TEXTS!r}
plain = SentenceTransformer("{REPO}", device="cpu")
code = SentenceTransformer("{REPO}", device="cpu", trust_remote_code=True)
tagged = SentenceTransformer("{REPO}", revision="v1.0", device="cpu")
peft = PeftModel.from_pretrained(AutoModel.from_pretrained("{BASE}"), "{REPO}").eval()
hidden = peft(**plain.tokenizer(texts[0], return_tensors="pt")).last_hidden_state[0, -1]
np.savez(
    sys.argv[1],
    plain=plain.encode(texts), code=code.encode(texts), tagged=tagged.encode(texts),
    peft=(hidden / hidden.norm()).detach().numpy(), kind=type(code.transformers_model).__module__,
)
"""


def hold(hub_server, files, name=REPO, kind="model"):
    """A repository that holds some files."""
    repository = hub_server.store.create(kind, name)
    repository.commit("main", "held", {path: repository.add_blob(content) for path, content in files.items()}, [])
    return repository


def hold_model(hub_server, folder, **fields):
    """A repository that holds a packed folder, as ``hf upload`` leaves it, with other fields in its record."""
    files = content_of(folder)
    return hold(hub_server, {**files, "release.json": json.dumps(json.loads(files["release.json"]) | fields).encode()})


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_folder_is_uploaded_once_with_its_name_in_the_card(packed, released, hub_server, capsys, kind):
    folder, command, repo = (packed, "push", REPO) if kind == "model" else (released, "push-data", DATA)
    written = content_of(folder)
    words = [command, str(folder), "--repo", repo, "--tag", "v1.0", "--private"]
    assert main(words) == 0
    repository = hub_server.repository(repo, kind)
    uploaded = repository.files()
    assert uploaded.keys() == written.keys()
    assert {path for path in uploaded if uploaded[path] != written[path]} == {"README.md", "release.json"}
    card = uploaded["README.md"].decode()
    assert f'"{repo}"' in card
    if kind == "dataset":
        assert card.count(f'load_dataset("{DATA}", "tiny_') == written["README.md"].count(b"load_dataset(") > 0
        assert f"`{DATA}` is the name on the Hub" in card and '"tiny-data"' not in card
    assert json.loads(uploaded["release.json"])["files"]["README.md"] == len(uploaded["README.md"])
    assert content_of(folder) == written and repository.private
    assert repository.tags == {"v1.0": repository.branches["main"]}
    assert f"{repo}: {len(uploaded)} files uploaded" in capsys.readouterr().out
    # Hidden files are never uploaded, even if the check that finds them is left out.
    for path in (".DS_Store", ".cache/huggingface/token"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("private")
    assert main([*words, *(["--no-verify"] if kind == "model" else [])]) == 0
    assert len(repository.commits) == 2
    assert "nothing to change" in capsys.readouterr().out


def test_message_branch_and_datasets_are_as_given(packed, hub_server):
    words = ["push", str(packed), "--repo", REPO, "--revision", "draft", "--message", "First draft"]
    assert main([*words, "--data", "org/first", "--data", "org/second"]) == 0
    repository = hub_server.repository(REPO)
    assert repository.find("draft").title == "First draft"
    assert "model.safetensors" in repository.files("draft") and repository.files() == {}
    assert "datasets:\n- org/first\n- org/second\n" in repository.files("draft")["README.md"].decode()


@pytest.mark.parametrize(
    ("command", "words", "part"),
    [
        ("push", ["--repo", "tiny"], "'tiny': it is not ORG/NAME"),
        ("push", ["--tag", "version one"], "--tag 'version one'"),
        ("push", ["--data", "none"], "--data 'none'"),
        ("push", ["--revision", "x.partial"], "unfinished"),
        ("push", ["release.json", None], "pack it"),
        ("push", ["model.safetensors", None], "model.safetensors is not as release.json says; pack the run"),
        ("push-data", ["release.json", "no json"], "not a record of a dataset release"),
        ("push-data", ["notes.txt", "mine"], "notes.txt is not as release.json says"),
    ],
)
def test_a_bad_name_or_folder_is_refused_before_anything_is_sent(
    packed, released, hub_server, capsys, command, words, part
):
    folder, more = packed if command == "push" else released, words
    if not words[0].startswith("--"):
        (folder / words[0]).unlink(missing_ok=True)
        if words[1] is not None:
            (folder / words[0]).write_text(words[1])
        more = []
    assert main([command, str(folder), "--repo", REPO, *more]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and part in shown
    assert hub_server.log == []


def test_a_folder_with_a_fault_is_uploaded_only_when_asked(packed, hub_server, capsys):
    spoil(packed)
    assert main(["push", str(packed), "--repo", REPO]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1 and "1_Pooling/config.json" in shown and "--no-verify" in shown
    assert hub_server.log == []
    assert main(["push", str(packed), "--repo", REPO, "--no-verify"]) == 0
    assert "1_Pooling/config.json" in hub_server.repository(REPO).files()


OTHER_START = [asdict(StageRecord("single", "training", Reference("hub", "their/model")))]
OTHER_STAGES = [asdict(StageRecord("stage2", "training", Reference("scratch")))]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *(({"name": "other"}, []), ({"shape": {"hidden_size": 64}}, []), ({"stages": OTHER_START}, [])),
        ({"stages": OTHER_STAGES}, ["--revision", "draft"]),
    ],
)
def test_another_model_is_replaced_only_when_asked(packed, hub_server, capsys, fields, words):
    repository = hold_model(hub_server, packed, **fields)
    before = dict(repository.branches)
    assert main(["push", str(packed), "--repo", REPO, *words]) == 2
    shown = capsys.readouterr().err
    assert "holds another model (" in shown and "--replace" in shown and repository.branches == before
    assert main(["push", str(packed), "--repo", REPO, "--replace"]) == 0
    assert repository.find("main").parent == before["main"]
    assert json.loads(repository.files()["release.json"])["name"] == NAME


def test_a_version_trained_again_replaces_the_old_one_but_not_its_tag(packed, hub_server, capsys):
    repository = hold_model(hub_server, packed, parameters=1)
    first = repository.tags["v1.0"] = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 2
    assert "tag v1.0" in capsys.readouterr().err and repository.branches == {"main": first}
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.1"]) == 0
    assert b'"parameters": 1,' in repository.files("v1.0")["release.json"]
    assert b'"parameters": 1,' not in repository.files("v1.1")["release.json"]
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0", "--replace"]) == 0
    assert repository.tags["v1.0"] == repository.branches["main"] != first


@pytest.mark.parametrize("held", [{"config.json": b"{}"}, {"release.json": b"no json"}, {"release.json": b"[]"}])
def test_files_without_a_record_are_replaced_only_when_asked(packed, hub_server, capsys, held):
    # What the Hub's site makes counts as nothing.
    hold(hub_server, {"README.md": b"---\nlicense: mit\n---\n"}, "org/empty")
    assert main(["push", str(packed), "--repo", "org/empty"]) == 0
    repository = hold(hub_server, held)
    assert main(["push", str(packed), "--repo", REPO]) == 2
    assert "release.json" in capsys.readouterr().err
    assert repository.files() == held
    assert main(["push", str(packed), "--repo", REPO, "--replace"]) == 0
    assert "model.safetensors" in repository.files()


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


@pytest.mark.parametrize("login", ["environment", "file"])
def test_the_token_is_given_to_nobody_but_the_hub(packed, hub_server, tmp_path, capsys, caplog, login):
    caplog.set_level(logging.DEBUG)
    home = tmp_path / "home"
    home.mkdir()
    if login == "file":
        (home / "token").write_text(TOKEN)
    hub_server.faults.add("PUT", "storage", cut_after=10)
    hub_server.faults.add("POST", "/commit/", lose_answer=True)
    with connected(hub_server, home, TOKEN if login == "environment" else None):
        assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
        assert main(["push", str(packed), "--repo", "stranger/tiny"]) == 2
        hub_server.store.accounts.clear()
        assert main(["push", str(packed), "--repo", REPO]) == 2
    shown = capsys.readouterr()
    assert "hf auth login" in shown.err and TOKEN not in shown.out + shown.err + caplog.text
    # Addresses of the storage are signed.
    assert "HTTP Request" not in caplog.text
    (home / "token").unlink(missing_ok=True)
    assert not [path for path, content in content_of(tmp_path).items() if TOKEN.encode() in content]
    # The storage of large files is another service.
    assert {each.token for each in hub_server.log if "storage" not in each.path} == {TOKEN}
    assert {each.token for each in hub_server.requests("PUT", "storage")} == {None}


def test_hf_upload_takes_the_folder_unchanged(hub_server, packed, run_python):
    run_python(Path(sys.executable).with_name("hf"), "upload", REPO, packed)
    repository = hub_server.repository(REPO)
    assert repository.files() == content_of(packed)
    # What hf uploaded is known as the same model, and only its card is another.
    first = repository.branches["main"]
    assert main(["push", str(packed), "--repo", REPO]) == 0
    assert repository.find("main").parent == first


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_a_downloaded_release_is_verified_and_pushed_again(packed, hub_server, tmp_path, where):
    repo, copy = f"org/{NAME}", f"ada/{NAME}"
    assert main(["push", str(packed), "--repo", repo]) == 0
    folder = Path(snapshot_download(repo, local_dir=tmp_path / "copy" / NAME if where == "folder" else None))
    assert (folder / ".cache/huggingface").is_dir() == (where == "folder")
    assert (folder / "model.safetensors").is_symlink() == (where == "cache")
    assert examine(folder, QUICK).faults == ()
    assert main(["push", str(folder), "--repo", copy]) == 0
    before, after = (hub_server.repository(name).files() for name in (repo, copy))
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} == {"README.md", "release.json"}


def test_model_and_data_load_back_the_same(packed, released, load_back, tmp_path):
    newer = write_packed(tmp_path / "second", seed=7)
    assert (packed / "model.safetensors").read_bytes() != (newer / "model.safetensors").read_bytes()
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert main(["push", str(newer), "--repo", REPO]) == 0
    assert main(["push-data", str(released), "--repo", DATA, "--private"]) == 0

    loaded = load_back(REPO, "v1.0", DATA, "tiny_retrieval")
    local = SentenceTransformer(str(packed), device="cpu")
    np.testing.assert_array_equal(loaded["sentences"], local.encode(TEXTS))
    with torch.no_grad():
        tokens = local.tokenizer(TEXTS[0], return_tensors="pt")
        np.testing.assert_array_equal(
            loaded["transformers"], F2LLMModel.from_pretrained(packed)(**tokens).last_hidden_state.numpy()
        )
    assert "transformers_modules" in str(loaded["code"])
    rows = json.loads(str(loaded["rows"]))
    assert len(rows) == 80
    assert {row["passage"] for row in rows if row["query"] == "the red river"} == {"river, red"}


@pytest.mark.usefixtures("no_figures")
def test_an_adapter_is_pushed_after_its_base_and_loads_back_the_same(
    hub_server, trained_adapter, adapter_release, adapter_base, run_python, tmp_path, capsys
):
    packed = Path(shutil.copytree(adapter_release, tmp_path / "tiny"))
    assert main(["push", str(packed), "--repo", REPO]) == 2
    shown = capsys.readouterr().err
    assert f"base is not at {hub_server.address}/{BASE}" in shown and "--no-verify" in shown
    assert not [kind for kind, name in hub_server.store.repositories if name == REPO]

    hold(hub_server, content_of(adapter_base), BASE)
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    repository = hub_server.repository(REPO)
    assert content_of(packed).keys() == repository.files().keys()
    assert main(["push", str(packed), "--repo", REPO, "--tag", "v1.0"]) == 0
    assert len(repository.commits) == 2 and "nothing to change" in capsys.readouterr().out

    run_python("-c", LOAD, tmp_path / "loaded.npz")
    loaded = np.load(tmp_path / "loaded.npz")
    local = SentenceTransformer(str(trained_adapter / "model"), device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(loaded["plain"], local)
    np.testing.assert_array_equal(loaded["tagged"], local)
    assert abs(local - SentenceTransformer(str(adapter_base), device="cpu").encode(TEXTS)).max() > 1e-3
    np.testing.assert_allclose(loaded["code"], local, atol=1e-5)
    np.testing.assert_allclose(loaded["peft"], local[0], atol=1e-6)
    assert "transformers_modules" in str(loaded["kind"])

    # An adapter of another base is another model.
    packed = pack(trained_adapter, tmp_path / "other", PackOptions("tiny", licence="apache-2.0", base="org/other"))
    hub_server.store.create("model", "org/other")
    assert main(["push", str(packed), "--repo", REPO]) == 2
    assert "holds another model (tiny" in capsys.readouterr().err
