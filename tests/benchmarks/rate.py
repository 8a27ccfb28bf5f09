"""The fraction of the device's own matrix-product rate that the forward pass and the step reach.

The rate is what ``torch.mm`` reaches on the products of the model itself: tokens of the batch × input width × output
width of every linear layer, for training also the two products of its backward pass. Floating-point operations are
counted as two per weight and token, and four per pair of tokens, head and dimension that causal attention looks at;
of the last layer only those that the embeddings need.
"""

from __future__ import annotations

from functools import partial

import torch

from tests.benchmarks.common import PRECISIONS, batches, build_models, configuration, device
from tests.benchmarks.step import embed, stepper, training_lengths
from tests.benchmarks.timing import Contestant, add_ratio, measure


def linear_shapes(config):
    """(input width, output width) of the linear layers of one transformer layer."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = [*((width, out) for out in (queries, keys, keys)), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def run(settings, suite):
    """Time products, forward pass and step in every precision."""
    packed, _ = batches(training_lengths(settings, suite))
    config, lengths = configuration(settings), packed["sequence_lengths"]
    tokens, heads = sum(lengths), config.num_attention_heads * config.head_dim
    of_each = [2 * inputs * outputs for inputs, outputs in linear_shapes(config)]
    linear = config.num_hidden_layers * tokens * sum(of_each)
    attention = heads * sum(2 * length * (length + 1) for length in lengths)
    # Of the last layer, keys and values of all tokens, and the rest of the last token of each text.
    last = tokens * sum(of_each[1:3]) + len(lengths) * (of_each[0] + sum(of_each[3:])) + 4 * heads * tokens
    forward = (config.num_hidden_layers - 1) * (tokens * sum(of_each) + attention) + last
    operations = {"products": linear, "forward": forward, "products_forward_and_backward": 3 * linear}
    operations["step"] = 3 * operations["forward"]
    for precision in settings.precisions:
        dtype = PRECISIONS[precision]
        encoders = build_models(settings, dtype, compile=settings.compile)
        learners = build_models(settings, compile=settings.compile)
        contestants = {
            "products": Contestant(products(config, tokens, dtype, backward=False)),
            "products_forward_and_backward": Contestant(products(config, tokens, dtype, backward=True)),
        }
        for name, compiled in (("ours", False), ("ours_compiled", True)):
            if name in encoders:
                ending = "_compiled" if compiled else ""
                forward = torch.inference_mode()(partial(embed, encoders[name].eval(), packed))
                contestants[f"forward{ending}"] = Contestant.compiled(forward, compiled)
                contestants[f"step{ending}"] = Contestant.compiled(stepper(learners[name], packed, precision), compiled)
        measurement = measure("rate", contestants, settings.repeats, precision=precision, facts={"tokens": tokens})
        counts = {name: operations[name.removesuffix("_compiled")] for name in measurement["contestants"]}
        for name in (name for name in counts if not name.startswith("products")):
            baseline = "products" if name.startswith("forward") else "products_forward_and_backward"
            add_ratio(measurement, baseline, name, "fraction of the rate", counts[name] / counts[baseline])
        measurement["facts"]["gigaflops_per_second"] = {
            name: counts[name] / seconds["median"] / 1e9 for name, seconds in measurement["contestants"].items()
        }
        suite.add(measurement)


def products(config, tokens, dtype, backward):
    """All products of all layers, on tensors that are there already."""
    shapes = linear_shapes(config)
    generator = torch.Generator(device()).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=device()).to(dtype)

    states = {width: draw(tokens, width) for width in {width for shape in shapes for width in shape}}
    weights = [draw(outputs, inputs) for inputs, outputs in shapes]

    def multiply():
        for _ in range(config.num_hidden_layers):
            for weight in weights:
                outputs, inputs = weight.shape
                torch.mm(states[inputs], weight.t())
                if backward:
                    torch.mm(states[outputs], weight)
                    torch.mm(states[outputs].t(), states[inputs])

    return multiply
