"""One point of ``pruning.py``: reads what to measure from standard input, writes the results to standard output."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.benchmarks.growth_point import time_and_memory
from tests.benchmarks.models import VOCAB_SIZE, configuration, random_model
from tests.benchmarks.settings import Settings, device
from tests.benchmarks.texts import DISTRIBUTIONS
from training.models.model_size import count_parameters
from training.pruning.importance import calibrate, weight_importance
from training.pruning.pruning import prune
from training.pruning.shape import pruned_config

__all__ = ["CALIBRATION_PRECISION", "SOURCE", "calibration_batch"]

CALIBRATION_PRECISION = "fp32"
SOURCE = "f2llm-v2-0.6b"
_TINY_TARGET = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def calibration_batch(texts: int) -> tuple[Tensor, list[int]]:
    """A packed batch of so many random texts."""
    lengths = DISTRIBUTIONS["log_normal"](texts).tolist()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCAB_SIZE, (1, sum(lengths)), generator=generator), lengths


def _calibrating(model: F2LLMModel, settings: Settings, texts: int) -> dict[str, Any]:
    batch = calibration_batch(texts)
    model.to(device())
    figures = time_and_memory(lambda: calibrate(model, [batch]), settings.repeats, device())
    return {"value": texts, "tokens": sum(batch[1]), **figures}


def _cutting(model: F2LLMModel, settings: Settings, family: str) -> dict[str, Any]:
    model.cpu()
    target = pruned_config(model.config, _TINY_TARGET if settings.quick else {"family": family})
    importance = weight_importance(model)
    figures = time_and_memory(lambda: prune(model, target, importance), settings.repeats, torch.device("cpu"))
    return {"value": count_parameters(target), **figures}


_AXES = {"calibration": _calibrating, "cutting": _cutting}


def main() -> None:
    request = json.load(sys.stdin)
    settings = Settings(**request["settings"])
    if settings.quick:
        torch.set_num_threads(1)
    # With the published vocabulary, most of what comes out of the smallest cut.
    model = random_model(configuration(settings) if settings.quick else F2LLMConfig.from_family(SOURCE))
    points = [
        {
            "axis": task["axis"],
            "precision": CALIBRATION_PRECISION,
            **_AXES[task["axis"]](model, settings, task["value"]),
        }
        for task in request["tasks"]
    ]
    sys.stdout.write(json.dumps(points) + "\n")


if __name__ == "__main__":
    main()
