"""The examination as a whole: damage is a finding, one fault hides no other, and the command says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.publishing.broken import BrokenRelease
from training.common.errors import UserError
from training.publish import main
from training.publishing import verify_command
from training.publishing.checks.contents import NEEDED
from training.publishing.verify import CHECKS, Examination, verify


def test_faults_in_several_files_are_all_found(broken: BrokenRelease) -> None:
    broken.edit("config.json", max_window_layers=28)
    broken.edit("config_sentence_transformers.json", similarity_fn_name="dot")
    broken.write("optimizer.pt", b"x")
    broken.expect(
        ("config.json", "max_window_layers"),
        ("config_sentence_transformers.json", "similarity_fn_name"),
        ("optimizer.pt", "training state"),
        ("optimizer.pt", "no safetensors"),
    )


@pytest.mark.parametrize("name", sorted({*NEEDED, "model.safetensors", "packing.py", "2_Normalize/config.json"}))
@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"[]", b'{"a": {"b": [1, null]}}', b"[" * 20_000])
def test_a_damaged_file_is_a_finding(broken: BrokenRelease, name: str, content: bytes | None) -> None:
    if content is None:
        (broken.folder / name).unlink()
    else:
        broken.write(name, content, listed=False)
    faults = broken.faults()
    assert any(fault.startswith(f"{name}: ") for fault in faults), faults
    assert all(len(fault.splitlines()) == 1 for fault in faults)


def test_what_could_not_be_checked_is_named_once(broken: BrokenRelease) -> None:
    broken.write("config.json", "{")
    broken.edit("config_sentence_transformers.json", similarity_fn_name="dot")
    broken.expect(
        (
            "config.json",
            "is not JSON",
            "not checked for it, or not in full: configuration, tokenizer, modules, weights",
        ),
        ("config_sentence_transformers.json", "similarity_fn_name"),
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    assert {fault.partition(":")[0] for fault in verify(tmp_path)} >= set(NEEDED)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nowhere")
    assert main(["verify", str(tmp_path / "nowhere")]) == 2


def test_the_command_lists_faults(broken: BrokenRelease, capsys: pytest.CaptureFixture[str]) -> None:
    (broken.folder / "README.md").unlink()
    broken.write("optimizer.pt", b"x")
    assert main(["verify", str(broken.folder)]) == 1
    printed = capsys.readouterr().out
    assert "optimizer.pt: is training state; delete it\n" in printed and "README.md: is missing" in printed
    assert "no fault" not in printed


def test_the_command_says_what_was_checked(
    release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_command, "examine", lambda folder, base, trust: Examination((), (), tuple(CHECKS)))
    assert main(["verify", str(release)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in CHECKS) and "not run" in printed
