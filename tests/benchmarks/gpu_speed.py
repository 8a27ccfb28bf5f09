"""Parts of ``gpu.py``: speed and memory of training steps and of encoding."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from peft import LoraConfig

from tests.benchmarks.common import DISTRIBUTIONS, lowest_cosine, packed_batch, padded_batch, write_texts
from tests.benchmarks.gpu_common import (
    columns_of,
    fraction,
    free,
    largest_that_fits,
    operations,
    padded_encoder,
    seeded_model,
    speed,
    stock_twin,
    timed,
    use_compiled,
)
from tests.benchmarks.lean_imports import stand_ins
from tests.benchmarks.unpadded import (
    UNPADDED,
    features_of,
    mini_batches,
    sentence_transformers_gradient,
    unpadded_encoder,
)

with stand_ins():
    from tests.benchmarks.rate import linear_shapes, products
    from tests.benchmarks.step import cached_gradient, embed_padded, laid_out, optimized, whole_gradient
    from training.config.arguments import LORA_TARGETS
    from training.models.adapters import add_adapter
    from training.models.encoding import batch_chunks, embed_chunk, lay_out
    from training.planning.costs import estimate_memory
    from training.trainer.monitor import peak_memory, reset_peak_memory

# Seconds that a step, and encoding one distribution, may take at the fraction of the matrix rate that is assumed.
_STEP_SECONDS, _ENCODING_SECONDS, _ASSUMED_FRACTION = 12.0, 0.7, 0.25
_ROWS, _ROWS_PER_DEVICE = 512, 16
# Tokens of the largest chunk, and the share of the GPU's memory that a step is planned for.
_MOST_TOKENS, _MEMORY_SHARE = 131072, 0.8


# -- training ----------------------------------------------------------------------------------------------------------


def training(bench, name):
    """Steps of one shape: ours, sentence-transformers at its strongest, the released method, and stock Qwen3."""
    config = bench.shape(name)
    model, lengths = seeded_model(config), bench.lengths(_rows(bench, config))
    dims, budget = config.matryoshka_dimensions, chunk_tokens(config, lengths.size)
    columns = columns_of(lengths)

    def ours(rows, size, compiled=False):
        return cached_gradient(use_compiled(model, compiled), packed_batch(rows), size, "bf16", dims)

    def theirs(rows, size):
        few = [column[: len(rows)] for column in columns]
        encoder = unpadded_encoder(stock_twin(model, UNPADDED))
        return sentence_transformers_gradient(encoder, few, dims, "bf16", mini_batches(rows, size))

    def padded(rows, _, checkpointing=False):
        stock = stock_twin(model)
        if checkpointing:
            stock.gradient_checkpointing_enable()
        return whole_gradient(stock, padded_batch(rows), "bf16", embed_padded)

    cached = {"size": budget, "rows_of": lambda _: lengths}
    few = {"size": min(_ROWS_PER_DEVICE, len(lengths)), "rows_of": lambda rows: lengths[:rows]}
    ways = {
        "ours": (ours, {**cached, "repeats": _repeated}),
        "sentence-transformers": (theirs, {**cached, "repeats": lambda rows, _: rows.sum()}),
        "ours, compiled": (partial(ours, compiled=True), {**cached, "repeats": _repeated}),
        "released method": (partial(padded, checkpointing=True), {**few, "checkpointing": True}),
        "stock": (padded, few),
    }
    bench.attempt({"shape": name, "way": "matrix products"}, partial(_shape_rate, bench, config, budget))
    for way, (gradient_of, how) in ways.items():
        bench.attempt({"shape": name, "way": way}, partial(_steps, bench, config, model, gradient_of, **how))


def _shape_rate(bench, config, tokens):
    """What the products of the shape's own linear layers reach, forward and backward: narrow ones are slower."""
    tokens = min(tokens, 16384)
    multiply = products(config, tokens, torch.bfloat16, backward=True)
    multiply()
    count = 6 * tokens * config.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_shapes(config))
    return fraction(bench, count, timed(multiply, 1.0), "useful")


def lora(bench, name):
    """Steps of a LoRA adapter of rank 16 on every linear layer."""
    config, rank = bench.shape(name), 4 if bench.tiny else 16
    targets = {"target_modules": sorted(LORA_TARGETS), "task_type": "FEATURE_EXTRACTION"}
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, **targets)
    model, lengths = seeded_model(config), bench.lengths(_rows(bench, config))
    budget = chunk_tokens(config, lengths.size, adapter)
    add_adapter(model, adapter)

    def gradient_of(rows, size, compiled):
        dims = config.matryoshka_dimensions
        return cached_gradient(use_compiled(model, compiled), packed_batch(rows), size, "bf16", dims)

    known = {"size": budget, "rows_of": lambda _: lengths, "repeats": _repeated, "adapter": True}
    for way, compiled in (("LoRA", False), ("LoRA, compiled", True)):
        steps = partial(_steps, bench, config, model, partial(gradient_of, compiled=compiled), **known)
        bench.attempt({"shape": name, "way": way}, steps)


def growth(bench, name):
    """Steps on more and more rows in chunks of one size: does memory stay? Texts are short, for the time's sake."""
    config, batches = bench.shape(name), (2, 4) if bench.tiny else (512, 4096, 32768)
    # The smallest batch fills two chunks, and a little more fits: chunks of all batches are equally full.
    fewest = int(bench.lengths(batches[0]).clip(max=16).sum())
    model, size = seeded_model(config), min(fewest // 2 + 64, chunk_tokens(config, 0))
    for rows in batches:
        lengths = bench.lengths(rows).clip(max=16)
        # The similarities of all rows are kept once for each width.
        for widths, dims in (("all", config.matryoshka_dimensions), ("full only", None)):

            def gradient_of(few, size, dims=dims):
                return cached_gradient(model, packed_batch(few), size, "bf16", dims)

            known = {"size": size, "rows_of": lambda _, lengths=lengths: lengths, "repeats": _repeated, "halve": False}
            key = {"shape": name, "way": f"{rows:,} rows", "widths": widths}
            bench.attempt(key, partial(_steps, bench, config, model, gradient_of, **known))


def _steps(bench, config, model, gradient_of, *, size, rows_of, repeats=None, halve=True, **how):
    """Time steps by ``gradient_of(rows, size)``, once a step on a quarter of the rows has warmed it up.

    ``size`` is that of chunks in tokens, or of batches of ``rows_of(size)`` rows, and halved where memory does not
    suffice. ``repeats(rows, size)`` are the tokens that are encoded twice.
    """

    def measure(size):
        rows = rows_of(size)
        few = rows[: max(1, len(rows) // 4)]
        model.zero_grad()
        # In two chunks at least: the first pass of all but the last, without a graph, is compiled by itself.
        accumulate = gradient_of(few, min(size, -(-int(few.sum()) // 2)))
        step = optimized(model, lambda: accumulate())
        step()
        accumulate = gradient_of(rows, size)
        free()
        reset_peak_memory()
        seconds = timed(step, _STEP_SECONDS / 2)
        found = {"size": size, "peak_gb": peak_memory() / 1e9}
        return {**found, **_figures(bench, config, rows, seconds, repeats(rows, size) if repeats else 0, **how)}

    return largest_that_fits(size, measure) if halve else measure(size)


def _repeated(rows, size):
    """Tokens of all chunks but the last."""
    lengths = np.sort(rows.reshape(-1))
    return sum(int(lengths[chunk].sum()) for chunk in lay_out(lengths, max_tokens=size).chunks[:-1])


def _figures(bench, config, rows, seconds, repeated=0, checkpointing=False, adapter=False):
    """Speed in real tokens; operations as fractions of the matrix rate, without and with what is computed twice."""
    performed = operations(config, rows, repeated, checkpointing, adapter)
    return {
        **speed(rows, seconds),
        **fraction(bench, operations(config, rows, adapter=adapter), seconds, "useful"),
        **fraction(bench, performed, seconds, "performed"),
    }


def _rows(bench, config):
    """512 rows, or for large models as many as a step has time for, in chunks of the same tokens."""
    rows = 4 if bench.tiny else _ROWS
    while bench.rate and rows > _ROWS_PER_DEVICE:
        lengths = bench.lengths(rows)
        if operations(config, lengths, lengths.sum()) <= _STEP_SECONDS * _ASSUMED_FRACTION * bench.rate:
            break
        rows //= 2
    return rows


def chunk_tokens(config, texts, adapter=None):
    """Return the tokens of a chunk that fill the planned share of the GPU's memory; without a GPU, few."""
    if not torch.cuda.is_available():
        return 64
    estimate = estimate_memory(config, 1, texts, bf16=True, adapter=adapter)
    left = _MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory - estimate.total
    return int(np.clip(left / estimate.activations, 1024, _MOST_TOKENS)) // 1024 * 1024


# -- encoding ----------------------------------------------------------------------------------------------------------


def encoding(bench, name):
    """bf16 over texts of 50, of 512 and of mixed tokens: the forward pass alone, and the whole of ``encode``."""
    config = bench.shape(name)
    model = seeded_model(config).to(torch.bfloat16).eval()
    encoders = {
        "encode, stock": padded_encoder(stock_twin(model).eval()),
        "encode, sentence-transformers unpadded": unpadded_encoder(stock_twin(model, UNPADDED).eval()),
        "encode, ours": padded_encoder(model),
        "encode, ours compiled": padded_encoder(model),
    }
    tokens = 256
    if bench.rate and not bench.tiny:
        affordable = _ENCODING_SECONDS * _ASSUMED_FRACTION * bench.rate / (operations(config, np.ones(1)) / 3)
        tokens = int(np.clip(affordable, 2**14, 2**19))
    for kind, lengths_of in {
        "50 tokens": lambda count: np.full(count, 50),
        "512 tokens": lambda count: np.full(count, 512),
        "mixed": DISTRIBUTIONS["long_tail"],
    }.items():
        lengths = lengths_of(max(4, int(tokens / lengths_of(64).mean()))).clip(max=24 if bench.tiny else None)
        _encode(bench, config, {"shape": name, "lengths": kind}, lengths, model, encoders)


def _encode(bench, config, key, lengths, model, encoders):
    """Every way to encode texts of these lengths; the cosines with the first show that they are the same."""
    batch = laid_out(packed_batch(lengths[:, None].repeat(2, 1)[: len(lengths) // 2]), _MOST_TOKENS // 2)
    packed = np.array(batch["sequence_lengths"])
    texts, expected = write_texts(lengths), []
    size = max(8, int(_MOST_TOKENS / 2 / lengths.mean()))

    def measure(run, lengths, check):
        result = run()
        seconds = timed(run, 1.0)
        if check:
            expected.append(result)
        cosine = {"lowest_cosine": lowest_cosine(result, expected[0])} if check else {}
        return {
            **cosine,
            **speed(lengths, seconds),
            **fraction(bench, operations(config, lengths) / 3, seconds, "useful"),
        }

    @torch.inference_mode()
    def forward():
        return torch.cat([embed_chunk(model, *chunk) for chunk in batch_chunks(batch)])

    @torch.inference_mode()
    def forward_theirs(encoder, batches):
        return torch.cat([encoder(dict(each))["sentence_embedding"] for each in batches])

    for compiled in (False, True):
        use_compiled(model, compiled)
        way = f"forward, ours{' compiled' * compiled}"
        bench.attempt({**key, "way": way}, partial(measure, forward, packed, check=False))
    for whose in ("stock", "sentence-transformers unpadded"):
        # Neighbours in length, as `encode` has them, tokenised and on the device.
        encoder, same = encoders[f"encode, {whose}"], write_texts(packed)
        ready = [features_of(encoder, same[start : start + size]) for start in range(0, len(same), size)]
        run = partial(forward_theirs, encoder, ready)
        bench.attempt({**key, "way": f"forward, {whose}"}, partial(measure, run, packed, check=False))
    for way, encoder in encoders.items():
        use_compiled(model, "compiled" in way)
        run = partial(encoder.encode, texts, batch_size=size, show_progress_bar=False)
        bench.attempt({**key, "way": way}, partial(measure, run, lengths, check=True))
