"""Files that are missing, changed, or do not belong into a release."""

from __future__ import annotations

import pytest

from tests.training.publishing.broken import BrokenRelease


@pytest.mark.parametrize(
    "name", [".DS_Store", "runs/events.out.tfevents.1", "trainer_state.json", ".cache/x", "__pycache__/a.pyc"]
)
def test_files_that_do_not_belong(broken: BrokenRelease, name: str) -> None:
    broken.write(name, "x")
    broken.expect((name, "delete it"))


def test_a_file_that_nobody_listed(broken: BrokenRelease) -> None:
    broken.write("notes.txt", "x", listed=False)
    broken.expect(("notes.txt", "is not in release.json"))


def test_a_file_of_another_size(broken: BrokenRelease) -> None:
    broken.write("LICENSE", "Apache", listed=False)
    broken.expect(("LICENSE", "has 6 bytes, but release.json says"))


def test_a_file_that_is_listed_but_missing(broken: BrokenRelease) -> None:
    (broken.folder / "2_Normalize/config.json").unlink()
    broken.expect(("2_Normalize/config.json", "is missing, but release.json lists it"))


def test_a_link(broken: BrokenRelease) -> None:
    (broken.folder / "layers.py").rename(broken.folder.parent / "layers.py")
    (broken.folder / "layers.py").symlink_to(broken.folder.parent / "layers.py")
    assert any(fault.startswith("layers.py: is a link") for fault in broken.faults())


def test_the_git_attributes_of_a_repository(broken: BrokenRelease) -> None:
    broken.write(".gitattributes", "*.safetensors filter=lfs\n", listed=False)
    broken.expect()
