"""How the commands end: a status and one line, whatever happened."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.common.command import run_command
from training.common.errors import StoppedError, UserError
from training.common.executor import SubmittedError

ROOT = Path(__file__).resolve().parents[3]


def ending_in(error: BaseException) -> int:
    def work() -> None:
        raise error

    return run_command(work)


def test_work_that_is_done_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.parquet: row 3 is bad"), 2, "error: a.parquet: row 3 is bad"),
        (OSError(28, "No space left on device"), 1, "stopped: [Errno 28] No space left on device. To go on, run"),
        (StoppedError("read, task 3: it failed"), 1, "stopped: read, task 3: it failed. To go on, run"),
        (SubmittedError("submitted to Slurm"), 1, "stopped: submitted to Slurm. To go on, run"),
        (KeyboardInterrupt(), 130, "stopped: interrupted. To go on, run"),
        (MemoryError(), 1, "stopped: out of memory (MemoryError); free some, or give the command less at once. To go"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "stopped: out of memory (CUDA out of memory); free some"),
    ],
)
def test_each_way_to_end(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str) -> None:
    assert ending_in(error) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and len(said.splitlines()) == 1


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_fault_of_the_program_is_one_line_and_a_file(capsys: pytest.CaptureFixture[str], traces: Path) -> None:
    assert ending_in(ZeroDivisionError("division\nby zero")) == 1
    (file,) = traces.iterdir()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unexpected ZeroDivisionError: division by zero; please report it")
    assert line.endswith(str(file)) and file.stat().st_mode & 0o777 == 0o600
    written = file.read_text()
    assert written.startswith("Traceback (most recent call last)") and "raise error" in written
    ending_in(ZeroDivisionError())
    assert len(list(traces.iterdir())) == 2


def test_no_secret_is_in_the_file(
    capsys: pytest.CaptureFixture[str], traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "secret-of-mine", "MY_PASSWORD": "pass word", "AWS_SECRET_ACCESS_KEY": "abc/def+123"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    token = "hf_" + "a1B2" * 8
    addresses = ["http://me:pass-of-mine@proxy:80/", "https://store/a?X-Amz-Signature=5ec4e7&b=1"]
    assert ending_in(KeyError(f"headers {[*secrets.values(), token, *addresses]}")) == 1
    (file,) = traces.iterdir()
    for text in (file.read_text(), capsys.readouterr().err):
        assert "<HF_TOKEN>" in text and "<token>" in text
        assert not any(secret in text for secret in (*secrets.values(), token, "pass-of-mine", "5ec4e7"))
        assert "@proxy:80/" in text and "&b=1" in text


def test_a_full_disk_takes_the_file_but_not_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    assert ending_in(TypeError("x")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "TypeError: x" in line and "not saved" in line and "No space left" in line


def test_every_process_names_itself(
    capsys: pytest.CaptureFixture[str], traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert ending_in(TypeError("x")) == 1 and ending_in(UserError("y")) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("[process 3] error: unexpected TypeError: x") and second == "[process 3] error: y"


def test_links_in_a_circle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    def work() -> None:
        (tmp_path / "a").resolve(strict=True)

    assert run_command(work) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and "unexpected" not in line


def test_the_end_of_the_program_is_not_held_up() -> None:
    with pytest.raises(SystemExit):
        ending_in(SystemExit(5))


def commands() -> list[Path]:
    found = [path for room in ("training", "hub_cards") for path in sorted((ROOT / room).rglob("*.py"))]
    return [path for path in found if re.search(r"(SystemExit|sys\.exit)\(main\(", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_every_command_ends_here(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imported = re.search(r"^ *from ([\w.]+) import main$", text, re.MULTILINE)
    if imported:
        text = (ROOT / f"{imported[1].replace('.', '/')}.py").read_text(encoding="utf-8")
    main = text[text.index("\ndef main(") :].split("\ndef ")[1]
    assert "run_command(" in main


def test_training_ends_here(capsys: pytest.CaptureFixture[str], traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import run_stage

    def fail(_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(run_stage, "_run", fail)
    assert run_stage.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected IndexError" in line and line.endswith(str(next(traces.iterdir())))


@pytest.mark.slow
@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_a_missing_optional_package_is_one_line(path: Path) -> None:
    optional = ["mteb", "faiss", "gguf", "peft", "jinja2", "matplotlib", "ray", "tensorboard"]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({optional})); sys.argv = [{str(path)!r}, '--help']; "
        f"sys.path.insert(0, {str(path.parent)!r}); runpy.run_path({str(path)!r}, run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    if ended.returncode:
        (line,) = ended.stderr.splitlines()
        assert ended.returncode == 2 and line.startswith("error: this command needs") and "pip install" in line
