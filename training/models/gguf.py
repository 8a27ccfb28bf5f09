"""Write a model as a GGUF file, which llama.cpp reads.

Names and values are those of llama.cpp's converter (ggml-org/llama.cpp, ``conversion/qwen.py`` and ``base.py``), which
takes known tokenizers only; this one takes any byte-level BPE tokenizer that splits texts as Qwen2's does.
"""

from __future__ import annotations

import json
import logging
import math
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from modeling_f2llm.configuration_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.outputs import check_output, locked, whole_file
from training.models.model_folder import EMBEDDINGS, WeightFiles, check_tokenizer_file, user_error, wrong_weight
from training.models.model_ref import why_not_last_token

GGUF_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# What llama.cpp's Qwen3 assumes, by key of the configuration.
_ASSUMED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False, "rope_type": "default"}


def export_gguf(folder: Path, output: Path, dtype: str = "f16") -> None:
    """Write a model's shape, pooling, tokenizer and tensors into one file, which replaces an existing GGUF file.

    Matrices are written in ``f32``, ``f16`` or ``bf16``; vectors are always fp32, as llama.cpp needs them. A model for
    which llama.cpp would compute other embeddings is refused.
    """
    check_output(output, [folder])
    if output.exists() and not _is_gguf(output):
        raise UserError(f"{output}: exists and is not a GGUF file; give another --output")
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file needs the package gguf; pip install 'f2llm[gguf]'") from None
    weights = WeightFiles(folder)
    config, tokenizer = _read(folder)
    if (wrong := wrong_weight(weights.shapes, config)) is not None:
        raise UserError(f"{folder}: {wrong}; name the folder of a whole embedding model")
    if EMBEDDINGS not in weights.shapes:
        raise UserError(f"{folder}: its token embeddings are two factors; export the model that it was taken from")
    writer = gguf.GGUFWriter(None, "qwen3")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(output.stem)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
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
    _add_tokenizer(writer, gguf, folder, tokenizer, config.vocab_size)
    # The map has the names of Qwen3ForCausalLM, in which the embedding model is "model".
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    kinds = {name: dtype if len(shape) > 1 else "f32" for name, shape in weights.shapes.items()}
    for name, kind in kinds.items():
        shape, known = weights.shapes[name], names.get_name(f"model.{name}", (".weight",))
        size = math.prod(shape) * GGUF_DTYPES[kind].itemsize
        # The kind says what is stored, for numpy has no bfloat16.
        writer.add_tensor_info(known, shape, None, size, gguf.GGMLQuantizationType[kind.upper()])
    with locked(output), whole_file(output) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in kinds.items():
            tensor = weights.read(name).to(GGUF_DTYPES[kind])
            if not tensor.isfinite().all():
                raise UserError(f"{folder}: {name} is not finite in {kind}; choose another --dtype")
            writer.write_tensor_data((tensor.view(torch.int16) if kind == "bf16" else tensor).numpy())
        writer.close()
    logging.getLogger("training").info("%s: %d tensors, matrices in %s", output, len(kinds), dtype)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _read(folder: Path) -> tuple[F2LLMConfig, dict[str, Any]]:
    check_tokenizer_file(folder)
    with user_error(f"{folder}: not an F2LLM model", "name the folder of a whole model"):
        config = F2LLMConfig.from_pretrained(folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    has = {**config.to_dict(), **config.rope_parameters}
    if wrong := [key for key, assumed in _ASSUMED.items() if has[key] != assumed]:
        raise UserError(f"{folder}: {wrong[0]} is {has[wrong[0]]!r}; llama.cpp's Qwen3 needs {_ASSUMED[wrong[0]]!r}")
    if (other := why_not_last_token(str(folder))) is not None:
        raise UserError(f"{folder}: {other}; only the last token's embedding can be exported")
    return config, tokenizer


def _add_tokenizer(writer: Any, gguf: Any, folder: Path, content: dict[str, Any], vocab_size: int) -> None:
    steps = (content["pre_tokenizer"] or {}).get("pretokenizers", ())
    if [each.get("pattern") for each in steps] != [{"Regex": PRETOKENIZE_REGEX}, None]:
        raise UserError(f"{folder}: its tokenizer does not split texts as Qwen2's does, which llama.cpp would do")
    special = gguf.SpecialVocab(folder, load_merges=True)
    if not special.add_special_token.get("eos"):
        raise UserError(f"{folder}: its tokenizer appends no EOS token, where the embedding is read; see append_eos")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    text = tokenizer.encode("a")
    before = text.ids[: sum(takewhile(bool, text.special_tokens_mask))]
    if before and before != [special.special_token_ids.get("bos")]:
        raise UserError(
            f"{folder}: its tokenizer puts tokens {before} before a text; llama.cpp puts bos_token alone there"
        )
    special.add_special_token["bos"] = bool(before)
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [gguf.TokenType.UNUSED] * vocab_size
    for token, index in content["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)
