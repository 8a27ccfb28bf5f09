"""Lengths, texts and batches that the suites share; every draw has a fixed seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.benchmarks.machine import Settings, device
from tests.benchmarks.models import VOCAB_SIZE

NEGATIVES, LONGEST = 7, 1024


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token: texts have just the lengths that are asked for."""
    words = {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_texts(lengths: np.ndarray, seed: int = 0) -> list[str]:
    """Return texts of random words that have these lengths once the tokenizer has appended EOS."""
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in generator.integers(2, VOCAB_SIZE, length - 1)) for length in lengths]


def _log_normal(generator: np.random.Generator, median: float, sigma: float, size: Any) -> np.ndarray:
    return generator.lognormal(np.log(median), sigma, size).clip(4, LONGEST).astype(int)


def row_lengths(settings: Settings, rows: int) -> np.ndarray:
    """``(rows, 9)`` tokens of query, positive and negatives, as long as those of the published training.

    Fewer rows are the first of more rows.
    """
    documents = settings.pick(quick=12, cpu=120, cuda=120)
    lengths = np.empty((rows, 2 + NEGATIVES), dtype=int)
    lengths[:, 0] = _log_normal(np.random.default_rng(0), 16, 0.4, rows)
    lengths[:, 1:] = _log_normal(np.random.default_rng(1), documents, 0.6, (rows, 1 + NEGATIVES))
    return lengths


def _bimodal(count: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    passages = _log_normal(generator, 250, 0.4, count)
    return np.where(np.arange(count) % 2, passages, _log_normal(generator, 16, 0.4, count))


# Name of a distribution of lengths → how many texts there are to be → their lengths.
DISTRIBUTIONS = {
    "equal": lambda count: np.full(count, 90),
    "short": lambda count: _log_normal(np.random.default_rng(1), 20, 0.5, count),
    "log_normal": lambda count: _log_normal(np.random.default_rng(1), 90, 0.7, count),
    "bimodal": _bimodal,
    "long_tail": lambda count: _log_normal(np.random.default_rng(1), 60, 1.2, count),
}


def batches(lengths: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(rows, texts per row)`` lengths → the same random texts packed, shortest first, and padded to the longest."""
    flat = lengths.reshape(-1).tolist()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in flat]
    order = np.argsort(flat, kind="stable")
    rank = torch.empty(len(texts), dtype=torch.long)
    rank[torch.from_numpy(order)] = torch.arange(len(texts))
    index = torch.arange(len(texts)).view(lengths.shape)
    packed = {
        "input_ids": torch.cat([texts[i] for i in order])[None].to(device()),
        "sequence_lengths": [flat[i] for i in order],
        **_roles(rank[index]),
    }
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(flat)[:, None]).long()
    padded = {"input_ids": ids.to(device()), "attention_mask": mask.to(device()), **_roles(index)}
    return packed, padded


def _roles(index: Tensor) -> dict[str, Any]:
    index = index.to(device())
    roles = {"query": index[:, 0], "positive": index[:, 1], "negatives": index[:, 2:]}
    return {**roles, "source": "benchmark", "task_type": "retrieval"}
