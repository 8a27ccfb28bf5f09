"""Writes a model as a GGUF file, which llama.cpp reads.

Names and values are those of llama.cpp's converter (ggml-org/llama.cpp, ``conversion/qwen.py`` and ``base.py``), which
takes known tokenizers only; this one takes any byte-level BPE tokenizer that splits texts as Qwen2's does.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.data.command import run_command
from training.errors import UserError, in_one_line
from training.weight_files import WeightFiles

__all__ = ["export", "main"]

# What is stored, and the numpy dtype of its bits: numpy has no bfloat16.
_KINDS = {"f32": (torch.float32, "float32"), "f16": (torch.float16, "float16"), "bf16": (torch.bfloat16, "int16")}
# What llama.cpp's Qwen3 takes for granted, by key of config.json.
_GRANTED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}


def export(folder: Path, output: Path, dtype: str = "f16") -> int:
    """Writes a model's shape, pooling, tokenizer and tensors into one file, and returns the number of tensors.

    Args:
        folder: Of the model, as a stage or a release leaves it.
        output: The file; what is there is replaced when the new one is whole.
        dtype: Of the matrices: ``f32``, ``f16`` or ``bf16``. Vectors are always fp32, as llama.cpp wants them.

    Raises:
        UserError: If llama.cpp would compute something else than this model does, or ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file needs the package gguf; pip install 'f2llm[gguf]'") from None
    weights, config = WeightFiles(folder), _config(folder)
    writer = gguf.GGUFWriter(None, "qwen3")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(output.stem)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_pooling_type(gguf.PoolingType.LAST)
    _add_tokenizer(writer, gguf, folder, config.vocab_size)
    kinds = {name: dtype if len(info.shape) > 1 else "f32" for name, info in weights.tensors.items()}
    for name, known in _tensor_names(gguf, weights, config.num_hidden_layers).items():
        shape, bits = weights.tensors[name].shape, np.dtype(_KINDS[kinds[name]][1])
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        writer.add_tensor_info(known, shape, bits, math.prod(shape) * bits.itemsize, kind)

    partial = output.with_name(f".{output.name}.partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            writer.write_tensor_data(_array(weights, name, kind))
        writer.close()
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
    return len(kinds)


def _config(folder: Path) -> F2LLMConfig:
    try:
        config = F2LLMConfig.from_pretrained(folder)
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    # The library's checks raise errors of their own.
    except Exception as error:
        raise UserError(f"{folder}: no F2LLM model ({in_one_line(error)}); name the folder of a whole model") from None
    has = {key: getattr(config, key) for key in _GRANTED} | {"rope_type": config.rope_parameters.get("rope_type")}
    # The second key is that of sentence-transformers before version 5.4.
    has["pooling_mode"] = pooling.get("pooling_mode") or (pooling.get("pooling_mode_lasttoken") and "lasttoken")
    for key, granted in {**_GRANTED, "rope_type": "default", "pooling_mode": "lasttoken"}.items():
        if has[key] != granted:
            raise UserError(f"{folder}: {key} is {has[key]!r}; llama.cpp's Qwen3 embeddings need {granted!r}")
    return config


def _add_tokenizer(writer: Any, gguf: Any, folder: Path, vocab_size: int) -> None:
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        split, byte_level = content["pre_tokenizer"]["pretokenizers"]
        vocabulary = {index: token for token, index in content["model"]["vocab"].items()}
        as_qwen2 = split["pattern"]["Regex"] == PRETOKENIZE_REGEX and byte_level["type"] == "ByteLevel"
    except (OSError, ValueError, KeyError, TypeError):
        as_qwen2 = False
    if not as_qwen2:
        raise UserError(f"{folder}: its tokenizer does not split texts as Qwen2's does, which llama.cpp would do")
    special = gguf.SpecialVocab(folder, load_merges=True)
    if not special.add_special_token.get("eos"):
        raise UserError(f"{folder}: its tokenizer appends no EOS token, where the embedding is read; see append_eos")
    special.add_special_token["bos"] = False
    tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [gguf.TokenType.NORMAL if index in vocabulary else gguf.TokenType.UNUSED for index in range(vocab_size)]
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _tensor_names(gguf: Any, weights: WeightFiles, layers: int) -> dict[str, str]:
    # The map has the names of Qwen3ForCausalLM, in which the embedding model is "model".
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    known = {name: names.get_name(f"model.{name}", (".weight",)) or name for name in weights.tensors}
    kinds = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3]) - {gguf.MODEL_TENSOR.OUTPUT, gguf.MODEL_TENSOR.ROPE_FREQS}
    expected = {f"{gguf.TENSOR_NAMES[kind].format(bid=layer)}.weight" for kind in kinds for layer in range(layers)}
    if wrong := sorted(expected ^ set(known.values())):
        raise UserError(
            f"{weights.folder}: not the tensors of a Qwen3 embedding model; {wrong[0]} is missing or too many"
        )
    return known


def _array(weights: WeightFiles, name: str, kind: str) -> np.ndarray:
    tensor = weights.read(name).to(_KINDS[kind][0])
    if not tensor.isfinite().all():
        raise UserError(f"{weights.folder}: {name} is not finite in {kind}; choose another --dtype")
    return (tensor.view(torch.int16) if kind == "bf16" else tensor).numpy()


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.data.command.run_command` has it."""
    parser = argparse.ArgumentParser(prog="export_gguf.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="folder of the model")
    parser.add_argument("--output", type=Path, required=True, help="the file to be written")
    parser.add_argument("--dtype", choices=list(_KINDS), default="f16", help="of the matrices (%(default)s)")
    arguments = parser.parse_args(words)

    def work() -> None:
        tensors = export(arguments.folder, arguments.output, arguments.dtype)
        sys.stdout.write(f"{arguments.output}: {tensors} tensors, matrices in {arguments.dtype}\n")

    return run_command(work)


if __name__ == "__main__":
    raise SystemExit(main())
