"""What text-embeddings-inference, vLLM and llama.cpp are documented to need. None of them is run here.

Sources, as of 2026:

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

Older releases of all three are in use, so what they need is asked for beside what new ones read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from training.publishing.checks.packed import (
    CONFIG,
    MODULES,
    SENTENCE_TRANSFORMERS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TRANSFORMER_MODULE,
    Finding,
    PackedFolder,
)

_REPACK = "pack the run again"
_INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "eos_token_id", "pad_token_id"),
)
# Which ids the tokenizer of Qwen3 has, and with it the published models.
_QWEN = {"<|endoftext|>": 151643, "<|im_end|>": 151645}


def check_text_embeddings_inference(packed: PackedFolder) -> Iterator[Finding]:
    """text-embeddings-inference parses ``config.json`` into fixed types and refuses what it cannot compute."""
    config = packed.table(CONFIG)
    for name in _INTEGERS:
        if not isinstance(config.get(name), int):
            wrong = f"{name} is {config.get(name)!r}: text-embeddings-inference reads one integer"
            yield Finding(CONFIG, wrong, _REPACK)
    for name, wanted in {"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"}.items():
        if config.get(name) != wanted:
            wrong = f"{name} is {config.get(name)!r}, not {wanted!r}: servers compute Qwen3 as it was published"
            yield Finding(CONFIG, wrong, _REPACK)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        yield Finding(CONFIG, "layer_types has more than full_attention, which servers do not compute", _REPACK)
    prompts = packed.table(SENTENCE_TRANSFORMERS).get("prompts") or {}
    if not all(isinstance(prompt, str) for prompt in prompts.values()):
        wrong = "a prompt is no text: text-embeddings-inference cannot parse the file"
        yield Finding(SENTENCE_TRANSFORMERS, wrong, _REPACK)


def check_rotary(packed: PackedFolder) -> Iterator[Finding]:
    """The base of the rotary embedding, where new readers look for it and where old ones do."""
    config = packed.table(CONFIG)
    parameters = config.get("rope_parameters") or {}
    kind, base = parameters.get("rope_type", "default"), parameters.get("rope_theta")
    if kind != "default":
        yield Finding(CONFIG, f"rope_type is {kind!r}: text-embeddings-inference knows 'default' only", _REPACK)
    if base is None:
        yield Finding(CONFIG, "rope_parameters has no rope_theta", _REPACK)
    elif config.get("rope_theta") != base:
        wrong = (
            f"rope_theta is {config.get('rope_theta')!r} at the top and {base!r} in rope_parameters: transformers 4 "
            "and the servers built on it read the top, and without it take 10000"
        )
        yield Finding(CONFIG, wrong, f"set it to {base!r}, or pack the run again")


def check_sentence_transformers_files(packed: PackedFolder) -> Iterator[Finding]:
    """The modules and their settings under the names that every version and server knows."""
    for entry in packed.modules():
        if not str(entry["type"]).startswith("sentence_transformers.models."):
            wrong = (
                f"{entry['type']} is known since sentence-transformers 5.4 only, and not to llama.cpp: it would not "
                "see how to pool"
            )
            yield Finding(MODULES, wrong, _REPACK)
    if isinstance(packed.table(TOKENIZER_CONFIG).get("extra_special_tokens"), list):
        wrong = "extra_special_tokens is a list, which transformers 4 cannot read"
        yield Finding(TOKENIZER_CONFIG, wrong, "call it additional_special_tokens, or pack the run again")
    name, pooling = packed.pooling()
    flags = ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken", "word_embedding_dimension")
    missing = [flag for flag in flags if flag not in pooling]
    if missing:
        wrong = f"lacks {', '.join(missing)}: text-embeddings-inference before 2026 and llama.cpp cannot read it"
        yield Finding(name, wrong, _REPACK)
    settings = packed.table(TRANSFORMER_MODULE)
    missing = [key for key in ("max_seq_length", "do_lower_case") if key not in settings]
    if missing:
        wrong = f"lacks {' and '.join(missing)}: vLLM ignores the file, text-embeddings-inference before 2026 stops"
        yield Finding(TRANSFORMER_MODULE, wrong, _REPACK)


def check_llama_cpp(packed: PackedFolder) -> Iterator[Finding]:
    """llama.cpp's converter sees that a token is added, which it takes for EOS, and knows the pre-tokenizer."""
    tokenizer = packed.table(TOKENIZER)
    post = tokenizer.get("post_processor") or {}
    templates = [each for each in post.get("processors", [post]) if each.get("type") == "TemplateProcessing"]
    ends = [(template.get("single") or [{}])[-1].get("SpecialToken", {}).get("id") for template in templates]
    if not any(ends):
        wrong = "the post-processor is no template that ends with a token: llama.cpp's converter would add none"
        yield Finding(TOKENIZER, wrong, "let append_eos of modeling_f2llm set its post-processor and save it again")
    if (tokenizer.get("model") or {}).get("type") != "BPE":
        yield Finding(TOKENIZER, "is no BPE tokenizer: llama.cpp reads Qwen3 with one only", _REPACK)
    if _ids(tokenizer) != _QWEN:
        wrong = "is another vocabulary than Qwen3's: llama.cpp's converter will not recognise its pre-tokenizer"
        yield Finding(TOKENIZER, wrong, "convert it with training/models/export_gguf.py", fault=False)


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    added = tokenizer.get("added_tokens") or ()
    return {token["content"]: token["id"] for token in added if token.get("content") in _QWEN}
