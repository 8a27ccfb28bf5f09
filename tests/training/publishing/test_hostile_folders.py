"""Folders that mean harm: nothing of them runs unasked, and what runs has neither login nor network."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from tests.training.publishing.broken import BrokenRelease
from training.publish import main

TOKEN = "hf_" + "secretOfThisMachine"
# Writes down what it can do: here, and in a program that it starts, which no hook of Python's holds back.
_CODE = """
import os, subprocess
_call = "import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
_called = subprocess.run([{python!r}, "-c", _call], stderr=subprocess.PIPE, text=True)
open({marker!r}, "w").write(repr((dict(os.environ), _called.returncode, _called.stderr)))
"""


@pytest.fixture
def listener() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def code(listener: socket.socket, marker: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return _CODE.format(port=listener.getsockname()[1], python=sys.executable, marker=str(marker))


def add_code(broken: BrokenRelease, code: str, listed: bool = True) -> None:
    """Adds code to the folder's; ``listed``, the record has its hash."""
    broken.write("packing.py", (broken.folder / "packing.py").read_text() + code, listed)


def add_to_card(broken: BrokenRelease, code: str) -> None:
    """Adds code to an example that is run."""
    broken.replace("README.md", "\nimport torch\n", f"\nimport torch\n{code}")


def test_code_that_was_altered_is_not_run(
    broken: BrokenRelease, code: str, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_code(broken, code, listed=False)
    for words in ([], ["--trust-remote-code"]):
        assert main(["verify", str(broken.folder), *words]) == 1
        told = capsys.readouterr().out
        assert "packing.py: has " in told and "README.md: its examples were not run: the folder has faults" in told
    assert not marker.exists()


def test_nothing_is_run_beside_a_pickle(broken: BrokenRelease, code: str, marker: Path) -> None:
    add_to_card(broken, code)
    broken.write("pytorch_model.bin", b"\x80\x04.")
    assert main(["verify", str(broken.folder), "--trust-remote-code"]) == 1
    assert not marker.exists()


@pytest.mark.parametrize(("add", "named"), [(add_code, "packing.py"), (add_to_card, "the example transformers")])
def test_code_that_is_not_this_checkouts_is_not_run_unasked(
    broken: BrokenRelease, code: str, marker: Path, capsys: pytest.CaptureFixture[str], add, named: str
) -> None:
    add(broken, code)
    assert main(["verify", str(broken.folder)]) == 0
    told = capsys.readouterr().out
    assert f"README.md: its examples were not run: {named} is not this checkout's" in told
    assert "--trust-remote-code" in told and not told.rstrip().endswith("embeddings")
    assert not marker.exists()


def test_code_of_a_base_is_not_run_unasked(
    broken_adapter: BrokenRelease,
    adapter_base: Path,
    tmp_path: Path,
    code: str,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(adapter_base, tmp_path / "base"))
    (base / "packing.py").write_text((base / "packing.py").read_text() + code)
    main(["verify", str(broken_adapter.folder), "--base", str(base)])
    assert "its examples were not run: packing.py is not this checkout's" in capsys.readouterr().out
    assert not marker.exists()


def test_a_module_of_the_folder_is_not_run(broken: BrokenRelease, code: str, marker: Path) -> None:
    # sentence-transformers runs such a class of a local folder without being told to.
    broken.edit("modules.json", lambda modules: modules.__getitem__(0).update(type="packing.Own"))
    add_code(broken, code)
    assert main(["verify", str(broken.folder)]) == 1
    assert not marker.exists()


def test_code_that_a_tokenizer_names_is_not_run(broken: BrokenRelease, code: str, marker: Path) -> None:
    add_code(broken, code)
    broken.edit("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "packing.Own"]})
    main(["verify", str(broken.folder)])
    assert not marker.exists()


def test_what_is_run_has_neither_login_nor_network(
    broken: BrokenRelease, code: str, marker: Path, listener: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    add_code(broken, code)
    assert main(["verify", str(broken.folder), "--trust-remote-code"]) == 0
    told = capsys.readouterr().out
    environment, status, error = eval(marker.read_text())
    assert TOKEN not in json.dumps(environment) and Path(environment["HOME"]) != Path.home()
    assert environment.keys() <= {
        *("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "HOME", "TOKENIZERS_PARALLELISM"),
        # Of Python and the libraries themselves.
        *("LC_CTYPE", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "TORCHINDUCTOR_CACHE_DIR"),
    }
    if "without a network namespace" in told:
        pytest.skip("this system allows no network namespace, and verify says so")
    assert status and "unreachable" in error
    with pytest.raises(BlockingIOError):
        listener.accept()
