"""Faults of the files: contents, weights, remote code; of an adapter and its base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.publishing.packed import BASE, BrokenRelease, change_weights
from training.publish import main
from training.publishing.checks import card
from training.publishing.checks.files import PackedFolder
from training.publishing.pack import PackOptions, pack

WEIGHTS, RECORD, ADAPTER, CARD = "model.safetensors", "release.json", "adapter_config.json", "README.md"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "does not belong in a release; delete it") for name in (".DS_Store", ".cache/x")),
        *((name, "is not safetensors: ") for name in ("pytorch_model.bin", "rng.pth", "cache/texts.pkl")),
    ],
)
def test_files_that_do_not_belong(broken, name, said):
    broken.write(name, b"cos\nsystem\n")
    assert any(fault.startswith(f"{name}: {said}") for fault in broken.faults())


def test_the_record_lists_all_files_with_their_hashes(broken):
    weights = bytearray((broken.folder / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    broken.write(WEIGHTS, bytes(weights), listed=False)
    broken.write("LICENSE", "Apache", listed=False)
    broken.write("notes.txt", "x", listed=False)
    broken.write(".gitattributes", "*.safetensors filter=lfs\n", listed=False)
    (broken.folder / "2_Normalize/config.json").unlink()
    changed = "was changed, added or deleted since release.json was written"
    broken.expect(
        *((name, changed) for name in (WEIGHTS, "LICENSE", "notes.txt", "2_Normalize/config.json")),
        ("the folder", "it lacks 2_Normalize/config.json"),
    )


def test_a_link_is_a_fault_and_other_code_a_notice(broken):
    broken.write("packing.py", (broken.folder / "packing.py").read_text() + "\n# Older.\n")
    broken.write("losses.py", "import torch\n")
    broken.expect()
    assert {"losses.py", "packing.py"} <= {notice.file for notice in broken.examine().notices}
    (broken.folder / "layers.py").rename(broken.folder.parent / "layers.py")
    (broken.folder / "layers.py").symlink_to(broken.folder.parent / "layers.py")
    assert any(fault.startswith("layers.py: is a link") for fault in broken.faults())


def test_shards(instructed, tmp_path):
    release = pack(instructed, tmp_path / "packed/tiny", PackOptions("tiny", dtype="bfloat16", max_shard_size="20KB"))
    broken = BrokenRelease(release, tmp_path / "tiny")
    broken.expect()
    (broken.folder / "model.safetensors.index.json").unlink()
    broken.list_sizes()
    broken.expect(("the folder", "holds no weights as safetensors"))


@pytest.fixture
def checked(broken_adapter, adapter_base):
    broken_adapter.base = adapter_base
    broken_adapter.expect()
    return broken_adapter


def config(**fields):
    return lambda broken: broken.edit(ADAPTER, **fields)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (config(base_model_name_or_path="org/other"), f"is 'org/other', not '{BASE}'"),
        (config(lora_alpha=99), "its alpha is 8, but adapter_config.json has 99"),
        (config(r=5), "its base wants"),
        (config(target_modules=["nothing"]), "the adapter does not fit its base"),
        (config(use_dora=True), "lora_magnitude_vector"),
        (config(peft_type="NOTHING"), "the adapter does not fit its base"),
        (lambda each: each.edit("tokenizer_config.json", pad_token="a"), "tokenizer_config.json: pad_token_id is 0"),
        (lambda each: each.edit(RECORD, adapter=None), f"{RECORD}: has no adapter"),
    ],
)
def test_what_is_not_of_the_adapter(checked, edit, said):
    edit(checked)
    assert any(said in fault for fault in checked.faults()), checked.faults()


def test_a_wrong_base(checked, adapter_base, tmp_path, capsys):
    other = Path(shutil.copytree(adapter_base, tmp_path / "other"))
    change_weights(other / WEIGHTS, lambda _, tensor: tensor + 1)
    checked.edit(RECORD, lambda record: record["adapter"].update(base_weights="0" * 32))
    checked.base = other
    checked.expect((ADAPTER, "has other weights than"))
    for words, part in (
        ([str(checked.folder), "--base", str(tmp_path)], "holds no model that can be a base"),
        ([str(adapter_base), "--base", str(adapter_base)], "is not an adapter; leave it out"),
    ):
        assert main(["verify", *words]) == 2
        assert part in capsys.readouterr().err


def test_the_examples_are_run_with_the_base(checked, adapter_base):
    checked.replace(CARD, ".argmax(dim=1)", ".argmax(dim=1) - 1")
    faults = [str(finding) for finding in card.check_embeddings(PackedFolder(checked.folder, adapter_base))]
    for name in ("sentence-transformers", "remote-code"):
        assert any(f"the example {name} differs from transformers on queries" in fault for fault in faults), faults
