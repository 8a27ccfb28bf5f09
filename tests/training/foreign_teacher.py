"""A SentenceTransformer that shares nothing with F2LLM: a BERT with words for tokens and mean pooling."""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

_WORDS = "the red green blue river city lake answer question negative Instruct Query query passage : , ? . |".split()


def save_foreign_teacher(folder, width):
    """Writes one with random weights and embeddings of the given width; returns its folder."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *_WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    shape = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=width, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        # Embeddings that are far from unit length.
        model = BertModel(config)
        model.encoder.layer[0].output.LayerNorm.weight.data.normal_(2.0, 1.0)
    model.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert")), Pooling(width, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder
