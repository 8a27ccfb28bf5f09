"""sentence-transformers at its strongest: cached loss by token budget, and unpadded attention without flash-attn."""

from __future__ import annotations

from inspect import signature
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from transformers import AttentionInterface

from modeling_f2llm import build_sentence_transformer, matryoshka_weights
from modeling_f2llm.attention import PACKED_ATTENTION
from modeling_f2llm.losses import TEMPERATURE
from tests.benchmarks.common import autocast, word_tokenizer

UNPADDED = "unpadded"


def _attention(module, query, key, value, attention_mask, **options):
    """The kernel that F2LLMModel chooses, over the boundaries that sentence-transformers hands on."""
    # Kernels of a GPU read cu_seq_lens_q and would wait for a list.
    fused = query.is_cuda and value.dtype != torch.float32
    lengths = () if fused else options["cu_seq_lens_q"].diff().tolist()
    packed = AttentionInterface()[PACKED_ATTENTION[None]]
    return packed(module, query, key, value, None, sequence_lengths=lengths, **options)


AttentionInterface.register(UNPADDED, _attention)


def unpadded_encoder(model):
    """A SentenceTransformer of a stock model with the attention above that is given its texts without padding.

    sentence-transformers offers that where flash-attn can be imported. The same switch is thrown here.
    """
    encoder = build_sentence_transformer(model, word_tokenizer(), prompts={})
    kernels = (None, _attention, None, None, None), (None, None)
    loader = "transformers.modeling_flash_attention_utils.lazy_import_flash_attention"
    with patch.object(encoder[0], "_is_flash_attention_requested", lambda: True), patch(loader, lambda *_: kernels):
        encoder[0].unpad_inputs = True
    if not encoder[0].can_flatten_inputs:
        raise RuntimeError("this version of sentence-transformers does not encode without padding")
    return encoder


def features_of(encoder, texts):
    """What an encoder's forward pass takes, on its device."""
    inputs = encoder.preprocess(texts)
    return {name: each.to(encoder.device) if torch.is_tensor(each) else each for name, each in inputs.items()}


def cached_loss(encoder, dims, **sizes):
    """``CachedMultipleNegativesRankingLoss`` in ``MatryoshkaLoss`` with our widths, weights and temperature."""
    loss = CachedMultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE, **sizes)
    return MatryoshkaLoss(encoder, loss, matryoshka_dims=dims, matryoshka_weights=matryoshka_weights(dims))


def mini_batches(lengths, budget):
    """Sizes for :func:`cached_loss`: mini-batches of ``budget`` tokens, on average where a version counts texts."""
    if "mini_batch_num_tokens" in signature(CachedMultipleNegativesRankingLoss).parameters:
        # The size in rows is then that of the blocks of the similarity matrix: one block is fastest.
        return {"mini_batch_num_tokens": budget, "mini_batch_size": len(lengths)}
    return {"mini_batch_size": max(1, int(budget / lengths.mean()))}


def sentence_transformers_gradient(encoder, columns, dims, precision, sizes):
    """Return a function that accumulates the gradient of :func:`cached_loss` over columns of texts.

    Precision as in SentenceTransformerTrainer: accelerate wraps the model's forward pass so, and not the loss.
    """
    if "forward" not in vars(encoder):
        encoder.forward = convert_outputs_to_fp32(autocast(precision)(encoder.forward))
    loss = cached_loss(encoder.train(), dims, **sizes)
    features = [features_of(encoder, column) for column in columns]

    def accumulate():
        value = loss([dict(each) for each in features], None)
        value.backward()
        return value.item()

    return accumulate
