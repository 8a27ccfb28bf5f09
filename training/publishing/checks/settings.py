"""Checks of the settings: configuration, modules, tokenizer, and what servers and older libraries are known to read.

No server is run here. Sources on what they read, as of 2026:

- text-embeddings-inference: ``backends/candle/src/models/qwen3.rs`` (``Qwen3Config``: the fields of ``config.json``, of
  which ``rope_theta`` had to stand at the top until ``rope_parameters`` was read too; one EOS id; no sliding window, no
  scaled rotary embedding) and ``router/src/lib.rs`` (``PoolConfig``: the flags of ``1_Pooling/config.json``, until
  ``pooling_mode`` was read too; ``STConfig``: ``max_seq_length``; ``NewSTConfig``: prompts by name).
- vLLM: ``vllm/transformers_utils/config.py`` (``get_pooling_config``, ``get_sentence_transformer_tokenizer_config``)
  and ``docs/models/pooling_models.md`` (a class that ends in ``Model`` embeds; ``is_matryoshka`` and
  ``matryoshka_dimensions``). Before version 0.24 it ran on transformers 4, which knows ``rope_theta`` alone and takes
  10000 where it is missing: other embeddings, and no error.
- llama.cpp: ``conversion/qwen.py`` (``Qwen3Model``), ``conversion/base.py`` (``_try_set_pooling_type`` looks for the
  module ``sentence_transformers.models.Pooling`` and its flags; ``get_vocab_base_pre`` knows pre-tokenizers by the
  tokens that they make of a text) and ``gguf-py/gguf/vocab.py`` (EOS is added if the post-processor is a template that
  ends with it).

Older releases of all three are in use, so the checks require what these need, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3Config

from modeling_f2llm import F2LLMConfig
from training.common.errors import UserError
from training.common.outputs import temporary_folder
from training.models.model_folder import load_json, user_error
from training.publishing.checks.files import REPACK, Finding, PackedFolder
from training.publishing.model_files import (
    CONFIG,
    MODULES,
    SENTENCE_TRANSFORMERS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    copy_model_files,
    why_not_packed,
)

_POOLING = "1_Pooling/config.json"
_APPEND = "let append_eos of modeling_f2llm set its post-processor and save it again"
# Ids of Qwen3's tokenizer, and so of the published models'.
_QWEN = {"<|endoftext|>": 151643, "<|im_end|>": 151645}
_TEXTS = ("a", "Where do pandas live?", "大熊猫生活在四川的山林里。", "تعيش الباندا في الغابات", "")
# Tokens to truncate to, and a text that is longer.
_SHORT = 8
_LONG_TEXT = "pandas live in the mountains " * _SHORT


def check_configuration(packed: PackedFolder) -> Iterator[Finding]:
    """``config.json`` has what servers and all versions of transformers read; both configuration classes accept it."""
    config, release = packed.json(CONFIG), packed.release
    layers, rope = config["num_hidden_layers"], config.get("rope_parameters") or {}
    wanted: dict[str, Any] = {
        **{"model_type": "qwen3", "architectures": ["Qwen3Model"], "dtype": release.dtype},
        # Servers compute Qwen3 as it was published.
        **{"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
        **{"layer_types": ["full_attention"] * layers, "max_window_layers": min(config["max_window_layers"], layers)},
        # text-embeddings-inference knows no other type.
        "rope_parameters": {"rope_theta": rope.get("rope_theta", 1e6), "rope_type": "default"},
    }
    if len(release.dimensions) > 1:
        # vLLM refuses to truncate otherwise, and servers truncate to these only.
        wanted |= {"is_matryoshka": True, "matryoshka_dimensions": list(release.dimensions)}
    yield from _differences(packed, CONFIG, wanted)
    for kind in (Qwen3Config, F2LLMConfig):
        with user_error(f"{CONFIG}: {kind.__name__} refuses it", REPACK):
            kind.from_pretrained(packed.path, local_files_only=True).validate()


def _differences(packed: PackedFolder, file: str, wanted: dict[str, Any]) -> Iterator[Finding]:
    table = packed.json(file)
    for key, value in wanted.items():
        if table.get(key) != value:
            yield Finding(file, f"{key} is {table.get(key)!r}, not {value!r}")


def check_modules(packed: PackedFolder) -> Iterator[Finding]:
    """Transformer, last-token pooling with the instruction, normalisation and cosine similarity."""
    if wrong := why_not_packed(packed.path):
        yield Finding(MODULES, wrong)
    width = packed.release.dimension
    yield from _differences(packed, _POOLING, {"include_prompt": True, "word_embedding_dimension": width})
    # A default prompt would be put before documents, too.
    wanted = {"default_prompt_name": None, "similarity_fn_name": "cosine"}
    yield from _differences(packed, SENTENCE_TRANSFORMERS, wanted)


def check_form(packed: PackedFolder) -> Iterator[Finding]:
    """All settings have the form that older libraries and servers read: packing them again changes nothing."""
    with temporary_folder() as temporary:
        again = Path(temporary)
        copy_model_files(packed.model, again, packed.release.dtype)
        for path in sorted(again.rglob("*.json")):
            name = path.relative_to(again).as_posix()
            if packed.json(name) != load_json(path):
                yield Finding(name, "does not have the form that older libraries and servers read")


# The token that ends a text is EOS, or another one that the model was started with: Qwen3-Embedding appends
# ``<|endoftext|>``. A text that already ends with it gets a second one from either library; the last token is the same.


def check_eos(packed: PackedFolder) -> Iterator[Finding]:
    """The ``tokenizers`` library alone appends one token, also to each text of a pair and after truncation."""
    tokenizer = _tokenizer(packed)
    if _id(packed, tokenizer, "eos_token") is None:
        raise UserError(f"{TOKENIZER_CONFIG}: names no EOS token that tokenizer.json has", _APPEND)
    end, encoded = _end(packed, tokenizer), [tokenizer.encode(text).ids for text in _TEXTS]
    for ids in encoded:
        count = next((number for number, token in enumerate(reversed(ids)) if token != end), len(ids))
        if count != 1:
            raise UserError(f"{TOKENIZER}: appends EOS {count} times to a text, not once", _APPEND)
    if tokenizer.encode(*_TEXTS[:2]).ids != encoded[0] + encoded[1]:
        yield Finding(TOKENIZER, "does not end each text of a pair with EOS", _APPEND)
    tokenizer.enable_truncation(_SHORT)
    if tokenizer.encode(_LONG_TEXT).ids[_SHORT - 1 :] != [end]:
        yield Finding(TOKENIZER, "loses EOS when it truncates", _APPEND)


def check_auto_tokenizer(packed: PackedFolder) -> Iterator[Finding]:
    """transformers gives the same ids, and pads and truncates on the right."""
    plain = _tokenizer(packed)
    with user_error(f"{TOKENIZER_CONFIG}: AutoTokenizer cannot load it", REPACK):
        loaded = AutoTokenizer.from_pretrained(packed.path, local_files_only=True, trust_remote_code=False)
    for text in (*_TEXTS, f"a{loaded.eos_token or ''}"):
        if loaded(text).input_ids != plain.encode(text).ids:
            wrong = f"{TOKENIZER_CONFIG}: AutoTokenizer and the tokenizers library disagree on {text!r}"
            raise UserError(wrong, "save both files from one tokenizer")
    for name in ("padding_side", "truncation_side"):
        if getattr(loaded, name) != "right":
            yield Finding(TOKENIZER_CONFIG, f"{name} is {getattr(loaded, name)!r}", "set it to 'right'")


def check_special_tokens(packed: PackedFolder) -> Iterator[Finding]:
    """There is a padding token, the configuration has the ids of padding and EOS, and every token has an embedding.

    Padding and EOS may be the same token, since the attention mask marks padding; the configuration's EOS may be what
    ends a text.
    """
    tokenizer, config = _tokenizer(packed), packed.config
    ids = {name: _id(packed, tokenizer, name) for name in ("pad_token", "eos_token")}
    if ids["pad_token"] is None:
        yield Finding(TOKENIZER_CONFIG, "names no padding token that tokenizer.json has", "set pad_token")
    if config is None:
        return
    for name, own in ids.items():
        given = config.get(f"{name}_id")
        if own is not None and given != own and not (name == "eos_token" and given == _end(packed, tokenizer)):
            file = TOKENIZER_CONFIG if packed.is_adapter else CONFIG
            yield Finding(file, f"{name}_id is {given!r}, but the tokenizer's is {own}", f"set it to {own}")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= config["vocab_size"]:
        wrong = f"has token {highest}, but the model {config['vocab_size']} embeddings"
        yield Finding(TOKENIZER, wrong, "pack the tokenizer that the model was trained with")


def check_llama_cpp(packed: PackedFolder) -> Iterator[Finding]:
    """llama.cpp's converter sees that a token is appended, which it takes for EOS, and knows the pre-tokenizer."""
    tokenizer = packed.json(TOKENIZER)
    post = tokenizer.get("post_processor") or {}
    templates = [each for each in post.get("processors", [post]) if each.get("type") == "TemplateProcessing"]
    if not any((template.get("single") or [{}])[-1].get("SpecialToken") for template in templates):
        wrong = "the post-processor is not a template that ends with a token: llama.cpp's converter would add none"
        yield Finding(TOKENIZER, wrong, _APPEND)
    if tokenizer["model"]["type"] != "BPE":
        yield Finding(TOKENIZER, "is not a BPE tokenizer: llama.cpp reads Qwen3 with one only")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if any(ids.get(content) != number for content, number in _QWEN.items()):
        wrong = "is another vocabulary than Qwen3's: llama.cpp's converter will not recognise its pre-tokenizer"
        yield Finding(TOKENIZER, wrong, "convert it with training/export.py --backend gguf", fault=False)


def _tokenizer(packed: PackedFolder) -> Tokenizer:
    with user_error(f"{TOKENIZER}: is not a tokenizer", REPACK):
        tokenizer = Tokenizer.from_file(str(packed.path / TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _id(packed: PackedFolder, tokenizer: Tokenizer, name: str) -> int | None:
    """Id of a special token that ``tokenizer_config.json`` names, as text or as a described token."""
    token = packed.json(TOKENIZER_CONFIG).get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _end(packed: PackedFolder, tokenizer: Tokenizer) -> int | None:
    """Id of the token that the tokenizer puts after a text; that of EOS if it puts none."""
    ids, bare = (tokenizer.encode(_TEXTS[0], add_special_tokens=special).ids for special in (True, False))
    return _id(packed, tokenizer, "eos_token") if ids[len(ids) - len(bare) :] == bare else ids[-1]
