"""The card's own code, run on the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training.publishing.broken import BrokenRelease
from training.publishing.checks import embeddings
from training.publishing.checks.packed import PackedFolder
from training.publishing.pack import PackOptions, pack
from training.publishing.verify import verify

CARD = "README.md"


def _faults(broken: BrokenRelease) -> list[str]:
    found = embeddings.check_embeddings(PackedFolder(broken.folder))
    return [str(finding) for finding in found if finding.fault]


def test_a_release_has_no_fault(release: Path) -> None:
    assert verify(release) == []


def test_examples_that_need_this_repository_or_a_network(broken: BrokenRelease) -> None:
    text = (broken.folder / CARD).read_text()
    first, second, third = text.split("from sentence_transformers import SentenceTransformer\n")
    broken.write(
        CARD,
        f"{first}from sentence_transformers import SentenceTransformer\nimport modeling_f2llm\n{second}"
        f"from sentence_transformers import SentenceTransformer\nimport urllib.request\n"
        f"urllib.request.urlopen('http://127.0.0.1:9')\n{third}",
    )
    faults = _faults(broken)
    assert any("the example sentence-transformers fails" in fault and "modeling_f2llm" in fault for fault in faults)
    assert any("the example remote-code fails" in fault and "no network" in fault for fault in faults)
    assert len(faults) == 2, faults


def test_an_example_that_pools_otherwise(broken: BrokenRelease) -> None:
    broken.replace(CARD, ".argmax(dim=1)", ".argmax(dim=1) - 1")
    faults = _faults(broken)
    assert any("the example remote-code differs from transformers on queries" in fault for fault in faults), faults


def test_embeddings_are_compared_with_those_of_transformers() -> None:
    whole = np.eye(3, 4, dtype=np.float32) * 0.8 + np.float32([0, 0, 0, 0.6])
    same = {"transformers/documents": whole, "transformers/queries": whole, "remote-code/queries": whole}
    assert list(embeddings._differences(same, (4, 2), 0.9999)) == []
    cut = whole[:, :2] / np.linalg.norm(whole[:, :2], axis=1, keepdims=True).clip(1)
    others = {
        "remote-code/one by one": whole[::-1],
        "remote-code/padded on the left": 2 * whole,
        "remote-code/documents@2": whole,
        "sentence-transformers/documents@2": cut,
    }
    faults = [str(fault) for fault in embeddings._differences(same | others, (4, 2), 0.9999)]
    assert len(faults) == 4
    assert "differs from transformers on one by one (cosine 0.36" in faults[0]
    assert "not of unit length" in faults[1] and "not (3, 2)" in faults[2] and "unit length" in faults[3]


def test_what_bfloat16_would_hide_is_found_in_float32(
    instructed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pack(instructed, tmp_path / "tiny", PackOptions("tiny", dtype="bfloat16"))
    compared = []
    run = embeddings._run

    def nudged(task: dict) -> tuple:
        """The remote code is off by as much as bfloat16 allows."""
        report, found = run(task)
        compared.append(json.loads((Path(task["folder"]) / "config.json").read_text())["dtype"])
        for name in found:
            if name.startswith("remote-code/"):
                off = found[name] + 0.02 * np.roll(found[name], 1, axis=1)
                found[name] = off / np.linalg.norm(off, axis=1, keepdims=True)
        return report, found

    monkeypatch.setattr(embeddings, "_run", nudged)
    faults = [str(finding) for finding in embeddings.check_embeddings(PackedFolder(folder))]
    assert compared == ["bfloat16", "float32"]
    assert faults and all("the example remote-code differs from transformers" in fault for fault in faults)
    assert all("< 0.9999)" in fault for fault in faults)
