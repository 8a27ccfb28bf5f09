"""What the losses cost at the published batch, as a share of a step.

The losses are measured as they are: 512 rows, 1024 dimensions, seven negatives, all matryoshka widths, forward and
backward. A step of the 0.6B model at that batch is too long to run here: one of its layers is measured, forward and
backward, on a few rows, and multiplied by the layers of the model and by the tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from modeling_f2llm import FAMILY, matryoshka_dims
from tests.benchmarks.machine import PRECISIONS, Settings, device
from tests.benchmarks.models import build_models, configuration
from tests.benchmarks.step import embed
from tests.benchmarks.texts import NEGATIVES, batches, row_lengths
from tests.benchmarks.timing import Contestant, Suite, measure, spread
from training.trainer.step import Objective

_FAMILY_NAME = "f2llm-v2-0.6b"


def run(settings: Settings, suite: Suite) -> None:
    """Time losses and one layer in every precision."""
    rows = settings.pick(quick=16, cpu=512, cuda=512)
    width = settings.pick(quick=32, cpu=FAMILY[_FAMILY_NAME][0], cuda=FAMILY[_FAMILY_NAME][0])
    layers = FAMILY[_FAMILY_NAME][2]
    few = settings.pick(quick=1, cpu=4, cuda=64)
    tokens, measured_tokens = int(row_lengths(settings, rows).sum()), int(row_lengths(settings, few).sum())
    suite.notes.append(
        f"Losses of {rows} rows with {NEGATIVES} negatives at {width} dimensions, matryoshka, forward and backward. "
        f"The step is extrapolated: one layer of {_FAMILY_NAME}, forward and backward on {few} rows "
        f"({measured_tokens:,} tokens), times {layers} layers, times {tokens:,} / {measured_tokens:,} tokens; no "
        "optimizer, no recomputation, which would make the share smaller."
    )
    for precision in settings.precisions:
        contestants = {
            "losses": Contestant(_losses(rows, width)),
            "one_layer": Contestant(_layer(settings, few, PRECISIONS[precision])),
        }
        facts = {"rows": rows, "dimensions": width, "tokens": tokens, "measured_tokens": measured_tokens}
        measurement = measure("losses", contestants, settings.repeats, precision=precision, facts=facts)
        scale = layers * tokens / measured_tokens
        pairs = zip(*(measurement["contestants"][name]["samples"] for name in contestants), strict=True)
        share = spread([loss / (loss + layer * scale) for loss, layer in pairs])
        measurement["ratios"].append(
            {"label": "share of the step", "baseline": "extrapolated step", "contestant": "losses", **share}
        )
        suite.add(measurement)


def _losses(rows: int, width: int) -> Callable[[], None]:
    """The objective and its gradient; in fp32 under autocast too, so there is one of it."""
    generator = torch.Generator(device()).manual_seed(0)
    texts = 2 + NEGATIVES
    embeddings = torch.randn(rows * texts, width, generator=generator, device=device()).requires_grad_()
    index = torch.arange(rows * texts, device=device()).view(rows, texts)
    batch = {"query": index[:, 0], "positive": index[:, 1], "negatives": index[:, 2:], "task_type": "retrieval"}
    objective = Objective(dims=matryoshka_dims(width))

    def losses() -> None:
        torch.stack(list(objective.terms(embeddings, batch).values())).sum().backward()
        embeddings.grad = None

    return losses


def _layer(settings: Settings, rows: int, dtype: torch.dtype) -> Callable[[], None]:
    models = build_models(configuration(settings, _FAMILY_NAME, num_hidden_layers=1))
    model = models["ours"].train()
    packed, _ = batches(row_lengths(settings, rows))

    def layer() -> None:
        with torch.autocast(device().type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            embeddings = embed(model, packed)
        embeddings.square().mean().backward()
        model.zero_grad()

    return layer
