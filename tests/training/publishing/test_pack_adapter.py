"""Adapters, packed by themselves: small, with their base by its name on the Hub, and equal to what was trained."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from modeling_f2llm import F2LLMConfig
from tests.training.distributed_recipe import save_model
from tests.training.publishing.adapters import BASE, COMMIT, change_weights, put_in_cache, train_adapter
from tests.training.publishing.broken import QUICK_FOR_ADAPTERS
from tests.training.publishing.contents import content_of
from training.models.merge_adapter import main as merge
from training.publish import main
from training.publishing.record import AdapterRecord, load_release
from training.publishing.verify import examine

WEIGHTS = "adapter_model.safetensors"
TARGETS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")

pytestmark = pytest.mark.usefixtures("no_figures")


def pack(run: Path, *words: str) -> int:
    options = ["--name", "tiny", "--output", str(run.parent / "packed"), "--licence", "apache-2.0"]
    return main(["pack", str(run), *options, *words])


def adapter_of(run: Path) -> AdapterRecord:
    adapter = load_release(run.parent / "packed").adapter
    assert adapter is not None
    return adapter


def metadata(run: Path) -> dict:
    return yaml.safe_load((run.parent / "packed/README.md").read_text().split("---")[1])


def test_an_adapter_is_packed_with_its_base_by_name(adapter_run: Path, adapter_base: Path, sentences) -> None:
    put_in_cache(adapter_base)
    assert pack(adapter_run, "--base", BASE) == 0
    packed = adapter_run.parent / "packed"
    files = content_of(packed)
    assert {WEIGHTS, "adapter_config.json", "LICENSE", "README.md", "release.json", "1_Pooling/config.json"} <= set(
        files
    )
    assert not {"config.json", "model.safetensors", "base_model.json"} & set(files)
    assert not [name for name in files if name.endswith(".py")]
    assert not [name for name, content in files.items() if str(adapter_base.parent).encode() in content]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    release, adapter = load_release(packed), adapter_of(adapter_run)
    assert (adapter.base.kind, adapter.base.name, adapter.base.revision, adapter.match) == ("hub", BASE, COMMIT, "same")
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.base_code) == (4, 8, TARGETS, True)
    assert (
        release.parameters == adapter.parameters == sum(each.numel() for each in load_file(packed / WEIGHTS).values())
    )
    assert release.dimensions == (32, 16, 8) and release.max_length == 512 and release.shape["hidden_size"] == 32
    assert (metadata(adapter_run)["base_model"], metadata(adapter_run)["base_model_relation"]) == (BASE, "adapter")
    assert f"| `adapter` | training of an adapter | [{BASE}]" in (packed / "README.md").read_text()

    examination = examine(packed)
    assert examination.faults == () and examination.notices == ()
    assert pack(adapter_run, "--base", BASE) == 0
    assert content_of(packed) == files
    loaded = SentenceTransformer(
        str(shutil.copytree(packed, packed.with_name("local"))), **_local(packed, adapter_base)
    )
    expected = SentenceTransformer(str(adapter_run / "model"), device="cpu").encode(sentences)
    assert (loaded.encode(sentences) == expected).all()
    bare = SentenceTransformer(str(adapter_base), device="cpu").encode(sentences)
    assert abs(loaded.encode(sentences) - bare).max() > 1e-3


def _local(packed: Path, base: Path) -> dict:
    """Names the base's folder in the copy: the library's own client has no cache here."""
    path = packed.with_name("local") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return {"device": "cpu"}


def test_what_cannot_be_checked_is_recorded_as_stated(adapter_run: Path) -> None:
    assert pack(adapter_run, "--base", BASE) == 0
    adapter = adapter_of(adapter_run)
    assert (adapter.match, adapter.base.revision, adapter.base_weights) == ("stated", None, None)
    packed = adapter_run.parent / "packed"
    assert "it was not checked" in (packed / "README.md").read_text()
    examination = examine(packed)
    told = [str(notice) for notice in examination.notices]
    assert examination.faults == () and len(told) == 2
    assert "not checked against its base org/tiny-base" in told[0] and "--base FOLDER" in told[0]
    assert "was stated, not checked" in told[1]


def test_a_base_that_was_rounded_is_told(adapter_run: Path, adapter_base: Path) -> None:
    cached = put_in_cache(adapter_base)
    change_weights(cached / "model.safetensors", lambda _, tensor: tensor.bfloat16())
    assert pack(adapter_run, "--base", BASE) == 0
    assert adapter_of(adapter_run).match == "rounded"
    assert "before these were rounded" in (adapter_run.parent / "packed/README.md").read_text()


def test_a_base_that_is_named_by_the_adapter_needs_no_option(adapter_run: Path, adapter_base: Path) -> None:
    put_in_cache(adapter_base)
    config = adapter_run / "model/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": BASE}))
    (adapter_run / "model/base_model.json").write_text(json.dumps({"name": BASE, "revision": COMMIT}))
    assert pack(adapter_run) == 0
    adapter = adapter_of(adapter_run)
    assert (adapter.base.name, adapter.base.revision, adapter.match) == (BASE, COMMIT, "trained")
    assert examine(adapter_run.parent / "packed", QUICK_FOR_ADAPTERS).notices == ()


def test_a_base_that_moved_is_known_by_its_digest(adapter_base: Path, tmp_path: Path, hub_cache: Path, capsys) -> None:
    moved = Path(shutil.copytree(adapter_base, tmp_path / "base"))
    run = train_adapter(tmp_path / "own", moved)
    cached = put_in_cache(moved)
    shutil.rmtree(moved)
    assert pack(run, "--base", BASE) == 0 and adapter_of(run).match == "same"
    change_weights(cached / "model.safetensors", lambda _, tensor: tensor.bfloat16())
    assert pack(run, "--base", BASE) == 2
    assert "no longer there to compare" in capsys.readouterr().err


def test_dora_rounded_and_a_checkpoint(adapter_base: Path, tmp_path: Path, hub_cache: Path) -> None:
    run = train_adapter(tmp_path / "dora", adapter_base, lora_dora=True)
    put_in_cache(adapter_base)
    checkpoint = next(run.glob("checkpoint-*")).name
    assert pack(run, "--base", BASE, "--dtype", "bfloat16", "--checkpoint", checkpoint) == 0
    packed = tmp_path / "dora/packed"
    assert {tensor.dtype for tensor in load_file(packed / WEIGHTS).values()} == {torch.bfloat16}
    assert adapter_of(run).dora and load_release(packed).stages[-1].name == f"run@{checkpoint}"
    assert "DoRA adapter" in (packed / "README.md").read_text()
    assert examine(packed, QUICK_FOR_ADAPTERS).faults == ()


def test_training_that_went_on_is_told_with_the_base(adapter_run: Path, adapter_base: Path, tmp_path: Path) -> None:
    run = train_adapter(tmp_path / "more", adapter_run / "model", lora_rank=None, max_steps=1)
    assert pack(run, "--base", BASE) == 0
    stages = load_release(tmp_path / "more/packed").stages
    assert [(stage.name, stage.kind) for stage in stages] == [("adapter", "adapter"), ("run", "adapter")]
    card = (tmp_path / "more/packed/README.md").read_text()
    assert f"| `adapter` | training of an adapter | [{BASE}]" in card


def test_a_merged_adapter_names_its_base(adapter_run: Path, adapter_base: Path, capsys) -> None:
    put_in_cache(adapter_base)
    assert merge([str(adapter_run / "model"), "--output", str(adapter_run / "merged")]) == 0
    assert pack(adapter_run, "--checkpoint", "merged") == 0
    adapter = adapter_of(adapter_run)
    assert (adapter.base.kind, adapter.base.name, adapter.merged, adapter.rank) == (
        "local",
        adapter_base.parent.name,
        True,
        4,
    )
    assert "base_model" not in metadata(adapter_run)
    assert "merged into them" in (adapter_run.parent / "packed/README.md").read_text()
    assert pack(adapter_run, "--checkpoint", "merged", "--base", BASE) == 0
    assert (metadata(adapter_run)["base_model"], metadata(adapter_run)["base_model_relation"]) == (BASE, "finetune")
    assert adapter_of(adapter_run).match == "same"
    assert pack(adapter_run, "--checkpoint", "merged", "--base", "base") == 2
    assert "ORG/NAME" in capsys.readouterr().err
    (adapter_run / "merged/adapter.json").write_text("{}")
    assert pack(adapter_run, "--checkpoint", "merged") == 2
    assert "adapter.json: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["folder of this machine", "--base ORG/NAME"]),
        (["--base", "tiny-base"], ["--base 'tiny-base'", "ORG/NAME"]),
        (["--base", "a/b/c"], ["--base 'a/b/c'", "ORG/NAME"]),
        (["--base", ""], ["--base ''", "ORG/NAME"]),
        (["--base", "org/a b"], ["no name on the Hub"]),
    ],
)
def test_a_base_without_a_name_is_refused(adapter_run: Path, capsys, words: list[str], parts: list[str]) -> None:
    assert pack(adapter_run, *words) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and all(part in told for part in parts), told
    assert not (adapter_run.parent / "packed").exists()


def test_a_folder_as_a_base_is_refused(adapter_run: Path, adapter_base: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(adapter_base.parent.parent)
    assert pack(adapter_run, "--base", f"{adapter_base.parent.name}/model") == 2
    assert "is no name on the Hub" in capsys.readouterr().err


def test_another_base_is_refused(
    adapter_run: Path, tmp_path: Path, tiny_config: F2LLMConfig, tiny_tokenizer, capsys
) -> None:
    save_model(tmp_path / "other", tiny_config, tiny_tokenizer, seed=7)
    save_model(tmp_path / "narrow", tiny_config, tiny_tokenizer, hidden_size=16, matryoshka_dimensions=[16])
    put_in_cache(tmp_path / "other", "org/other")
    put_in_cache(tmp_path / "narrow", "org/narrow")
    for name in ("org/other", "org/narrow"):
        assert pack(adapter_run, "--base", name) == 2
        told = capsys.readouterr().err
        assert f"--base {name}: " in told and "which" in told and "differs" in told
    # Nobody noted what it was trained on.
    (adapter_run / "model/base_model.json").unlink()
    assert pack(adapter_run, "--base", "org/narrow") == 2


def test_an_adapter_that_does_not_fit_is_refused(
    adapter_run: Path, tmp_path: Path, tiny_config: F2LLMConfig, tiny_tokenizer, capsys
) -> None:
    config = adapter_run / "model/adapter_config.json"
    for name, fields in {
        "narrow": {"hidden_size": 16, "matryoshka_dimensions": [16]},
        "flat": {"intermediate_size": 48},
    }.items():
        save_model(tmp_path / name, tiny_config, tiny_tokenizer, **fields)
        put_in_cache(tmp_path / name, f"org/{name}")
        written = {**json.loads(config.read_text()), "base_model_name_or_path": f"org/{name}"}
        config.write_text(json.dumps(written))
        assert pack(adapter_run) == 2
        assert "give the adapter's own" in capsys.readouterr().err


def test_a_base_is_of_no_use_to_a_whole_model(runs: Path, capsys) -> None:
    assert pack(runs / "pruned", "--base", BASE) == 2
    assert "is no adapter, nor was one merged into it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        (WEIGHTS, None, "damaged"),
        (WEIGHTS, b"x", "damaged"),
        ("adapter_config.json", b"{", "adapter_config.json: cannot be read"),
        ("adapter_config.json", b'{"base_model_name_or_path": null}', "does not say what it adapts"),
        ("tokenizer.json", None, "it lacks tokenizer.json"),
        ("1_Pooling/config.json", None, "it lacks 1_Pooling/config.json"),
        ("1_Pooling/config.json", b"{", "1_Pooling/config.json: cannot be read"),
        ("1_Pooling/config.json", b"[]", "cannot be read"),
        ("training_arguments.json", None, "training_arguments.json: cannot be read"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter_run: Path, capsys, name: str, content: bytes | None, part: str) -> None:
    path = adapter_run / "model" / name
    path.unlink() if content is None else path.write_bytes(content)
    assert pack(adapter_run, "--base", BASE) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and part in told, told
    assert not (adapter_run.parent / "packed").exists()


def test_weights_that_are_faulty_are_refused(adapter_run: Path, trained_adapter: Path, capsys) -> None:
    path, first = adapter_run / "model" / WEIGHTS, next(iter(load_file(trained_adapter / "model" / WEIGHTS)))
    for change, part in (
        (lambda name, tensor: tensor * torch.nan if name == first else tensor, f"weight {first} is NaN"),
        (lambda name, tensor: tensor.bfloat16() if name == first else tensor, "has weights of BF16, F32"),
        (lambda name, tensor: None if name == first else tensor, f"weight {first} is absent"),
        (lambda name, tensor: tensor[:1] if name == first else tensor, f"weight {first} is (1, "),
    ):
        shutil.copyfile(trained_adapter / "model" / WEIGHTS, path)
        change_weights(path, change)
        assert pack(adapter_run, "--base", BASE) == 2
        assert part in capsys.readouterr().err


def test_without_peft_the_extra_is_named(adapter_run: Path, adapter_base: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert pack(adapter_run, "--base", BASE) == 2
    assert "[train,lora]" in capsys.readouterr().err
