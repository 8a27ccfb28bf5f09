"""What the suites share: settings, hardware and memory, models of the same weights, texts of given lengths (seeded)."""

from __future__ import annotations

import os
import platform
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Model

from modeling_f2llm import F2LLMConfig, F2LLMModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The instructions that decide how fast a matrix product can be.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16")
# The published vocabulary would make the table of embeddings, which all models share, most of the memory.
VOCAB_SIZE = 8192
_TINY = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}
NEGATIVES, LONGEST = 7, 1024


def device():
    """Return the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(precision):
    """Return the context in which fp32 weights compute in a precision."""
    return torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class Settings:
    """The choices of the command line; what is None follows from the device."""

    repeats: int = 3
    precisions: tuple[str, ...] = ("fp32", "bf16")
    compile: bool = True
    size: str | None = None
    rows: int | None = None
    step_layers: int | None = None
    quick: bool = False
    openvino_python: str | None = None
    distributions: tuple[str, ...] = ()  # all if empty

    def pick(self, *, quick, cpu, cuda):
        """Return the value that fits the run and the device."""
        return quick if self.quick else cuda if device().type == "cuda" else cpu

    @property
    def family_name(self):
        """The published shape that is measured."""
        return self.size or self.pick(quick="f2llm-v2-80m", cpu="f2llm-v2-80m", cuda="f2llm-v2-0.6b")

    @property
    def step_shape(self):
        """Changes to the shape of the model that is trained."""
        return {"num_hidden_layers": self.step_layers} if self.step_layers else {}


def describe_hardware():
    """Return processor, GPU, memory and threads."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [flag for flag in _FLAGS if flag in _field("/proc/cpuinfo", "flags").split()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu.name if gpu else None,
        "gpu_memory_gib": round(gpu.total_memory / 2**30, 1) if gpu else None,
        "system": f"{platform.system()} on {platform.machine()}",
    }


def available_memory():
    """Return the free bytes of the device."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def process_memory(field):
    """Return the MiB that this process holds (``VmRSS``) or held at most (``VmHWM``)."""
    # Not the peak of getrusage: it is no less than that of the parent.
    return int(_field("/proc/self/status", field).split()[0]) / 1024


def _field(path, name):
    """Return the value of the first ``name: value`` line of a file in /proc, or nothing."""
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def configuration(settings, name=None, **overrides):
    """Return a published shape, by default the one that the settings choose, with a small vocabulary."""
    special = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    tiny = _TINY if settings.quick else {}
    return F2LLMConfig.from_family(name or settings.family_name, **{**special, **tiny, **overrides})


def build_models(settings, dtype=torch.float32, *, name=None, compile=False, **overrides):
    """``stock``, ``ours`` and, if asked for, ``ours_compiled``, all of one configuration and the same weights."""
    config = configuration(settings, name, **overrides)
    if compile:
        # Variants compiled for earlier comparisons would count towards torch's limit, beyond which it runs eagerly.
        torch.compiler.reset()
    torch.manual_seed(0)
    ours = F2LLMModel(deepcopy(config))
    assert ours.config._attn_implementation == "packed", ours.config._attn_implementation
    # A config holds the attention implementation of its model: each model needs its own.
    models = {"stock": Qwen3Model._from_config(deepcopy(config), attn_implementation="sdpa"), "ours": ours}
    if compile:
        models["ours_compiled"] = F2LLMModel(deepcopy(config), compile=True)
    for model in models.values():
        model.load_state_dict(ours.state_dict())
    return {name: model.to(device(), dtype) for name, model in models.items()}


def random_model(config):
    """Weights drawn in place: transformers' own initialisation of so large a model takes longer than cutting it."""
    with init_empty_weights(include_buffers=False):
        model = F2LLMModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.ones(weight.shape) for name, weight in model.named_parameters()}
    for weight in weights.values():
        if weight.ndim > 1:
            weight.uniform_(-0.03, 0.03, generator=generator)
    model.load_state_dict(weights, assign=True)
    return model


def word_tokenizer():
    """One word, one token: texts have just the lengths that are asked for."""
    words = {f"w{i}": i for i in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, **words}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_texts(lengths, seed=0):
    """Return texts of random words that have these lengths once the tokenizer has appended EOS."""
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in generator.integers(2, VOCAB_SIZE, length - 1)) for length in lengths]


def _log_normal(median, sigma, size, generator=None):
    generator = generator or np.random.default_rng(1)
    return generator.lognormal(np.log(median), sigma, size).clip(4, LONGEST).astype(int)


def row_lengths(settings, rows):
    """``(rows, 9)`` tokens of query, positive and negatives, as long as those of the published training.

    Fewer rows are the first of more rows.
    """
    queries = _log_normal(16, 0.4, (rows, 1), np.random.default_rng(0))
    documents = settings.pick(quick=12, cpu=120, cuda=120)
    return np.hstack([queries, _log_normal(documents, 0.6, (rows, 1 + NEGATIVES))])


def _bimodal(count):
    generator = np.random.default_rng(1)
    passages = _log_normal(250, 0.4, count, generator)
    return np.where(np.arange(count) % 2, passages, _log_normal(16, 0.4, count, generator))


# Name of a distribution of lengths → how many texts there are to be → their lengths.
DISTRIBUTIONS = {
    "equal": lambda count: np.full(count, 90),
    "short": lambda count: _log_normal(20, 0.5, count),
    "log_normal": lambda count: _log_normal(90, 0.7, count),
    "bimodal": _bimodal,
    "long_tail": lambda count: _log_normal(60, 1.2, count),
}


def batches(lengths):
    """The same texts packed and padded."""
    return packed_batch(lengths), padded_batch(lengths)


def _random_texts(flat):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator) for length in flat]


def packed_batch(lengths):
    """``(rows, texts per row)`` lengths → random texts packed, shortest first."""
    flat = lengths.reshape(-1).tolist()
    texts, order = _random_texts(flat), torch.from_numpy(np.argsort(flat, kind="stable"))
    return {
        "input_ids": torch.cat([texts[i] for i in order])[None].to(device()),
        "sequence_lengths": [flat[i] for i in order],
        **_roles(order.argsort().view(lengths.shape)),
    }


def padded_batch(lengths):
    """``(rows, texts per row)`` lengths → the same random texts padded to the longest."""
    flat = lengths.reshape(-1).tolist()
    texts = _random_texts(flat)
    ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(flat)[:, None]).long()
    index = torch.arange(len(texts)).view(lengths.shape)
    return {"input_ids": ids.to(device()), "attention_mask": mask.to(device()), **_roles(index)}


def lowest_cosine(found, reference):
    """The smallest cosine of two ``(n, d)`` arrays of embeddings."""
    # bf16 embeddings are not quite of unit length.
    units = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in np.asarray([found, reference], np.float32))
    return float(np.prod(list(units), axis=0).sum(1).min())


def _roles(index):
    index = index.to(device())
    roles = {"query": index[:, 0], "positive": index[:, 1], "negatives": index[:, 2:]}
    return {**roles, "source": "benchmark", "task_type": "retrieval"}
