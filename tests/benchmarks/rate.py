"""The fraction of the device's own matrix-product rate that the forward pass and the step reach.

The rate is what ``torch.mm`` reaches on the products of the model itself: tokens of the batch × input width × output
width of every linear layer, for training also the two products of its backward pass. Floating-point operations are
counted as two per weight and token, and four per pair of tokens, head and dimension that causal attention looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeling_f2llm import F2LLMConfig
from tests.benchmarks.machine import PRECISIONS, Settings, device
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.step import choose_rows, embed, stepper
from tests.benchmarks.texts import batches, row_lengths
from tests.benchmarks.timing import Contestant, Suite, add_ratio, measure


def linear_shapes(config: F2LLMConfig) -> list[tuple[int, int]]:
    """(input width, output width) of the linear layers of one transformer layer."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = [*((width, out) for out in (queries, keys, keys)), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def attention_operations(config: F2LLMConfig, lengths: list[int]) -> int:
    """Return the operations of the two products of causal attention in one layer."""
    return sum(2 * length * (length + 1) for length in lengths) * config.num_attention_heads * config.head_dim


def run(settings: Settings, suite: Suite) -> None:
    """Time products, forward pass and step in every precision."""
    rows, why = choose_rows(settings)
    packed, _ = batches(row_lengths(settings, rows))
    config = configuration(settings)
    suite.notes += [
        why,
        "Products: torch.mm at the shapes of the model's own linear layers; fractions are operations per second of the "
        "model over those of the products, repeat by repeat. Weights in the precision named for the forward pass; for "
        "the step fp32, with autocast in bf16.",
    ]
    for precision in settings.precisions:
        suite.add(_measure(settings, config, packed, precision))


def _measure(settings: Settings, config: F2LLMConfig, packed: dict[str, Any], precision: str) -> dict[str, Any]:
    dtype = PRECISIONS[precision]
    lengths = packed["sequence_lengths"]
    layers, tokens = config.num_hidden_layers, sum(lengths)
    linear = layers * 2 * tokens * sum(inputs * outputs for inputs, outputs in linear_shapes(config))
    forward = linear + layers * attention_operations(config, lengths)
    operations = {
        "products": linear,
        "products_forward_and_backward": 3 * linear,
        **{name: forward for name in ("forward", "forward_compiled")},
        **{name: 3 * forward for name in ("step", "step_compiled")},
    }
    contestants = {
        "products": Contestant(_products(config, tokens, dtype, backward=False)),
        "products_forward_and_backward": Contestant(_products(config, tokens, dtype, backward=True)),
        **_contestants(settings, config, packed, dtype),
    }
    measurement = measure("rate", contestants, settings.repeats, precision=precision, facts={"tokens": tokens})
    for name in ("forward", "forward_compiled", "step", "step_compiled"):
        products = "products" if name.startswith("forward") else "products_forward_and_backward"
        add_ratio(measurement, products, name, "fraction of the rate", operations[name] / operations[products])
    measurement["facts"]["gigaflops_per_second"] = {
        name: operations[name] / seconds["median"] / 1e9 for name, seconds in measurement["contestants"].items()
    }
    return measurement


def _contestants(
    settings: Settings, config: F2LLMConfig, packed: dict[str, Any], dtype: torch.dtype
) -> dict[str, Contestant]:
    encoders = build_models(config, dtype, settings.compile)
    learners = build_models(config, compile=settings.compile)
    contestants = {}
    for name, ending in (("ours", ""), ("ours_compiled", "_compiled")):
        if name in encoders:
            extra = {"warm_ups": 2 if ending else 1, "optional": bool(ending)}
            contestants[f"forward{ending}"] = Contestant(_forward(encoders[name].eval(), packed), **extra)
            contestants[f"step{ending}"] = Contestant(stepper(learners[name], packed, embed, dtype), **extra)
    return contestants


def _forward(model: torch.nn.Module, packed: dict[str, Any]) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def forward() -> Tensor:
        return embed(model, packed)

    return forward


def _products(config: F2LLMConfig, tokens: int, dtype: torch.dtype, backward: bool) -> Callable[[], None]:
    """All products of all layers, on tensors that are there already."""
    shapes = linear_shapes(config)
    generator = torch.Generator(device()).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device()).to(dtype)

    states = {width: draw(tokens, width) for width in {width for shape in shapes for width in shape}}
    weights = [draw(outputs, inputs) for inputs, outputs in shapes]

    def products() -> None:
        for _ in range(config.num_hidden_layers):
            for weight in weights:
                outputs, inputs = weight.shape
                torch.mm(states[inputs], weight.t())
                if backward:
                    torch.mm(states[outputs], weight)
                    torch.mm(states[outputs].t(), states[inputs])

    return products
