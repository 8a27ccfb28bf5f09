"""Adapters, packed by themselves: small, with their base by its name on the Hub, and equal to what was trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.distributed_recipe import save_model
from tests.training.publishing.packed import (
    BASE,
    COMMIT,
    QUICK_FOR_ADAPTERS,
    change_weights,
    content_of,
    metadata_of,
    put_in_cache,
    rewrite_json,
    train_adapter,
)
from training.merge import main as merge
from training.publish import main
from training.publishing.record import load_release
from training.publishing.verify import examine

WEIGHTS = "adapter_model.safetensors"
TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")

pytestmark = pytest.mark.usefixtures("no_figures")


def pack(run, *words):
    options = ["--name", "tiny", "--output", str(run.parent / "packed"), "--licence", "apache-2.0"]
    return main(["pack", str(run), *options, *words])


def adapter_of(run):
    return load_release(run.parent / "packed").adapter


def card_of(run):
    return (run.parent / "packed/README.md").read_text()


def base_in_metadata(run):
    metadata = metadata_of(run.parent / "packed")
    return metadata.get("base_model"), metadata.get("base_model_relation")


def test_an_adapter_is_packed_with_its_base_by_name(adapter_run, adapter_base):
    put_in_cache(adapter_base)
    assert pack(adapter_run, "--base", BASE) == 0
    packed = adapter_run.parent / "packed"
    files = content_of(packed)
    assert files.keys() >= {WEIGHTS, "adapter_config.json", "LICENSE", "README.md", "release.json"}
    assert not {"config.json", "model.safetensors", "base_model.json", "packing.py"} & set(files)
    assert not [name for name, content in files.items() if str(adapter_base.parent).encode() in content]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    release, adapter = load_release(packed), adapter_of(adapter_run)
    assert (adapter.base.kind, adapter.base.name, adapter.base.revision, adapter.match) == ("hub", BASE, COMMIT, "same")
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.base_code) == (4, 8, TARGETS, True)
    parameters = sum(each.numel() for each in load_file(packed / WEIGHTS).values())
    assert release.parameters == adapter.parameters == parameters
    assert release.dimensions == (32, 16, 8) and release.max_length == 512 and release.shape["hidden_size"] == 32
    assert base_in_metadata(adapter_run) == (BASE, "adapter")
    assert f"| `adapter` | training of an adapter | [{BASE}]" in card_of(adapter_run)

    examination = examine(packed)
    assert examination.faults == () and examination.notices == ()
    assert pack(adapter_run, "--base", BASE) == 0
    assert content_of(packed) == files


def test_a_base_is_recorded_as_stated_rounded_or_named_by_the_adapter(adapter_run, adapter_base):
    assert pack(adapter_run, "--base", BASE) == 0
    adapter = adapter_of(adapter_run)
    assert (adapter.match, adapter.base.revision, adapter.base_weights) == ("stated", None, None)
    assert "it was not checked" in card_of(adapter_run)
    examination = examine(adapter_run.parent / "packed")
    (first,) = map(str, examination.notices)
    assert examination.faults == () and "--base FOLDER" in first
    assert first.startswith("adapter_config.json: not checked against its base org/tiny-base")
    # The same base, rounded.
    cached = put_in_cache(adapter_base)
    change_weights(cached / "model.safetensors", lambda _, tensor: tensor.bfloat16())
    assert pack(adapter_run, "--base", BASE) == 0
    assert adapter_of(adapter_run).match == "rounded"
    assert "before these were rounded" in card_of(adapter_run)
    # An adapter of a model on the Hub needs no option.
    rewrite_json(adapter_run / "model/adapter_config.json", base_model_name_or_path=BASE)
    (adapter_run / "model/base_model.json").write_text(json.dumps({"name": BASE, "revision": COMMIT}))
    assert pack(adapter_run) == 0
    adapter = adapter_of(adapter_run)
    assert (adapter.base.name, adapter.base.revision, adapter.match) == (BASE, COMMIT, "trained")
    assert examine(adapter_run.parent / "packed", QUICK_FOR_ADAPTERS).notices == ()


def test_a_base_that_moved_is_known_by_its_digest(adapter_base, tmp_path, hub_cache, capsys):
    moved = Path(shutil.copytree(adapter_base, tmp_path / "base"))
    run = train_adapter(tmp_path / "own", moved)
    cached = put_in_cache(moved)
    shutil.rmtree(moved)
    assert pack(run, "--base", BASE) == 0 and adapter_of(run).match == "same"
    change_weights(cached / "model.safetensors", lambda _, tensor: tensor.bfloat16())
    assert pack(run, "--base", BASE) == 2
    assert "or " + str(moved) + " is gone" in capsys.readouterr().err


def test_dora_rounded_and_a_checkpoint(adapter_base, tmp_path, hub_cache):
    run = train_adapter(tmp_path / "dora", adapter_base, lora_dora=True)
    put_in_cache(adapter_base)
    checkpoint = next(run.glob("checkpoint-*")).name
    assert pack(run, "--base", BASE, "--dtype", "bfloat16", "--checkpoint", checkpoint) == 0
    packed = tmp_path / "dora/packed"
    assert {tensor.dtype for tensor in load_file(packed / WEIGHTS).values()} == {torch.bfloat16}
    assert adapter_of(run).dora and load_release(packed).stages[-1].name == f"run@{checkpoint}"
    assert "DoRA adapter" in card_of(run)
    assert examine(packed, QUICK_FOR_ADAPTERS).faults == ()


def test_training_that_went_on_has_the_base_in_its_lineage(adapter_run, adapter_base, tmp_path):
    run = train_adapter(tmp_path / "more", adapter_run / "model", lora_rank=None, max_steps=1)
    assert pack(run, "--base", BASE) == 0
    stages = load_release(tmp_path / "more/packed").stages
    assert [(stage.name, stage.kind) for stage in stages] == [("adapter", "adapter"), ("run", "adapter")]
    assert f"| `adapter` | training of an adapter | [{BASE}]" in card_of(run)


def test_a_merged_adapter_names_its_base(adapter_run, adapter_base, capsys):
    put_in_cache(adapter_base)
    merged = ["--checkpoint", "merged"]
    assert merge([str(adapter_run / "model"), "--output", str(adapter_run / "merged")]) == 0
    assert pack(adapter_run, *merged) == 0
    adapter = adapter_of(adapter_run)
    expected = ("local", adapter_base.parent.name, True, 4)
    assert (adapter.base.kind, adapter.base.name, adapter.merged, adapter.rank) == expected
    assert base_in_metadata(adapter_run) == (None, None) and "merged into them" in card_of(adapter_run)
    assert pack(adapter_run, *merged, "--base", BASE) == 0
    assert base_in_metadata(adapter_run) == (BASE, "finetune") and adapter_of(adapter_run).match == "same"
    assert pack(adapter_run, *merged, "--base", "base") == 2
    assert "ORG/NAME" in capsys.readouterr().err


def test_a_base_without_a_name_is_refused(adapter_run, tmp_path, capsys, monkeypatch):
    (tmp_path / "here/folder/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for words in ([], ["--base", "tiny-base"], ["--base", "folder/model"]):
        assert pack(adapter_run, *words) == 2
        error = capsys.readouterr().err
        named = f"base {words[1]!r} " if words else ""
        assert len(error.splitlines()) == 1 and f"{named}is not a name on the Hub" in error
    assert not (adapter_run.parent / "packed").exists()


def test_another_base_is_refused(adapter_run, runs, tmp_path, tiny_config, tiny_tokenizer, capsys):
    narrow = {"hidden_size": 16, "matryoshka_dimensions": [16]}
    others = {"other": {"seed": 7}, "narrow": narrow, "flat": {"intermediate_size": 48}}
    for name, fields in others.items():
        save_model(tmp_path / name, tiny_config, tiny_tokenizer, **fields)
        put_in_cache(tmp_path / name, f"org/{name}")
        assert pack(adapter_run, "--base", f"org/{name}") == 2
        assert f"--base org/{name}: its weights are not those that" in capsys.readouterr().err
    # Nobody noted what it was trained on.
    (adapter_run / "model/base_model.json").unlink()
    for name in ("narrow", "flat"):
        rewrite_json(adapter_run / "model/adapter_config.json", base_model_name_or_path=f"org/{name}")
        assert pack(adapter_run) == 2
        assert "give the adapter's own" in capsys.readouterr().err
    assert pack(runs / "pruned", "--base", BASE) == 2
    assert "has no adapter, merged or not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        (WEIGHTS, None, "damaged"),
        ("adapter_config.json", b"{", "adapter_config.json: cannot be read"),
        ("adapter_config.json", b'{"base_model_name_or_path": null}', "does not say what it adapts"),
        ("tokenizer.json", None, "tokenizer.json: is not a tokenizer"),
        ("1_Pooling/config.json", None, "it lacks 1_Pooling/config.json"),
        ("training_arguments.json", None, "training_arguments.json: cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter_run, capsys, name, content, part):
    path = adapter_run / "model" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert pack(adapter_run, "--base", BASE) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and part in error, error
    assert not (adapter_run.parent / "packed").exists()


def test_weights_that_are_faulty_are_refused(adapter_run, trained_adapter, monkeypatch, capsys):
    path, first = adapter_run / "model" / WEIGHTS, next(iter(load_file(trained_adapter / "model" / WEIGHTS)))
    for change, part in (
        (lambda name, tensor: tensor * torch.nan if name == first else tensor, f"{first} is NaN"),
        (lambda name, tensor: tensor.bfloat16() if name == first else tensor, "weights of bfloat16, float32"),
        (lambda name, tensor: None if name == first else tensor, f"{first} is absent"),
        (lambda name, tensor: tensor[:1] if name == first else tensor, f"{first} is (1, "),
    ):
        shutil.copyfile(trained_adapter / "model" / WEIGHTS, path)
        change_weights(path, change)
        assert pack(adapter_run, "--base", BASE) == 2
        assert part in capsys.readouterr().err
    # Without peft, the extra is named.
    monkeypatch.setitem(sys.modules, "peft", None)
    assert pack(adapter_run, "--base", BASE) == 2
    assert "[train,lora]" in capsys.readouterr().err
