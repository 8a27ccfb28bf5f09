"""Files that are missing, changed, or do not belong into a release."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save

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


def test_other_weights_and_another_base_of_the_same_size(broken: BrokenRelease) -> None:
    weights = load_file(broken.folder / "model.safetensors")
    for layer in (0, 1):
        gate, up = (f"layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]
    swapped = save({name: weights[name].contiguous() for name in sorted(weights)}, metadata={"format": "pt"})
    broken.write("model.safetensors", swapped, listed=False)
    theta = (broken.folder / "config.json").read_text().replace("10000.0", "50000.0")
    broken.write("config.json", theta, listed=False)
    assert len(swapped) == broken.read("release.json")["files"]["model.safetensors"]
    broken.expect(
        ("config.json", "is not the file whose hash release.json has"),
        ("model.safetensors", "is not the file whose hash release.json has"),
    )


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
