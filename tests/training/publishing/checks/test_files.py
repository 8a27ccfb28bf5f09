"""Faults of the files: contents, weights, remote code; of an adapter and its base."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from tests.training.publishing.broken import BrokenRelease
from tests.training.publishing.packed import BASE, change_weights, put_in_cache
from training.publish import main
from training.publishing.checks import card
from training.publishing.checks.packed import PackedFolder
from training.publishing.pack import PackOptions, pack

CONFIG, WEIGHTS, INDEX, RECORD = "config.json", "model.safetensors", "model.safetensors.index.json", "release.json"
ADAPTER, ADAPTER_WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FIRST = "base_model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, "delete it") for name in (".DS_Store", "runs/events.out.tfevents.1", "trainer_state.json")),
        *((name, "delete it") for name in (".cache/x", "__pycache__/a.pyc")),
        *((name, "is not safetensors: ") for name in ("pytorch_model.bin", "rng.pth", "cache/texts.pkl")),
    ],
)
def test_files_that_do_not_belong(broken: BrokenRelease, name: str, said: str) -> None:
    broken.write(name, b"cos\nsystem\n")
    broken.expect((name, said))


def test_the_record_lists_all_files_with_their_hashes(broken: BrokenRelease) -> None:
    weights = load_file(broken.folder / WEIGHTS)
    gate, up = (f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    swapped = save({name: weights[name].contiguous() for name in sorted(weights)}, metadata={"format": "pt"})
    assert len(swapped) == broken.read(RECORD)["files"][WEIGHTS]
    broken.write(WEIGHTS, swapped, listed=False)
    broken.write("LICENSE", "Apache", listed=False)
    broken.write("notes.txt", "x", listed=False)
    broken.write(".gitattributes", "*.safetensors filter=lfs\n", listed=False)
    (broken.folder / "2_Normalize/config.json").unlink()
    broken.expect(
        (WEIGHTS, "is not the file whose hash release.json has"),
        ("LICENSE", "has 6 bytes, but release.json says"),
        ("notes.txt", "is not in release.json"),
        ("2_Normalize/config.json", "is missing, but release.json lists it"),
    )


def test_a_link(broken: BrokenRelease) -> None:
    (broken.folder / "layers.py").rename(broken.folder.parent / "layers.py")
    (broken.folder / "layers.py").symlink_to(broken.folder.parent / "layers.py")
    assert any(fault.startswith("layers.py: is a link") for fault in broken.faults())


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm.weight"][3] = float("nan")
    tensors["embed_tokens.weight"][-1, -1] = float("inf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda tensors: [tensors.update({f"model.{name}": tensors.pop(name)}) for name in [*tensors]],
            [(WEIGHTS, "tensors have the prefix 'model.'")],
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": tensors.pop("norm.weight")}),
            [(WEIGHTS, "lacks norm.weight"), (WEIGHTS, "has too many tensors: lm_head.weight")],
        ),
        (
            lambda tensors: tensors.update({"norm.weight": torch.ones(33)}),
            [
                (WEIGHTS, "norm.weight is (33,), the configuration wants (32,)"),
                (RECORD, "parameters, but the weights have"),
            ],
        ),
        (_nan, [(WEIGHTS, "embed_tokens.weight, norm.weight is NaN or infinite")]),
        (
            lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].half()}),
            [(WEIGHTS, "is of float16, float32, but release.json says float32")],
        ),
    ],
)
def test_weights(broken: BrokenRelease, change: Callable[[Any], Any], expected: list[tuple[str, str]]) -> None:
    broken.edit_weights(change)
    broken.expect(*expected)


def test_a_count_that_is_not_that_of_the_record(broken: BrokenRelease) -> None:
    broken.edit(RECORD, parameters=330_000_000)
    broken.expect((RECORD, "330,000,000 parameters, but"), (CARD, "where the files give | parameters | 330,000,000"))


def test_weights_that_are_damaged_missing_or_too_large(broken: BrokenRelease) -> None:
    content = (broken.folder / WEIGHTS).read_bytes()
    broken.write(WEIGHTS, content[: len(content) // 2])
    broken.expect((WEIGHTS, "is not a safetensors file", "not checked for it, or not in full: weights"))
    broken.delete(WEIGHTS)
    broken.expect((WEIGHTS, "is missing"))
    with (broken.folder / "model-00009-of-00009.safetensors").open("wb") as file:
        os.truncate(file.fileno(), 5_100_000_000)
    assert any("is 5.1 GB large" in fault for fault in broken.faults())


def test_shards(instructed: Path, tmp_path: Path) -> None:
    release = pack(instructed, tmp_path / "packed/tiny", PackOptions("tiny", dtype="bfloat16", max_shard_size="20KB"))
    broken = BrokenRelease(release, tmp_path / "tiny")
    first, second, *_ = sorted(path.name for path in broken.folder.glob("model-*.safetensors"))
    broken.expect()

    def move(index: dict) -> None:
        name = next(name for name, file in index["weight_map"].items() if file == first)
        index["weight_map"][name] = second

    broken.edit(INDEX, move)
    broken.expect((INDEX, "does not name the file that holds"))
    broken.delete(second)
    assert any(fault.startswith(f"{INDEX}: does not name the file that holds") for fault in broken.faults())
    broken.delete(INDEX)
    assert any(fault.startswith(f"{INDEX}: is missing, but the weights are in model-") for fault in broken.faults())


def _append(text: str) -> Callable[[BrokenRelease], None]:
    return lambda broken: broken.write("packing.py", (broken.folder / "packing.py").read_text() + text)


@pytest.mark.parametrize(
    ("edit", "file", "said"),
    [
        (lambda broken: broken.edit(CONFIG, auto_map=...), CONFIG, "auto_map is None: it must name F2LLMConfig and"),
        (
            lambda broken: broken.edit(CONFIG, lambda c: c["auto_map"].update(AutoModel="modeling_f2llm.Qwen3Model")),
            *(CONFIG, "it must name"),
        ),
        (
            lambda broken: broken.edit(CONFIG, lambda c: c["auto_map"].update(AutoModel="packing.F2LLMModel")),
            *("packing.py", "does not define F2LLMModel"),
        ),
        (lambda broken: broken.delete("configuration_f2llm.py"), "configuration_f2llm.py", "is missing"),
        (lambda broken: broken.delete("packing.py"), "modeling_f2llm.py", "imports packing.py, which is not there"),
        (_append("\n\ndef late():\n    import flash_attn.bert_padding\n"), "packing.py", "imports flash_attn: "),
        (lambda broken: broken.write("losses.py", "import torch\n"), "losses.py", "is code that neither auto_map"),
        (lambda broken: broken.write("packing.py", "def (:\n"), "packing.py", "is not Python"),
    ],
)
def test_remote_code(broken: BrokenRelease, edit: Callable[[BrokenRelease], None], file: str, said: str) -> None:
    edit(broken)
    assert any(fault.startswith(f"{file}: ") and said in fault for fault in broken.faults()), broken.faults()


def test_older_code_and_an_import_that_is_tried_are_no_fault(broken: BrokenRelease) -> None:
    _append("\ntry:\n    import flash_attn.bert_padding\nexcept ImportError:\n    pass\n")(broken)
    broken.expect()
    assert any(notice.file == "packing.py" for notice in broken.examine().notices)


@pytest.fixture
def checked(broken_adapter: BrokenRelease, adapter_base: Path) -> BrokenRelease:
    """A packed adapter whose base is given."""
    broken_adapter.base = adapter_base
    broken_adapter.expect()
    return broken_adapter


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base_model_name_or_path": "/home/me/base"}, [(ADAPTER, "'/home/me/base', not a name on the Hub", "--base")]),
        ({"base_model_name_or_path": None}, [(ADAPTER, "None, not a name on the Hub")]),
        ({"base_model_name_or_path": "org/other"}, [(RECORD, BASE, "has 'org/other'")]),
        ({"task_type": None}, [(ADAPTER, "task_type is None")]),
        ({"lora_alpha": 99}, [(RECORD, "its alpha is 8", "99")]),
        ({"r": 5}, [(RECORD, "its rank is 4", "5"), *[(ADAPTER_WEIGHTS, "its base wants")] * 28]),
        ({"target_modules": ["q_proj"]}, [(RECORD, "its targets"), (ADAPTER_WEIGHTS, "too many tensors: ", "21 more")]),
        ({"target_modules": ["nothing"]}, [(ADAPTER, "makes no adapter"), (RECORD, "its targets")]),
        (
            {"use_dora": True},
            [(RECORD, "its dora is False"), (ADAPTER_WEIGHTS, "lacks", "lora_magnitude_vector.weight")],
        ),
        ({"peft_type": "IA3"}, [(ADAPTER, "'IA3', not LORA"), (ADAPTER_WEIGHTS, "lacks")]),
        ({"peft_type": "NOTHING"}, [(ADAPTER, "peft cannot read it")]),
    ],
)
def test_a_configuration_of_another_adapter(checked: BrokenRelease, fields: dict, expected: list) -> None:
    checked.edit(ADAPTER, **fields)
    found = checked.faults()
    for file, *parts in expected:
        assert any(fault.startswith(f"{file}: ") and all(part in fault for part in parts) for fault in found), found


def test_weights_of_another_adapter(checked: BrokenRelease) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["base_model.model.layers.0.mlp.other.lora_A.weight"] = weights.pop(FIRST)
        weights[FIRST.replace("lora_A", "lora_B")] = torch.full((31, 4), torch.inf)

    checked.edit_weights(change, ADAPTER_WEIGHTS)
    checked.expect(
        (RECORD, "4,096 parameters, but the weights have 4,092"),
        (ADAPTER_WEIGHTS, "has too many tensors: ", "other.lora_A"),
        (ADAPTER_WEIGHTS, f"lacks {FIRST}"),
        (ADAPTER_WEIGHTS, "down_proj.lora_B.weight is (31, 4), its base wants (32, 4)"),
        (ADAPTER_WEIGHTS, "down_proj.lora_B.weight is NaN or infinite"),
    )


@pytest.mark.parametrize("name", [ADAPTER, ADAPTER_WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{"])
def test_a_damaged_adapter(broken_adapter: BrokenRelease, name: str, content: bytes | None) -> None:
    if content is None:
        (broken_adapter.folder / name).unlink()
    else:
        broken_adapter.write(name, content, listed=False)
    faults = broken_adapter.faults()
    assert any(fault.startswith(f"{name}: ") for fault in faults), faults
    assert all(len(fault.splitlines()) == 1 for fault in faults)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda each: each.write("adapter_model.bin", "x"), "adapter_model.bin: is not safetensors"),
        (lambda each: each.write("modeling.py", "x = 1"), "modeling.py: is code, which an adapter's base brings"),
        (lambda each: each.edit("tokenizer_config.json", pad_token="a"), "tokenizer_config.json: pad_token_id is 0"),
        (
            lambda each: each.replace(CARD, f'AutoModel.from_pretrained("{BASE}")', 'AutoModel.from_pretrained("o/o")'),
            f"does not load {BASE}",
        ),
        (lambda each: each.edit(RECORD, lambda record: record["adapter"].update(base_weights="0")), "other weights"),
        (lambda each: each.edit(RECORD, adapter=None), f"{RECORD}: has no adapter"),
    ],
)
def test_what_is_not_of_the_adapter(checked: BrokenRelease, edit: Callable[[Any], Any], said: str) -> None:
    edit(checked)
    checked.base = None if said.startswith(RECORD) else checked.base
    assert any(said in fault for fault in checked.faults()), checked.faults()


def test_a_base_that_is_not_here_is_a_notice(
    broken_adapter: BrokenRelease, adapter_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_adapter.edit_weights(lambda weights: weights.update({FIRST: torch.zeros(4, 63)}), ADAPTER_WEIGHTS)
    counts = {"parameters": 4092}
    broken_adapter.edit(RECORD, lambda record: record.update(counts, adapter=record["adapter"] | counts))
    broken_adapter.replace(CARD, "4,096", "4,092")
    assert main(["verify", str(broken_adapter.folder)]) == 0
    printed = capsys.readouterr().out
    assert f"note: adapter_config.json: not checked against its base {BASE}" in printed and "--base FOLDER" in printed
    assert "no fault; checked (see the notes): contents," in printed and "not run" not in printed
    # One in the Hub's cache is used by itself, if it is whole.
    cached = put_in_cache(adapter_base)
    broken_adapter.expect((ADAPTER_WEIGHTS, "is (4, 63), its base wants (4, 64)"))
    (cached / "model.safetensors").unlink()
    assert any("not checked against its base" in str(notice) for notice in broken_adapter.examine().notices)


def test_a_wrong_base(checked: BrokenRelease, adapter_base: Path, tmp_path: Path, capsys) -> None:
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


def test_the_examples_are_run_with_the_base(checked: BrokenRelease, adapter_base: Path) -> None:
    checked.replace(CARD, ".argmax(dim=1)", ".argmax(dim=1) - 1")
    faults = [str(finding) for finding in card.check_embeddings(PackedFolder(checked.folder, adapter_base))]
    for name in ("sentence-transformers", "remote-code"):
        assert any(f"the example {name} differs from transformers on queries" in fault for fault in faults), faults


def test_without_peft_the_extra_is_named(broken_adapter: BrokenRelease, adapter_base: Path, monkeypatch) -> None:
    broken_adapter.base = adapter_base
    monkeypatch.setitem(sys.modules, "peft", None)
    faults = broken_adapter.faults()
    assert len(faults) == 2, faults
    assert all("cannot be done" in fault and '".[train,lora]"' in fault for fault in faults), faults
