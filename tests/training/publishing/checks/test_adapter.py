"""A packed adapter that is broken: what peft cannot take, what is not of its base, and what is not checked."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.training.publishing.adapters import BASE, change_weights, put_in_cache
from tests.training.publishing.broken import BrokenRelease
from training.publish import main
from training.publishing.checks import embeddings
from training.publishing.checks.packed import PackedFolder

CONFIG, WEIGHTS, RECORD, CARD = "adapter_config.json", "adapter_model.safetensors", "release.json", "README.md"
FIRST = "base_model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.fixture
def checked(broken_adapter: BrokenRelease, adapter_base: Path) -> BrokenRelease:
    """A packed adapter whose base is given."""
    broken_adapter.base = adapter_base
    return broken_adapter


def test_a_release_has_no_fault(checked: BrokenRelease) -> None:
    checked.expect()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base_model_name_or_path": "/home/me/base"}, [(CONFIG, "'/home/me/base'", "no name on the Hub", "--base")]),
        ({"base_model_name_or_path": "base"}, [(CONFIG, "'base'", "no name on the Hub")]),
        ({"base_model_name_or_path": None}, [(CONFIG, "None, no name on the Hub")]),
        ({"base_model_name_or_path": "org/other"}, [(RECORD, BASE, "has 'org/other'")]),
        ({"task_type": None}, [(CONFIG, "task_type is None")]),
        ({"lora_alpha": 99}, [(RECORD, "its alpha is 8", "99")]),
        ({"r": 5}, [(RECORD, "its rank is 4", "5"), *[(WEIGHTS, "its base wants")] * 28]),
        (
            {"target_modules": ["q_proj"]},
            [(RECORD, "its targets"), (WEIGHTS, "beyond an adapter of its base", "and 21 more")],
        ),
        ({"target_modules": ["nothing"]}, [(CONFIG, "makes no adapter"), (RECORD, "its targets")]),
        ({"use_dora": True}, [(RECORD, "its dora is False"), (WEIGHTS, "lacks", "lora_magnitude_vector.weight")]),
        ({"peft_type": "IA3"}, [(CONFIG, "'IA3', not LORA"), (WEIGHTS, "lacks")]),
        ({"peft_type": "NOTHING"}, [(CONFIG, "peft cannot read it")]),
    ],
)
def test_a_configuration_that_is_another_adapters(
    checked: BrokenRelease, fields: dict, expected: list[tuple[str, ...]]
) -> None:
    checked.edit(CONFIG, **fields)
    found = checked.faults()
    for file, *parts in expected:
        assert any(fault.startswith(f"{file}: ") and all(part in fault for part in parts) for fault in found), found
    assert len(found) <= len(expected) + 2, found


def test_weights_of_another_adapter(checked: BrokenRelease) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["base_model.model.layers.0.mlp.other.lora_A.weight"] = weights.pop(FIRST)
        weights[FIRST.replace("lora_A", "lora_B")] = torch.zeros(31, 4)

    checked.edit_weights(change, WEIGHTS)
    checked.expect(
        (RECORD, "4,096 parameters, but the adapter has 4,092"),
        (WEIGHTS, "has, beyond the layers that it adapts", "other.lora_A"),
        (WEIGHTS, f"lacks {FIRST}"),
        (WEIGHTS, "base_model.model.layers.0.mlp.down_proj.lora_B.weight is (31, 4), its base wants (32, 4)"),
    )


def test_weights_of_another_dtype_and_not_finite(checked: BrokenRelease) -> None:
    checked.edit_weights(lambda weights: weights.update({FIRST: weights[FIRST] * torch.inf}), WEIGHTS)
    checked.expect((WEIGHTS, f"{FIRST} is NaN or infinite"))
    checked.edit_weights(lambda weights: weights.update({name: weights[name].half() for name in weights}), WEIGHTS)
    assert any("is of float16, but release.json says float32" in fault for fault in checked.faults())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{"])
def test_a_damaged_file_is_a_finding(checked: BrokenRelease, name: str, content: bytes | None) -> None:
    checked.base = None
    if content is None:
        (checked.folder / name).unlink()
    else:
        checked.write(name, content, listed=False)
    faults = checked.faults()
    assert any(fault.startswith(f"{name}: ") for fault in faults), faults
    assert all(len(fault.splitlines()) == 1 for fault in faults)


def test_a_pickle_code_and_a_whole_model_beside_it(checked: BrokenRelease) -> None:
    checked.write("adapter_model.bin", "x")
    checked.write("modeling.py", "x = 1")
    checked.expect(("adapter_model.bin", "no safetensors"), ("modeling.py", "is code, which an adapter's base brings"))


def test_a_record_that_tells_of_no_adapter(checked: BrokenRelease) -> None:
    checked.base = None
    checked.edit(RECORD, adapter=None)
    assert any(fault.startswith(f"{RECORD}: tells of no adapter") for fault in checked.faults())


def test_a_tokenizer_of_another_model(checked: BrokenRelease) -> None:
    checked.edit("tokenizer_config.json", pad_token="a")
    assert any(fault.startswith("tokenizer_config.json: pad_token_id is 0, but") for fault in checked.faults())


def test_a_card_that_loads_another_base(checked: BrokenRelease) -> None:
    checked.replace(CARD, f'AutoModel.from_pretrained("{BASE}")', 'AutoModel.from_pretrained("org/other")')
    assert any("does not load org/tiny-base" in fault for fault in checked.faults())


def test_a_base_that_is_not_at_hand_is_a_notice(broken_adapter: BrokenRelease, adapter_base: Path) -> None:
    broken_adapter.edit_weights(lambda weights: weights.update({FIRST: torch.zeros(4, 63)}), WEIGHTS)
    broken_adapter.edit(
        RECORD, lambda record: record.update(parameters=4092, adapter=record["adapter"] | {"parameters": 4092})
    )
    broken_adapter.replace(CARD, "4,096", "4,092")
    broken_adapter.expect()
    (notice, _) = broken_adapter.examine().notices
    assert f"not checked against its base {BASE}" in str(notice) and "--base FOLDER" in str(notice)
    # What the Hub's client has is used without being asked for.
    put_in_cache(adapter_base)
    broken_adapter.expect((WEIGHTS, "is (4, 63), its base wants (4, 64)"))


def test_a_base_in_part_is_not_at_hand(broken_adapter: BrokenRelease, adapter_base: Path) -> None:
    (put_in_cache(adapter_base) / "model.safetensors").unlink()
    assert any("not checked against its base" in str(notice) for notice in broken_adapter.examine().notices)


def test_another_base_than_that_of_the_release(
    checked: BrokenRelease, adapter_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = Path(shutil.copytree(adapter_base, tmp_path / "other"))
    change_weights(other / "model.safetensors", lambda _, tensor: tensor + 1)
    digest = "0" * 32
    checked.edit(RECORD, lambda record: record["adapter"].update(base_weights=digest))
    checked.base = other
    checked.expect((CONFIG, "has other weights than"))
    for words, part in (
        ([str(checked.folder), "--base", str(tmp_path / "nowhere")], "holds no model that can be a base"),
        ([str(checked.folder), "--base", str(tmp_path)], "holds no model that can be a base"),
        ([str(adapter_base), "--base", str(adapter_base)], "is no adapter; leave it out"),
    ):
        assert main(["verify", *words]) == 2
        assert part in capsys.readouterr().err


def test_the_examples_are_run_with_the_base(checked: BrokenRelease, adapter_base: Path) -> None:
    checked.replace(CARD, ".argmax(dim=1)", ".argmax(dim=1) - 1")
    faults = [str(finding) for finding in embeddings.check_embeddings(PackedFolder(checked.folder, adapter_base))]
    assert any("the example sentence-transformers differs from transformers on queries" in fault for fault in faults)
    assert any("the example remote-code differs from transformers on queries" in fault for fault in faults)


def test_the_command_says_what_was_left_out(broken_adapter: BrokenRelease, capsys: pytest.CaptureFixture) -> None:
    assert main(["verify", str(broken_adapter.folder)]) == 0
    printed = capsys.readouterr().out
    assert "note: adapter_config.json: not checked against" in printed
    assert "no fault; checked (see the notes): contents," in printed and "not run" not in printed


def test_without_peft_the_extra_is_named(checked: BrokenRelease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    faults = checked.faults()
    assert len(faults) == 2 and all("cannot be done" in fault and '".[train,lora]"' in fault for fault in faults), (
        faults
    )
