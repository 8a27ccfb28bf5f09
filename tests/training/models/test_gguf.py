from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.training.models.starts import edit_json, save_like_qwen3_embedding
from training.export import main
from training.models.gguf import export_gguf
from training.models.smaller import export_smaller

gguf = pytest.importorskip("gguf")

# llama.cpp's names.
_TENSORS = {
    **{"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm"},
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    **{f"self_attn.{name}_norm": f"attn_{name}_norm" for name in "qk"},
    **{"self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm"},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def _fields(reader):
    return {name: field.contents() for name, field in reader.fields.items()}


def _tensors(reader):
    return {
        each.name: torch.from_numpy(np.array(gguf.quants.dequantize(each.data, each.tensor_type)))
        for each in reader.tensors
    }


def _of_gguf(name):
    name = name.removesuffix(".weight")
    layer, _, rest = name.removeprefix("layers.").partition(".")
    return f"blk.{layer}.{_TENSORS[rest]}.weight" if name.startswith("layers.") else f"{_TENSORS[name]}.weight"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_tensor_is_read_back(folder, tmp_path, dtype):
    export_gguf(folder, tmp_path / "model.gguf", dtype)
    weights, read = load_file(folder / "model.safetensors"), _tensors(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert {_of_gguf(name) for name in weights} == set(read)
    stored = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, tensor in weights.items():
        expected = tensor if tensor.dim() == 1 else tensor.to(stored).float()
        assert torch.equal(read[_of_gguf(name)], expected), name
    kinds = {each.name: each.tensor_type.name.lower() for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == dtype and kinds["blk.1.attn_q_norm.weight"] == "f32"


def test_shape_pooling_and_tokenizer_are_read_back(folder, tmp_path, sentences):
    export_gguf(folder, tmp_path / "model.gguf", "f16")
    fields, config = _fields(gguf.GGUFReader(tmp_path / "model.gguf")), F2LLMConfig.from_pretrained(folder)
    expected = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": pytest.approx(config.rms_norm_eps),
        "rope.freq_base": pytest.approx(config.rope_parameters["rope_theta"]),
        "pooling_type": gguf.PoolingType.LAST,
    }
    assert fields["general.architecture"] == "qwen3"
    assert {key: fields[f"qwen3.{key}"] for key in expected} == expected
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert len(tokens) == len(types) == 416
    vocabulary = {**content["model"]["vocab"], **{each["content"]: each["id"] for each in content["added_tokens"]}}
    assert {token: tokens[index] for token, index in vocabulary.items()} == {token: token for token in vocabulary}
    assert tokens[-1] == "[PAD415]" and types[-1] == gguf.TokenType.UNUSED
    special = {index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL}
    assert special == {each["id"] for each in content["added_tokens"] if each["special"]}
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert fields["tokenizer.ggml.add_eos_token"] is True and fields["tokenizer.ggml.add_bos_token"] is False
    ids = tokenizer(sentences[0]).input_ids
    assert [tokens[index] for index in ids] == tokenizer.convert_ids_to_tokens(ids)


def test_one_token_before_a_text_is_exported_more_are_refused(folder, tmp_path, refuses):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]

    def put_before_text(*first):
        template = TemplateProcessing(single=[*first, "$A", "<|im_end|>"], special_tokens=known)
        tokenizer.backend_tokenizer.post_processor = template
        tokenizer.save_pretrained(folder)

    put_before_text("<|im_start|>")
    export_gguf(folder, tmp_path / "model.gguf")
    fields = _fields(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is True
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    put_before_text("<|im_start|>", "<|im_start|>")
    with refuses(folder, "before a text"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_the_command_writes_the_same_bytes_again_or_names_a_missing_package(folder, tmp_path, capsys, monkeypatch):
    words = [str(folder), "--backend", "gguf", "--output", str(tmp_path / "a.gguf"), "--dtype", "bf16"]
    assert main(words) == 0
    before = (tmp_path / "a.gguf").read_bytes()
    assert main(words) == 0 and (tmp_path / "a.gguf").read_bytes() == before
    assert main([*words, "--precision", "int8"]) == 2 and "--precision has no effect" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main([*words[:-3], str(tmp_path / "b.gguf")]) == 2 and "pip install 'f2llm[gguf]'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "model"]


@pytest.mark.parametrize(
    ("file", "change", "part"),
    [
        ("config.json", {"attention_bias": True}, "attention_bias is True"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("config.json", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}, "is 'linear'"),
        ("1_Pooling/config.json", {"pooling_mode": "mean"}, "only the last token's"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "does not split texts as Qwen2's"),
        ("tokenizer.json", {"post_processor": None}, "appends no EOS token"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(folder, tmp_path, refuses, file, change, part):
    edit_json(folder / file, **change)
    with refuses(folder, part):
        export_gguf(folder, tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_factors_without_their_product_are_refused(folder, tmp_path, refuses):
    model = F2LLMModel.from_pretrained(folder)
    model.factorize_embeddings([8])
    model.save_pretrained(folder)
    export_gguf(folder, tmp_path / "whole.gguf")
    export_smaller(folder, tmp_path / "factors", rank=8)
    with refuses(tmp_path / "factors", "two factors"):
        export_gguf(tmp_path / "factors", tmp_path / "model.gguf")


def test_another_end_of_texts_is_kept_and_a_module_after_pooling_refused(
    tmp_path, tiny_config, tiny_tokenizer, refuses
):
    start = save_like_qwen3_embedding(tmp_path, tiny_config, tiny_tokenizer)
    export_gguf(start, tmp_path / "model.gguf")
    fields = _fields(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert fields["tokenizer.ggml.eos_token_id"] == tiny_tokenizer.pad_token_id
    assert fields["tokenizer.ggml.add_eos_token"] is True
    start = save_like_qwen3_embedding(tmp_path / "dense", tiny_config, tiny_tokenizer, dense=True)
    with refuses(start, "has the module Dense after pooling; only the last token's"):
        export_gguf(start, tmp_path / "model.gguf")


def test_other_tensors_and_too_large_weights_leave_the_old_file(folder, tmp_path, refuses):
    export_gguf(folder, tmp_path / "model.gguf", "f16")
    before = (tmp_path / "model.gguf").read_bytes()
    whole = load_file(folder / "model.safetensors")
    for changed, part in (
        ({**whole, "embed_tokens.weight": whole["embed_tokens.weight"] * 1e8}, "embed_tokens.weight is not finite in"),
        ({**whole, "lm_head.weight": torch.ones(416, 32)}, "lm_head.weight"),
        ({name: each for name, each in whole.items() if name != "norm.weight"}, "norm.weight"),
    ):
        save_file(changed, folder / "model.safetensors")
        with refuses(part):
            export_gguf(folder, tmp_path / "model.gguf", "f16")
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]
