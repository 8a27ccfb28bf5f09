"""The examination as a whole: damage is a finding, one fault hides no other, and nothing harmful runs."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from training.publish import main
from training.publishing.verify import examine

DAMAGED = ("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json")
TOKEN = "hf_" + "secretOfThisMachine"
# Writes down what it can do: here, and in a program that it starts, which no hook of Python's holds back.
_CODE = """
import os, subprocess
_call = "import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
_called = subprocess.run([{python!r}, "-c", _call], stderr=subprocess.PIPE, text=True)
open({marker!r}, "w").write(repr((dict(os.environ), _called.returncode, _called.stderr)))
"""


def test_faults_in_several_files_are_all_listed(broken, capsys):
    broken.write("config.json", "{")
    broken.edit("config_sentence_transformers.json", similarity_fn_name="dot")
    broken.write("optimizer.pt", b"x")
    (broken.folder / "README.md").unlink()
    assert main(["verify", str(broken.folder)]) == 1
    printed = capsys.readouterr().out
    said = ["config.json: cannot be read", "config_sentence_transformers.json: similarity_fn_name is 'dot'"]
    said += ["optimizer.pt: is not safetensors", "README.md: was changed, added or deleted"]
    assert [printed.count(each) for each in said] == [1] * 4 and "no fault" not in printed, printed


@pytest.mark.parametrize(
    "name", [*DAMAGED, "README.md", "release.json", "model.safetensors", "packing.py", "2_Normalize/config.json"]
)
@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b'{"a": {"b": [1, null]}}'])
def test_a_damaged_file_is_a_finding(broken, name, content):
    if content is None:
        (broken.folder / name).unlink()
    else:
        broken.write(name, content, listed=False)
    faults = broken.faults()
    assert any(fault.startswith(f"{name}: ") for fault in faults), faults
    assert all(len(fault.splitlines()) == 1 for fault in faults)


def test_no_folder_and_an_empty_one(tmp_path, refuses):
    assert "release.json" in {finding.file for finding in examine(tmp_path).faults}
    with refuses(tmp_path / "nowhere", "no such folder"):
        examine(tmp_path / "nowhere")


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


@pytest.fixture
def marker(tmp_path):
    """What the code writes if it runs."""
    return tmp_path / "ran"


@pytest.fixture
def code(listener, marker, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return _CODE.format(port=listener.getsockname()[1], python=sys.executable, marker=str(marker))


def add_code(broken, code, listed=True):
    broken.write("packing.py", (broken.folder / "packing.py").read_text() + code, listed)


def add_to_card(broken, code):
    broken.replace("README.md", "\nimport torch\n", f"\nimport torch\n{code}")


def test_nothing_is_run_of_a_folder_with_a_fault(broken, code, marker, capsys):
    words = ["verify", str(broken.folder), "--trust-remote-code"]
    add_code(broken, code, listed=False)
    assert main(words) == 1
    printed = capsys.readouterr().out
    assert "packing.py: was changed" in printed and "examples were not run: the folder has faults" in printed
    broken.list_sizes()
    add_to_card(broken, code)
    broken.write("pytorch_model.bin", b"\x80\x04.")
    assert main(words) == 1
    assert not marker.exists()


@pytest.mark.parametrize(("add", "named"), [(add_code, "packing.py"), (add_to_card, "the example transformers")])
def test_code_that_is_not_this_checkouts_is_not_run_unasked(broken, code, marker, capsys, add, named):
    add(broken, code)
    assert main(["verify", str(broken.folder)]) == 0
    printed = capsys.readouterr().out
    assert f"note: README.md: its examples were not run: {named} is not this checkout's" in printed
    assert "no fault; checked: contents, " in printed and not printed.rstrip().endswith("embeddings")
    assert not marker.exists()


def test_code_of_a_base_is_not_run_unasked(broken_adapter, adapter_base, tmp_path, code, marker, capsys):
    base = Path(shutil.copytree(adapter_base, tmp_path / "base"))
    (base / "packing.py").write_text((base / "packing.py").read_text() + code)
    main(["verify", str(broken_adapter.folder), "--base", str(base)])
    assert "its examples were not run: packing.py is not this checkout's" in capsys.readouterr().out
    assert not marker.exists()


def test_code_that_a_module_or_a_tokenizer_names_is_not_run(broken, code, marker):
    add_code(broken, code)
    broken.edit("tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "packing.Own"]})
    main(["verify", str(broken.folder)])
    # sentence-transformers runs such a class of a local folder without being told to.
    broken.edit("modules.json", lambda modules: modules[0].update(type="packing.Own"))
    assert main(["verify", str(broken.folder)]) == 1
    assert not marker.exists()


def test_what_is_run_has_neither_login_nor_network(broken, code, marker, listener, capsys):
    add_code(broken, code)
    assert main(["verify", str(broken.folder), "--trust-remote-code"]) == 0
    printed = capsys.readouterr().out
    environment, status, error = eval(marker.read_text())
    assert TOKEN not in json.dumps(environment) and Path(environment["HOME"]) != Path.home()
    assert environment.keys() <= {
        *("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_HOME", "HOME", "TOKENIZERS_PARALLELISM"),
        # Of Python and the libraries themselves.
        *("LC_CTYPE", "KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "TORCHINDUCTOR_CACHE_DIR"),
    }
    if "without a network namespace" in printed:
        pytest.skip("this system allows no network namespace, and verify says so")
    assert status and "unreachable" in error
    with pytest.raises(BlockingIOError):
        listener.accept()
