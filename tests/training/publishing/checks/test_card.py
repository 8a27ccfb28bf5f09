"""Faults of the card; its own code, run on the folder."""

from __future__ import annotations

import numpy as np
import pytest

from training.publishing.checks import card
from training.publishing.checks.files import PackedFolder
from training.publishing.pack import PackOptions, pack
from training.publishing.verify import examine

CARD = "README.md"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("library_name: sentence-transformers", "library_name: f2llm", "library_name of the header is 'f2llm'"),
        ("license: apache-2.0", "license: mit", "license of the header is 'mit'"),
        ("\n- sentence-transformers\n", "\n", "tags of the header is ["),
        ("library_name: ", "broken: [\nlibrary_name: ", "has a header that the Hub cannot read"),
    ],
)
def test_a_fault(broken, old, new, said):
    broken.replace(CARD, old, new)
    assert any(fault.startswith(f"{CARD}: ") and said in fault for fault in broken.faults()), broken.faults()


def _faults(folder):
    return [str(finding) for finding in card.check_embeddings(PackedFolder(folder)) if finding.fault]


def test_a_release_has_no_fault(release):
    examination = examine(release)
    assert examination.faults == () and "embeddings" in examination.checked


def test_examples_that_need_this_repository_or_a_network(broken):
    text = (broken.folder / CARD).read_text()
    first, second, third = text.split("from sentence_transformers import SentenceTransformer\n")
    broken.write(
        CARD,
        f"{first}from sentence_transformers import SentenceTransformer\nimport modeling_f2llm\n{second}"
        f"from sentence_transformers import SentenceTransformer\nimport urllib.request\n"
        f"urllib.request.urlopen('http://127.0.0.1:9')\n{third}",
    )
    first, second = _faults(broken.folder)
    assert "the example sentence-transformers fails" in first and "modeling_f2llm" in first
    assert "the example remote-code fails" in second and "no network" in second


def test_an_example_that_pools_otherwise(broken):
    broken.replace(CARD, ".argmax(dim=1)", ".argmax(dim=1) - 1")
    faults = _faults(broken.folder)
    assert any("the example remote-code differs from transformers on queries" in fault for fault in faults), faults


def test_embeddings_are_compared_with_those_of_transformers():
    whole = np.eye(3, 4, dtype=np.float32) * 0.8 + np.float32([0, 0, 0, 0.6])
    same = {"transformers/documents": whole, "transformers/queries": whole, "remote-code/queries": whole}
    assert list(card._differences(same, (4, 2))) == []
    cut = whole[:, :2] / np.linalg.norm(whole[:, :2], axis=1, keepdims=True).clip(1)
    others = {
        "remote-code/one by one": whole[::-1],
        "remote-code/padded on the left": 2 * whole,
        "remote-code/documents@2": whole,
        "sentence-transformers/documents@2": cut,
    }
    parts = ("differs from transformers on one by one (cosine 0.36", "not of unit length", "not (3, 2)", "unit length")
    for fault, part in zip(card._differences(same | others, (4, 2)), parts, strict=True):
        assert part in str(fault)


def test_what_bfloat16_would_hide_is_found_in_float32(instructed, tmp_path, monkeypatch):
    folder, run = pack(instructed, tmp_path / "tiny", PackOptions("tiny", dtype="bfloat16")), card._run

    def nudged(task):
        report = run(task)
        for name, rows in report["embeddings"].items():
            if name.startswith("remote-code/"):
                off = rows + 0.02 * np.roll(rows, 1, axis=1)
                report["embeddings"][name] = off / np.linalg.norm(off, axis=1, keepdims=True)
        return report

    assert _faults(folder) == []
    monkeypatch.setattr(card, "_run", nudged)
    faults = _faults(folder)
    assert faults and all("the example remote-code differs from transformers" in fault for fault in faults)
