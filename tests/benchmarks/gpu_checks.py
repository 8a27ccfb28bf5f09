"""Parts of ``gpu.py``: what the machine reaches, and that every way to take a step is the same."""

from __future__ import annotations

import platform
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from tests.benchmarks.common import PRECISIONS, describe_hardware, device, packed_batch, padded_batch
from tests.benchmarks.gpu_common import columns_of, padded_encoder, seeded_model, stock_twin, timed, use_compiled
from tests.benchmarks.gpu_report import NEEDS_CUDA
from tests.benchmarks.lean_imports import stand_ins
from tests.benchmarks.unpadded import UNPADDED, mini_batches, sentence_transformers_gradient, unpadded_encoder

with stand_ins():
    from tests.benchmarks.step import cached_gradient, embed_padded, whole_gradient

_PACKAGES = ("torch", "transformers", "sentence-transformers", "peft", "numpy", "flash-attn")
# Rows of the batch, as each device of the released training has.
_ROWS = 16


def rate(bench):
    """The machine, and the operations per second of large square matrix products."""
    versions = {"python": platform.python_version(), "CUDA": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    bench.emit({"hardware": describe_hardware(), "versions": versions})
    # bf16 first: all fractions are of it.
    for precision, dtype in reversed(PRECISIONS.items()):
        for size in (64, 128) if bench.tiny else (4096, 8192, 16384):
            bench.attempt({"precision": precision, "size": size}, partial(_square, size, dtype))


def _square(size, dtype):
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    # About a tenth of a second in bf16.
    calls = max(1, int(4e13 / size**3)) if left.is_cuda else 1

    def multiply():
        for _ in range(calls):
            torch.mm(left, right)

    multiply()
    return {"operations_per_second": 2 * size**3 * calls / timed(multiply, 1.0)["median"]}


def equality(bench):
    """Loss and gradient of every way to take a step, against the stock way in fp32.

    Ours and the released method are held against stock Qwen3, padded. sentence-transformers has another loss: without
    padding it is held against itself with padding.
    """
    config = bench.shape("f2llm-v2-0.6b")
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    lengths = bench.lengths(4 if bench.tiny else _ROWS)
    packed, padded, dims = packed_batch(lengths), padded_batch(lengths), config.matryoshka_dimensions
    model = seeded_model(config)
    stock, checkpointed = stock_twin(model), stock_twin(model)
    checkpointed.gradient_checkpointing_enable()
    budget = max(int(lengths.max()), int(lengths.sum()) // 5)

    def ours(precision, compiled=False, attention="packed", chunked=False):
        model.set_attn_implementation(attention)
        use_compiled(model, compiled)
        if chunked:
            return cached_gradient(model, packed, budget, precision, dims)
        return whole_gradient(model, packed, precision)

    def theirs(precision, encoder):
        sizes = mini_batches(lengths, budget)
        return sentence_transformers_gradient(encoder(), columns_of(lengths), dims, precision, sizes)

    groups = [
        {
            "stock": partial(whole_gradient, stock, padded, embedder=embed_padded),
            "packed": ours,
            "packed, sdpa": partial(ours, attention="sdpa"),
            "packed, torch_varlen": partial(ours, attention="torch_varlen"),
            "packed, compiled": partial(ours, compiled=True),
            "chunked": partial(ours, chunked=True),
            "chunked, compiled": partial(ours, compiled=True, chunked=True),
            "released method": partial(whole_gradient, checkpointed, padded, embedder=embed_padded),
        },
        {
            "sentence-transformers, padded": partial(theirs, encoder=lambda: padded_encoder(stock_twin(model))),
            "sentence-transformers, unpadded": partial(
                theirs, encoder=lambda: unpadded_encoder(stock_twin(model, UNPADDED))
            ),
        },
    ]
    for ways in groups:
        exact, natural = _gradient(model, next(iter(ways.values()))(precision="fp32")), {}
        for precision in PRECISIONS:
            for way, make in ways.items():
                key = {"way": way, "precision": precision}
                if "varlen" in way and not (torch.cuda.is_available() and precision == "bf16"):
                    bench.emit({**key, "left_out": f"{NEEDS_CUDA} and half precision"})
                    continue

                def measure(make=make, precision=precision, exact=exact, natural=natural):
                    return _errors(_gradient(model, make(precision=precision)), exact, natural, precision)

                bench.attempt(key, measure)


def _gradient(model, accumulate):
    """Loss, and the gradient of all weights as one vector."""
    model.zero_grad()
    loss = accumulate()
    vector = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    return sum(loss.values()) if isinstance(loss, dict) else loss, vector


def _errors(found, exact, natural, precision):
    """Relative errors. Three times those of the stock way in the same precision, which comes first, are allowed."""
    errors = {
        "loss_error": abs(found[0] - exact[0]) / abs(exact[0]),
        "gradient_error": float((found[1] - exact[1]).norm() / exact[1].norm()),
    }
    natural.setdefault(precision, errors)
    floor = 1e-3 if precision == "fp32" else 1e-2
    return {**errors, "equal": all(error <= max(floor, 3 * natural[precision][name]) for name, error in errors.items())}
