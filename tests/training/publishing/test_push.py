"""Uploading a packed model: what goes there, what is refused, and that no fault leaves half of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.hub_server.server import READ_TOKEN, TOKEN, HubServer
from tests.training.publishing.packed import NAME, write_packed
from training.publish import main

Refuses = Callable[..., AbstractContextManager[None]]

REPO = "org/tiny"


@pytest.fixture(scope="session")
def packed_once(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: F2LLMConfig, tiny_tokenizer: PreTrainedTokenizerBase
) -> Path:
    torch.manual_seed(0)
    model = F2LLMModel(deepcopy(tiny_config)).eval()
    return write_packed(tmp_path_factory.mktemp("packed") / NAME, model, tiny_tokenizer)


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
