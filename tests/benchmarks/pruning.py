"""Pruning: what calibration adds to a forward pass, and time and memory of calibrating and of cutting.

Memory is that of a process of its own for each point (``pruning_point.py``): the peak of a process never falls again.
"""

from __future__ import annotations

from typing import Any

import torch

from modeling_f2llm import F2LLMModel
from tests.benchmarks.growth import measure_apart
from tests.benchmarks.models import configuration, random_model
from tests.benchmarks.pruning_point import CALIBRATION_PRECISION, SOURCE, calibration_batch
from tests.benchmarks.settings import Settings, device
from tests.benchmarks.suite import Suite
from tests.benchmarks.timing import Contestant, add_ratio, measure
from training.pruning.importance import Importance, calibrate

__all__ = ["run"]

_TARGETS = ("f2llm-v2-80m", "f2llm-v2-160m", "f2llm-v2-330m")


def run(settings: Settings, suite: Suite) -> None:
    """Times calibration beside a plain forward pass, then measures each point."""
    texts = settings.pick(quick=[2], cpu=[4, 16], cuda=[64, 1024])
    suite.notes += [
        f"The model is of the {SOURCE} shape, all layers, fp32; texts are log-normal around 90 tokens, all in one "
        "packed batch. bf16 is autocast.",
        f"Calibration by texts is in {CALIBRATION_PRECISION}; cutting is on the CPU, its value is the parameters that "
        "come out: plan, slices and validation, without reading or writing files.",
        "Memory is the peak above that of the process with its libraries and the larger model loaded.",
    ]
    model = random_model(configuration(settings, SOURCE)).to(device())
    for precision in settings.precisions:
        suite.add(_calibration(settings, model, precision, texts[0]))
    del model
    tasks = [{"axis": "calibration", "value": count} for count in texts]
    tasks += [{"axis": "cutting", "value": name} for name in (_TARGETS[:1] if settings.quick else _TARGETS)]
    # In a quick run one process for all: most of its time goes into its imports.
    for group in [tasks] if settings.quick else [[task] for task in tasks]:
        try:
            points = measure_apart("pruning_point", settings, group)
        except RuntimeError as error:
            suite.skip(", ".join(f"{task['axis']} {task['value']}" for task in group), str(error))
            continue
        for point in points:
            suite.add_point(point)


def _calibration(settings: Settings, model: F2LLMModel, precision: str, texts: int) -> dict[str, Any]:
    input_ids, lengths = calibration_batch(texts)
    autocast = precision == "bf16"

    def forward() -> None:
        with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=autocast):
            model(input_ids=input_ids.to(device()), sequence_lengths=lengths)

    def calibration() -> Importance:
        return calibrate(model, [(input_ids, lengths)], autocast=autocast)

    contestants = {"forward": Contestant(forward), "calibration": Contestant(calibration)}
    facts = {"texts": texts, "tokens": sum(lengths)}
    measurement = measure("calibration", contestants, settings.repeats, precision=precision, facts=facts)
    add_ratio(measurement, "forward", "calibration")
    return measurement
