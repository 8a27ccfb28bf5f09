"""Weights on disk are read tensor by tensor or refused; settings are rewritten for older readers."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from training.models.model_folder import WeightFiles, write_for_older_readers


def _save(folder, index=None, **tensors):
    folder.mkdir(exist_ok=True)
    files = index or dict.fromkeys(tensors, "model.safetensors")
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_one_file_and_shards_read_the_same(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    for folder, index in (("one", None), ("two", {"a": "x.safetensors", "b": "y.safetensors"})):
        _save(tmp_path / folder, index, **tensors)
        weights = WeightFiles(tmp_path / folder)
        assert list(weights.tensors.items()) == [("a", ((2,), torch.bfloat16)), ("b", ((2, 3), torch.float32))]
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())


def test_unreadable_weights_and_an_index_that_promises_too_much_are_refused(tmp_path, refuses):
    with refuses(tmp_path, "holds no weights as safetensors"):
        WeightFiles(tmp_path)
    _save(tmp_path, a=torch.ones(2, dtype=torch.int8))
    with refuses("a holds I8", "floating-point"):
        WeightFiles(tmp_path)
    _save(tmp_path / "shards", {"a": "x.safetensors"}, a=torch.ones(2))
    for content, part in (
        ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}', "lack b"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: not a readable"),
        ("{", "damaged"),
    ):
        (tmp_path / "shards/model.safetensors.index.json").write_text(content)
        with refuses(tmp_path / "shards", part):
            WeightFiles(tmp_path / "shards")


def test_older_and_new_readers_read_the_same(folder, sentences):
    before, rotary = SentenceTransformer(str(folder), device="cpu"), AutoConfig.from_pretrained(folder).rope_parameters
    write_for_older_readers(folder)
    after = SentenceTransformer(str(folder), device="cpu")
    assert (after.encode(sentences) == before.encode(sentences)).all()
    assert (
        after.max_seq_length == before.max_seq_length and AutoConfig.from_pretrained(folder).rope_parameters == rotary
    )
    files = {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in folder.rglob("*.json")}
    assert files["config.json"]["rope_theta"] == rotary["rope_theta"]
    modules = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")]
    assert [module["type"] for module in files["modules.json"]] == modules
    pooling, tokenizer = files["1_Pooling/config.json"], files["tokenizer_config.json"]
    assert pooling["word_embedding_dimension"] == files["config.json"]["hidden_size"]
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_lasttoken", "include_prompt"]
    assert "extra_special_tokens" not in tokenizer and tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    length = tokenizer["model_max_length"]
    assert files["sentence_bert_config.json"] == {"max_seq_length": length, "do_lower_case": False}
    # A second time, nothing changes.
    content = {path: path.read_bytes() for path in folder.rglob("*.json")}
    write_for_older_readers(folder)
    assert content == {path: path.read_bytes() for path in folder.rglob("*.json")}
