"""Models to start from that are not F2LLM's: built as others build them, with sentence-transformers alone."""

from __future__ import annotations

import json
from copy import deepcopy

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, Qwen3Model

QWEN3_PROMPTS = {"query": "Instruct: Find what answers the question\nQuery:", "document": "about: "}


def edit_json(path, **keys):
    """Replaces keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def save_plain(folder, config, tokenizer, seed=3):
    """Writes a Qwen3 model as transformers does, without modules; its tokenizer appends nothing."""
    stock = Qwen3Model.config_class.from_dict(deepcopy(config).to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3Model(stock)
        # A new model has zeros for padding, which a trained one that ends texts with it has not.
        torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit_json(folder / "tokenizer.json", post_processor=None)
    return folder


def save_like_qwen3_embedding(folder, config, tokenizer, pooling="lasttoken", dense=False):
    """Writes a model whose tokenizer has ``<|im_end|>`` as EOS and appends ``<|endoftext|>``, its padding token."""
    plain = AutoTokenizer.from_pretrained(save_plain(folder / "plain", config, tokenizer))
    pad = plain.pad_token
    assert plain.eos_token == "<|im_end|>" and pad == "<|endoftext|>"
    template = TemplateProcessing(
        single=f"$A {pad}", pair=f"$A {pad} $B:1 {pad}:1", special_tokens=[(pad, plain.pad_token_id)]
    )
    plain.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])
    plain.save_pretrained(folder / "plain")
    width = config.hidden_size
    modules = [Transformer(str(folder / "plain")), Pooling(width, pooling_mode=pooling)]
    modules += [Dense(width, width)] if dense else []
    model = SentenceTransformer(modules=[*modules, Normalize()], prompts=QWEN3_PROMPTS, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"
