"""The commands start as scripts, too: their folder comes first in the path then, and must hide no library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import training.evaluation

FOLDER = Path(training.evaluation.__file__).parent


@pytest.mark.parametrize("script", ["report", "run"])
def test_a_command_starts_as_a_script(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, FOLDER / f"{script}.py", "--help"], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert "--output" in ended.stdout


def test_no_file_is_called_like_a_library_of_python() -> None:
    ours = {path.stem for folder in (FOLDER, FOLDER.parent, FOLDER.parent / "data") for path in folder.iterdir()}
    assert not ours & sys.stdlib_module_names - {"__init__"}
