"""Names are resolved to what a model is now, and its files say how it is read; missing and damaged ones are refused."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.training.models.starts import QWEN3_PROMPTS, save_like_qwen3_embedding
from training.models import model_ref
from training.models.encoders import find_miner
from training.models.model_ref import find_adapter, model_revision, prompts_of, resolve, why_not_last_token


def write_model(folder, files=None):
    for name, content in {"modules.json": "[]", "1_Pooling/config.json": "{}", **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that has the ``config.json`` of one model; the files that were asked for."""
    asked: list[str] = []

    def download(name, file, revision=None):
        asked.append(file)
        if (name, file) != ("org/model", "config.json"):
            raise OSError(f"404\nno {file}")
        return str(tmp_path / "snapshots" / ("89abcdef" if revision == "step-1" else "0123abcd") / file)

    monkeypatch.setattr(model_ref, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize("after", [{"1_Pooling/config.json": "[]"}, {"new.txt": ""}, {"a": "x", "b": "y"}])
def test_any_change_to_a_folder_is_seen_but_not_a_move_or_a_hidden_file(tmp_path, after):
    before = {"a": "xy", "b": ""}
    one, two = write_model(tmp_path / "one", before), write_model(tmp_path / "two", {**before, **after})
    assert model_revision(str(one), "--model") != model_revision(str(two), "--model")
    moved = write_model(tmp_path / "elsewhere/three", {**before, ".git/HEAD": "x", ".c/y/z": "z"})
    assert model_revision(str(one), "--model") == model_revision(f"{moved}/", "--model")


def test_a_model_on_the_hub_is_its_commit(hub, tmp_path):
    assert model_revision("org/model", "--model") == "0123abcd"
    assert hub == ["modules.json", "adapter_config.json", "config.json"]
    assert model_revision("org/model", "--model", "step-1") == "89abcdef"
    assert find_miner("org/model").revision == "0123abcd"
    assert find_miner(str(write_model(tmp_path))).revision == model_revision(str(tmp_path), "--model")


def test_a_run_stands_for_its_model_and_a_missing_one_or_an_adapter_without_a_base_is_refused(hub, tmp_path, refuses):
    with refuses("'org/none'", "neither a folder nor", "404 no config.json", "correct key 'teacher'"):
        resolve("org/none", "key 'teacher'")
    with refuses(tmp_path, "holds no model", "as --model"):
        resolve(str(tmp_path), "--model")
    whole = write_model(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "run/model")
    found = resolve(str(tmp_path / "run"), "--model")
    assert found.place == str(tmp_path / "run/model") and found.identity == resolve(str(whole), "--model").identity
    assert find_miner(str(tmp_path / "run")).made_by() == find_miner(str(whole)).made_by()
    path = tmp_path / "adapter_config.json"
    for content, part in ((json.dumps({"base_model_name_or_path": None}), "write its name"), ("{", "save the adapter")):
        path.write_text(content)
        with refuses(path, part):
            find_adapter(str(tmp_path))
    assert find_adapter("no/such-model") is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [({}, None), ({"pooling": "mean"}, "is pooled by mean"), ({"dense": True}, "has the module Dense after pooling")],
)
def test_what_the_files_say(tmp_path, tiny_config, tiny_tokenizer, changes, told):
    model = str(save_like_qwen3_embedding(tmp_path, tiny_config, tiny_tokenizer, **changes))
    assert why_not_last_token(model) == told
    assert prompts_of(model) == QWEN3_PROMPTS and prompts_of(str(tmp_path)) is None
