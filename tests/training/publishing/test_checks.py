"""Faults of settings, files, weights, remote code and the card, whose own code is run; of an adapter and its base."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.training.publishing.packed import BASE, BrokenRelease, change_weights
from training.publish import main
from training.publishing.checks import card
from training.publishing.checks.files import PackedFolder
from training.publishing.pack import PackOptions, pack
from training.publishing.verify import examine

WEIGHTS, ADAPTER, CARD = "model.safetensors", "adapter_config.json", "README.md"
CONFIG, RECORD, MODULES, POOLING = "config.json", "release.json", "modules.json", "1_Pooling/config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCES, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
NEW_POOLING = {"embedding_dimension": 32, "pooling_mode": "lasttoken", "include_prompt": True}
OTHER_END = {"eos_token": "<|im_start|>", "additional_special_tokens": ["<|im_end|>"]}
LINEAR = {"rope_type": "linear", "factor": 2.0}
NOWHERE = "sentence_transformers.models.nowhere.Normalize"


def keys(file, **changed):
    return lambda broken: broken.edit(file, **changed)


def change(file, function):
    return lambda broken: broken.edit(file, function)


def weights(function):
    return lambda broken: broken.edit_weights(function)


def template(tokenizer):
    processor = tokenizer["post_processor"]
    return next(each for each in processor.get("processors", [processor]) if each["type"] == "TemplateProcessing")


def single(tokenizer):
    return template(tokenizer)["single"]


def text(old, new):
    return lambda broken: broken.replace(CARD, old, new)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (keys(CONFIG, architectures=["Qwen3ForCausalLM"]), "config.json: architectures is ['Qwen3ForCausalLM'], not"),
        (keys(CONFIG, max_window_layers=28), "config.json: max_window_layers is 28, not 2"),
        (keys(CONFIG, is_matryoshka=...), "config.json: is_matryoshka is None, not True"),
        (keys(CONFIG, rope_theta=...), "config.json: does not have the form that older libraries"),
        (change(CONFIG, lambda each: each["rope_parameters"].update(LINEAR)), "config.json: rope_parameters is {"),
        (change(RECORD, lambda each: each["shape"].update(num_hidden_layers=3)), "release.json: shape is {"),
        (keys(TRANSFORMER, max_seq_length=7), "sentence_bert_config.json: does not have the form"),
        (keys(POOLING, word_embedding_dimension=64), f"{POOLING}: word_embedding_dimension is 64, not 32"),
        (keys(POOLING, include_prompt=False), f"{POOLING}: include_prompt is False, not True"),
        (change(MODULES, lambda modules: modules.pop()), "modules.json: does not normalise"),
        (
            change(MODULES, lambda modules: modules[2].update(type="x.Normalize")),
            "modules.json: does not have the form",
        ),
        (change(MODULES, lambda modules: modules[2].update(path="3_Normalize")), "it lacks 3_Normalize"),
        (keys(SENTENCES, prompts={}), "but the files give {}"),
        (keys(SENTENCES, default_prompt_name="query"), f"{SENTENCES}: default_prompt_name is 'query', not None"),
        (keys(SENTENCES, similarity_fn_name="dot"), f"{SENTENCES}: similarity_fn_name is 'dot', not 'cosine'"),
        (change(TOKENIZER, lambda each: single(each).append(single(each)[-1])), "tokenizer.json: appends EOS 2 times"),
        (
            change(TOKENIZER, lambda each: template(each)["pair"].pop(1)),
            "tokenizer.json: does not end each text of a pair with EOS",
        ),
        (keys(TOKENIZER_CONFIG, pad_token="<|im_end|>"), "config.json: pad_token_id is 0, but the tokenizer's is 1"),
        (keys(TOKENIZER_CONFIG, pad_token=...), f"{TOKENIZER_CONFIG}: names no padding token"),
        (keys(TOKENIZER_CONFIG, padding_side="left"), f"{TOKENIZER_CONFIG}: padding_side is 'left'"),
    ],
)
def test_a_fault(broken, edit, said):
    edit(broken)
    (fault,) = broken.faults()
    assert said in fault


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (keys(CONFIG, matryoshka_dimensions=[32, 8]), "config.json: matryoshka_dimensions is [32, 8], not [32, 16, 8]"),
        (keys(CONFIG, dtype="bfloat16"), "config.json: dtype is 'bfloat16', not 'float32'"),
        (keys(CONFIG, model_type="f2llm"), "config.json: model_type is 'f2llm', not 'qwen3'"),
        (keys(CONFIG, head_dim=...), "the configuration wants"),
        (keys(TOKENIZER_CONFIG, model_max_length=513), "sentence_bert_config.json: does not have the form"),
        (keys(POOLING, pooling_mode_mean_tokens=True), "modules.json: is pooled by"),
        (keys(CONFIG, eos_token_id=[1, 2]), "config.json: eos_token_id is [1, 2], but the tokenizer's is 1"),
        (keys(CONFIG, vocab_size=100), "but the model 100 embeddings"),
        (keys(TOKENIZER, post_processor=None), "tokenizer.json: appends EOS 0 times to a text, not once; "),
        (keys(TOKENIZER, model={"type": "nonsense"}), "tokenizer.json: is not a tokenizer"),
        (keys(TOKENIZER, normalizer={"type": "Lowercase"}), "library disagree on 'Where"),
        (keys(CONFIG, auto_map=...), "config.json: auto_map is None, not"),
        (weights(lambda all: all.pop("norm.weight")), "norm.weight is absent, the configuration wants (32,)"),
        (
            weights(lambda all: all.update({name: each.bfloat16() for name, each in all.items()})),
            "release.json: dtype is float32",
        ),
        (text("library_name: sentence-transformers", "library_name: f2llm"), "library_name of the header is 'f2llm'"),
        (text("license: apache-2.0", "license: mit"), "README.md: license of the header is 'mit'"),
        (text("\n- sentence-transformers\n", "\n"), "README.md: tags of the header is ["),
        (text("library_name: ", "broken: [\nlibrary_name: "), "README.md: has a header that the Hub cannot read"),
    ],
)
def test_a_fault_among_others(broken, edit, said):
    edit(broken)
    assert any(said in fault for fault in broken.faults()), broken.faults()


def test_settings_of_new_libraries_alone(broken):
    broken.edit(POOLING, lambda content: (content.clear(), content.update(NEW_POOLING)))
    name = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
    broken.edit(MODULES, lambda modules: modules[1].update(type=name))
    broken.edit(TRANSFORMER, lambda content: content.clear())
    broken.edit(TOKENIZER_CONFIG, additional_special_tokens=..., extra_special_tokens=["<|im_start|>"])
    faults = broken.faults()
    assert {fault.partition(":")[0] for fault in faults} == {POOLING, MODULES, TRANSFORMER, TOKENIZER_CONFIG}


def test_texts_may_end_with_another_token_than_eos(broken):
    """As those of a model that was started from Qwen3-Embedding."""
    broken.edit(TOKENIZER_CONFIG, **OTHER_END)
    assert not [fault for fault in broken.faults() if "EOS" in fault or "eos_token_id" in fault]
    broken.edit(CONFIG, eos_token_id=0)
    assert any("eos_token_id is 0, but the tokenizer's is 2" in fault for fault in broken.faults())


def test_padding_with_eos_and_another_vocabulary_are_no_fault(broken):
    broken.edit(TOKENIZER_CONFIG, pad_token="<|im_end|>")
    broken.edit(CONFIG, pad_token_id=1)
    broken.expect()
    (notice,) = broken.examine().notices
    assert notice.file == TOKENIZER and "llama.cpp" in str(notice)


# Files, and an adapter with its base


def test_files_that_do_not_belong(broken):
    unwanted = dict.fromkeys((".DS_Store", ".cache/x"), "does not belong in a release")
    unwanted |= dict.fromkeys(("pytorch_model.bin", "rng.pth", "cache/texts.pkl"), "is not safetensors: ")
    for name in unwanted:
        broken.write(name, b"cos\nsystem\n")
    faults = broken.faults()
    assert all(any(fault.startswith(f"{name}: {said}") for fault in faults) for name, said in unwanted.items()), faults


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


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (keys(ADAPTER, base_model_name_or_path="org/other"), f"is 'org/other', not '{BASE}'"),
        (keys(ADAPTER, lora_alpha=99), "its alpha is 8, but adapter_config.json has 99"),
        (keys(ADAPTER, r=5), "its base wants"),
        (keys(ADAPTER, target_modules=["nothing"]), "the adapter does not fit its base"),
        (keys(ADAPTER, use_dora=True), "lora_magnitude_vector"),
        (keys(ADAPTER, peft_type="NOTHING"), "the adapter does not fit its base"),
        (keys(TOKENIZER_CONFIG, pad_token="a"), "tokenizer_config.json: pad_token_id is 0"),
        (keys(RECORD, adapter=None), f"{RECORD}: has no adapter"),
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


# The code of the card


def example_faults(folder):
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
    first, second = example_faults(broken.folder)
    assert "the example sentence-transformers fails" in first and "modeling_f2llm" in first
    assert "the example remote-code fails" in second and "no network" in second


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

    assert example_faults(folder) == []
    monkeypatch.setattr(card, "_run", nudged)
    faults = example_faults(folder)
    assert faults and all("the example remote-code differs from transformers" in fault for fault in faults)
