"""Intermediate results are those of a file's content, whatever its time says."""

from __future__ import annotations

import os
from pathlib import Path

from training.data.cleaning.evaluation_texts import EvaluationFile
from training.data.cleaning.work import stage_folder


def test_another_content_with_the_same_time_is_another_file(tmp_path: Path) -> None:
    path, work = tmp_path / "a.txt", tmp_path / "work"

    def made_of(text: str, time: int) -> tuple[Path, object]:
        path.write_text(text)
        os.utime(path, (time, time))
        return stage_folder(work, "exact", [path], {}), EvaluationFile(path, ("line",)).version()

    first = made_of("panda", 1)
    # A copy of the same bytes costs no second run.
    assert made_of("panda", 2) == first
    other = made_of("tiger", 1)
    assert other[0] != first[0] and other[1] != first[1]
    assert not first[0].exists() and other[0].exists()
