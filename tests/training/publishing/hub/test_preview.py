"""A card to read before an upload is written somewhere in any case."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.publishing.hub.preview import write_card


def test_a_card_is_written_beside_its_folder_if_that_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / "packed"
    assert write_card(folder, "# A") == tmp_path / "packed.card.md"
    assert write_card(folder, "# B").read_text() == "# B"
    # As on a disk that is only read: the folder is in something that is no folder.
    elsewhere = write_card(tmp_path / "packed.card.md/packed", "# C")
    assert elsewhere.name == "packed.card.md" and elsewhere.parent.parent == tmp_path and elsewhere.read_text() == "# C"
