"""Pruning: what calibration adds to a forward pass, and time and memory of calibrating and of cutting.

Each point runs in its own process, which this module starts: the peak memory of a process never falls again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.benchmarks.growth import answer, measure_apart, time_and_memory
from tests.benchmarks.machine import Settings, device
from tests.benchmarks.models import VOCAB_SIZE, configuration, random_model
from tests.benchmarks.texts import DISTRIBUTIONS
from tests.benchmarks.timing import Contestant, Suite, add_ratio, measure
from training.models.model_folder import count_parameters
from training.pruning.importance import Importance, calibrate, weight_importance
from training.pruning.plan import pruned_config
from training.pruning.pruning import prune

_PRECISION, _SOURCE = "fp32", "f2llm-v2-0.6b"
_TARGETS = ("f2llm-v2-80m", "f2llm-v2-160m", "f2llm-v2-330m")
_TINY_TARGET = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def run(settings: Settings, suite: Suite) -> None:
    """Time calibration beside a plain forward pass, then measure each point."""
    texts = settings.pick(quick=[2], cpu=[4, 16], cuda=[64, 1024])
    suite.notes += [
        f"The model is of the {_SOURCE} shape, all layers, fp32; texts are log-normal around 90 tokens, all in one "
        "packed batch. bf16 is autocast.",
        f"Calibration by texts is in {_PRECISION}; cutting is on the CPU, its value is the parameters that come out: "
        "plan, slices and validation, without reading or writing files.",
        "Memory is the peak above that of the process with its libraries and the larger model loaded.",
    ]
    model = random_model(configuration(settings, _SOURCE)).to(device())
    for precision in settings.precisions:
        suite.add(_calibration(settings, model, precision, texts[0]))
    del model
    tasks = [{"axis": "calibration", "value": count} for count in texts]
    tasks += [{"axis": "cutting", "value": name} for name in (_TARGETS[:1] if settings.quick else _TARGETS)]
    for task in tasks:
        try:
            suite.add_point(measure_apart("pruning", settings, {**task, "precision": _PRECISION}))
        except RuntimeError as error:
            suite.skip(f"{task['axis']} {task['value']}", str(error))


def _texts(count: int) -> tuple[Tensor, list[int]]:
    """Return a packed batch of random texts, and their lengths."""
    lengths = DISTRIBUTIONS["log_normal"](count).tolist()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCAB_SIZE, (1, sum(lengths)), generator=generator), lengths


def _calibration(settings: Settings, model: F2LLMModel, precision: str, texts: int) -> dict[str, Any]:
    input_ids, lengths = _texts(texts)
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


def _model(settings: Settings) -> F2LLMModel:
    # The published vocabulary: most of the smallest model that is cut out.
    return random_model(configuration(settings) if settings.quick else F2LLMConfig.from_family(_SOURCE))


def _calibrating(settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    batch, model = _texts(task["value"]), _model(settings).to(device())
    figures = time_and_memory(lambda: calibrate(model, [batch]), settings.repeats, device())
    return {"tokens": sum(batch[1]), **figures}


def _cutting(settings: Settings, task: dict[str, Any]) -> dict[str, Any]:
    model = _model(settings).cpu()
    target = pruned_config(model.config, _TINY_TARGET if settings.quick else {"family": task["value"]})
    importance = weight_importance(model)
    figures = time_and_memory(lambda: prune(model, target, importance), settings.repeats, torch.device("cpu"))
    return {"value": count_parameters(target), **figures}


if __name__ == "__main__":
    answer({"calibration": _calibrating, "cutting": _cutting})
