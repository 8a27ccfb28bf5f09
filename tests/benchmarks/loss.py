"""What the losses cost at the published batch, as a share of a step.

The losses are measured as they are: 512 rows, 1024 dimensions, seven negatives, all matryoshka widths, forward and
backward. A step of the 0.6B model at that batch is too long to run here: one of its layers is measured, forward and
backward, on a few rows, and multiplied by the layers of the model and by the tokens of the batch.
"""

from __future__ import annotations

import torch

from modeling_f2llm import FAMILY, matryoshka_dims
from tests.benchmarks.common import NEGATIVES, batches, build_models, device, row_lengths
from tests.benchmarks.step import forward_backward
from tests.benchmarks.timing import Contestant, measure, spread
from training.trainer.step import Objective

_FAMILY_NAME = "f2llm-v2-0.6b"


def run(settings, suite):
    """Time losses and one layer in every precision."""
    full_width, _, layers, *_ = FAMILY[_FAMILY_NAME]
    rows = settings.pick(quick=16, cpu=512, cuda=512)
    width = settings.pick(quick=32, cpu=full_width, cuda=full_width)
    few = settings.pick(quick=1, cpu=4, cuda=64)
    tokens, measured_tokens = int(row_lengths(settings, rows).sum()), int(row_lengths(settings, few).sum())
    packed, _ = batches(row_lengths(settings, few))
    facts = {"rows": rows, "dimensions": width, "tokens": tokens, "measured_tokens": measured_tokens}
    for precision in settings.precisions:
        layer = build_models(settings, name=_FAMILY_NAME, num_hidden_layers=1)["ours"].train()
        contestants = {
            "losses": Contestant(_losses(rows, width)),
            "one_layer": Contestant(forward_backward(layer, packed, precision)),
        }
        measurement = measure("losses", contestants, settings.repeats, precision=precision, facts=facts)
        scale = layers * tokens / measured_tokens
        pairs = zip(*(measurement["contestants"][name]["samples"] for name in contestants), strict=True)
        share = spread([loss / (loss + layer * scale) for loss, layer in pairs])
        named = {"label": "share of the step", "baseline": "extrapolated step", "contestant": "losses"}
        measurement["ratios"].append({**named, **share})
        suite.add(measurement)


def _losses(rows, width):
    """The objective and its gradient; in fp32 under autocast too, so there is one of it."""
    generator = torch.Generator(device()).manual_seed(0)
    texts = 2 + NEGATIVES
    embeddings = torch.randn(rows * texts, width, generator=generator, device=device()).requires_grad_()
    index = torch.arange(rows * texts, device=device()).view(rows, texts)
    batch = {"query": index[:, 0], "positive": index[:, 1], "negatives": index[:, 2:], "task_type": "retrieval"}
    objective = Objective(dims=matryoshka_dims(width))

    def losses():
        torch.stack(list(objective.terms(embeddings, batch).values())).sum().backward()
        embeddings.grad = None

    return losses
