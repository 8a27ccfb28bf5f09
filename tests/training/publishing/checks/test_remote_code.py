"""Faults of the remote code."""

from __future__ import annotations

from tests.training.publishing.broken import BrokenRelease

CONFIG = "config.json"


def test_an_auto_map_without_its_files(broken: BrokenRelease) -> None:
    for path in list(broken.folder.glob("*.py")):
        broken.delete(path.name)
    broken.expect((CONFIG, "names configuration_f2llm.py"), (CONFIG, "names modeling_f2llm.py, which is not there"))


def test_files_without_their_auto_map(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, auto_map=...)
    faults = broken.faults()
    assert faults and all("is code that no auto_map names" in fault for fault in faults)


def test_neither_code_nor_auto_map(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, auto_map=...)
    for path in list(broken.folder.glob("*.py")):
        broken.delete(path.name)
    broken.expect((CONFIG, "has no auto_map"))


def test_an_auto_map_of_other_classes(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, lambda config: config["auto_map"].update(AutoModel="modeling_f2llm.Qwen3Model"))
    broken.expect((CONFIG, "auto_map is", "F2LLMModel"))


def test_a_class_that_is_not_defined(broken: BrokenRelease) -> None:
    broken.edit(CONFIG, lambda config: config["auto_map"].update(AutoModel="packing.F2LLMModel"))
    faults = broken.faults()
    assert any(fault.startswith("packing.py: does not define F2LLMModel") for fault in faults)


def test_a_neighbour_that_is_not_there(broken: BrokenRelease) -> None:
    broken.delete("packing.py")
    faults = broken.faults()
    assert any("imports packing.py, which is not there" in fault for fault in faults)


def test_an_import_that_not_everybody_has(broken: BrokenRelease) -> None:
    text = (broken.folder / "packing.py").read_text()
    broken.write("packing.py", f"{text}\n\ndef late():\n    import flash_attn.bert_padding\n")
    broken.expect(("packing.py", "imports flash_attn: "))


def test_an_import_that_is_tried_only(broken: BrokenRelease) -> None:
    text = (broken.folder / "packing.py").read_text()
    broken.write("packing.py", f"{text}\ntry:\n    import flash_attn.bert_padding\nexcept ImportError:\n    pass\n")
    broken.expect()


def test_code_that_nothing_imports(broken: BrokenRelease) -> None:
    broken.write("losses.py", "import torch\n")
    broken.expect(("losses.py", "is code that nothing imports"))


def test_code_that_is_no_python(broken: BrokenRelease) -> None:
    broken.write("packing.py", "def (:\n")
    broken.expect(("packing.py", "is no Python", "remote code"))


def test_older_code_is_no_fault(broken: BrokenRelease) -> None:
    text = (broken.folder / "packing.py").read_text()
    broken.write("packing.py", f"{text}\n# An older version.\n")
    broken.expect()
    assert any(notice.file == "packing.py" for notice in broken.examine().notices)
