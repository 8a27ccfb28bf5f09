"""How the commands end: a status and one line, whatever happened; what to do is said in the command's own words."""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.common.command import run_command
from training.common.errors import InterruptedTrainingError, OutputError, StoppedError, UserError
from training.common.executor import SubmittedError

ROOT = Path(__file__).resolve().parents[3]


def ending_in(error):
    def work():
        raise error

    return run_command(work)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.parquet: row 3 is bad"), 2, "error: a.parquet: row 3 is bad"),
        (OSError(28, "No space left on device"), 1, "stopped: [Errno 28] No space left on device. To go on, run"),
        (StoppedError("task 3: it failed", "Use --resume"), 1, "stopped: task 3: it failed. To go on, run the same"),
        (SubmittedError("submitted to Slurm"), 1, "stopped: submitted to Slurm. To go on, run"),
        (KeyboardInterrupt(), 130, "stopped: interrupted. To go on, run"),
        (MemoryError(), 1, "stopped: out of memory (MemoryError); free some, or give the command less at once. To go"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "stopped: out of memory (CUDA out of memory); free some"),
    ],
)
def test_each_way_to_end(capsys, error, status, line):
    assert ending_in(error) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and len(said.splitlines()) == 1


def test_a_fault_of_the_program_is_one_line_and_a_file_without_secrets(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    secrets = {"HF_TOKEN": "secret-of-mine", "MY_PASSWORD": "pass word", "AWS_SECRET_ACCESS_KEY": "abc/def+123"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "3")
    token = "hf_" + "a1B2" * 8
    addresses = ["http://me:pass-of-mine@proxy:80/", "https://store/a?X-Amz-Signature=5ec4e7&b=1"]
    assert ending_in(KeyError(f"headers\n{[*secrets.values(), token, *addresses]}")) == 1
    (file,) = tmp_path.iterdir()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[process 3] error: unexpected KeyError: ") and "; please report it" in line
    assert line.endswith(str(file)) and file.stat().st_mode & 0o777 == 0o600
    written = file.read_text()
    assert written.startswith("Traceback (most recent call last)") and "raise error" in written
    for text in (written, line):
        assert "<HF_TOKEN>" in text and "<token>" in text
        assert not any(secret in text for secret in (*secrets.values(), token, "pass-of-mine", "5ec4e7"))
        assert "@proxy:80/" in text and "&b=1" in text


def test_what_is_not_an_error_says_nothing(capsys):
    assert (run_command(lambda: None), run_command(lambda: 3), run_command(lambda: ROOT)) == (0, 3, 0)
    with pytest.raises(SystemExit):
        ending_in(SystemExit(5))
    assert capsys.readouterr().err == ""


def commands():
    found = [path for room in ("training", "hub_cards") for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if re.search(r"(SystemExit|sys\.exit)\(main\(", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_every_command_ends_here(path):
    text = path.read_text(encoding="utf-8")
    assert "run_command(" in text[text.index("\ndef main(") :].split("\ndef ")[1]


@pytest.mark.slow
@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_a_missing_optional_package_is_one_line(path):
    optional = ["mteb", "faiss", "gguf", "peft", "matplotlib", "ray", "tensorboard"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({optional})); sys.argv = [{str(path)!r}, '--help']; "
        f"sys.path.insert(0, {str(path.parent)!r}); runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    if ended.returncode:
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 2 and line.startswith("error: this command needs") and "pip install" in line


@pytest.mark.parametrize("error", [UserError("a", "b"), InterruptedTrainingError("a", "b", signal.SIGTERM)])
def test_errors_come_out_of_other_processes_as_they_are(error):
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_another_command_puts_its_own_remedy_in_the_place():
    error = OutputError("there: holds another run", "add --resume")
    assert str(error) == "there: holds another run; add --resume" and error.what == "there: holds another run"
    other = error.advising("give another --output")
    assert str(other) == "there: holds another run; give another --output" and type(other) is OutputError
    # A remedy that is the same everywhere stays.
    assert str(UserError("no such file; check the path").advising("x")) == "no such file; check the path"


def test_a_report_names_no_secret(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PGPASSWORD", "swordfish")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ending_in(TypeError("swordfish at https://user:pw@host and hf_oauth_abcdefgh")) == 1
    written = capsys.readouterr().err + next(tmp_path.glob("f2llm-traceback-*")).read_text(encoding="utf-8")
    assert not any(secret in written for secret in ("swordfish", "user:pw", "hf_oauth_abcdefgh"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert ending_in(TypeError("x")) == 1 and "not saved" in capsys.readouterr().err
