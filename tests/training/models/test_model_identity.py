"""What a model is now: the same wherever its folder lies, another with any change, and refused where there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from training.models import model_identity
from training.models.miner import find_miner
from training.models.model_identity import model_revision

Refuses = Callable[..., AbstractContextManager[None]]


def write_model(folder: Path, files: dict[str, str] | None = None) -> Path:
    for name, content in {"modules.json": "[]", "1_Pooling/config.json": "{}", **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A Hub that has the ``config.json`` of one model; the files that were asked for."""
    asked: list[str] = []

    def download(name: str, file: str, revision: str | None = None) -> str:
        asked.append(file)
        if (name, file) != ("org/model", "config.json"):
            raise OSError(f"404\nno {file}")
        return str(tmp_path / "snapshots" / ("89abcdef" if revision == "step-1" else "0123abcd") / file)

    monkeypatch.setattr(model_identity, "hf_hub_download", download)
    return asked


def test_a_folder_may_move(tmp_path: Path) -> None:
    one, two = (write_model(tmp_path / name) for name in ("one", "elsewhere/two"))
    assert model_revision(str(one), "--model") == model_revision(f"{two}/", "key 'teacher'")


@pytest.mark.parametrize(
    "files", [{"modules.json": "[ ]"}, {"1_Pooling/config.json": "[]"}, {"new.txt": ""}, {"2_Dense/config.json": "{}"}]
)
def test_any_change_to_a_folder_is_seen(tmp_path: Path, files: dict[str, str]) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two", files)
    assert model_revision(str(one), "--model") != model_revision(str(two), "--model")


def test_content_that_moves_between_files_is_seen(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", {"a": "xy", "b": ""})
    two = write_model(tmp_path / "two", {"a": "x", "b": "y"})
    assert model_revision(str(one), "--model") != model_revision(str(two), "--model")


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two", {".git/HEAD": "x", ".cache/y/z": "z"})
    assert model_revision(str(one), "--model") == model_revision(str(two), "--model")


def test_a_model_of_the_hub_is_its_commit(hub: list[str]) -> None:
    assert model_revision("org/model", "--model") == "0123abcd"
    assert hub == ["modules.json", "adapter_config.json", "config.json"]
    assert model_revision("org/model", "--model", "step-1") == "89abcdef"


@pytest.mark.parametrize("key", ["--model", "key 'teacher'"])
def test_no_such_model(hub: list[str], refuses: Refuses, key: str) -> None:
    with refuses("'org/none'", "neither a folder nor", "404 no config.json", f"correct {key}"):
        model_revision("org/none", key)


@pytest.mark.parametrize("key", ["--model", "key 'teacher'"])
def test_a_folder_without_a_model(tmp_path: Path, refuses: Refuses, key: str) -> None:
    with refuses(tmp_path, "holds no model", "modules.json and config.json", f"correct {key}"):
        model_revision(str(tmp_path), key)


def test_miners_are_found_by_it(tmp_path: Path, hub: list[str], refuses: Refuses) -> None:
    folder = write_model(tmp_path / "one")
    assert find_miner(str(folder)).revision == model_revision(str(folder), "--model")
    assert find_miner("org/model").revision == "0123abcd"
    with refuses("'org/none'", "correct --model"):
        find_miner("org/none")
