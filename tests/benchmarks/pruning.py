"""Pruning: what calibration adds to a forward pass, and time and memory of calibrating and of cutting."""

from __future__ import annotations

import torch

from modeling_f2llm import F2LLMConfig
from tests.benchmarks.apart import measure_apart, time_and_memory
from tests.benchmarks.common import DISTRIBUTIONS, VOCAB_SIZE, autocast, configuration, device, random_model
from tests.benchmarks.timing import Contestant
from training.models.model_folder import count_parameters
from training.pruning.importance import calibrate, weight_importance
from training.pruning.plan import pruned_config
from training.pruning.pruning import prune

_PRECISION, _SOURCE = "fp32", "f2llm-v2-0.6b"
_TARGETS = ("f2llm-v2-80m", "f2llm-v2-160m", "f2llm-v2-330m")
_TINY_TARGET = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}


def run(settings, suite):
    """Time calibration beside a plain forward pass, then measure each point."""
    texts = settings.pick(quick=[2], cpu=[4, 16], cuda=[64, 1024])
    _calibration(settings, suite, texts[0])
    tasks = [{"axis": "calibration", "value": count} for count in texts]
    tasks += [{"axis": "cutting", "value": name} for name in (_TARGETS[:1] if settings.quick else _TARGETS)]
    for task in tasks:
        try:
            suite.add_point(measure_apart(f"pruning.{task['axis']}", settings, {**task, "precision": _PRECISION}))
        except RuntimeError as error:
            suite.skip(f"{task['axis']} {task['value']}", str(error))


def _texts(count):
    """Return a packed batch of random texts, and their lengths."""
    lengths = DISTRIBUTIONS["log_normal"](count).tolist()
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCAB_SIZE, (1, sum(lengths)), generator=generator), lengths


def _calibration(settings, suite, texts):
    model = random_model(configuration(settings, _SOURCE)).to(device())
    input_ids, lengths = _texts(texts)
    facts = {"texts": texts, "tokens": sum(lengths)}
    for precision in settings.precisions:

        def forward(precision=precision):
            with torch.no_grad(), autocast(precision):
                model(input_ids=input_ids.to(device()), sequence_lengths=lengths)

        def calibrating(precision=precision):
            return calibrate(model, [(input_ids, lengths)], autocast=precision == "bf16")

        contestants = {"forward": Contestant(forward), "calibration": Contestant(calibrating)}
        known = {"precision": precision, "facts": facts}
        suite.compare("calibration", contestants, settings.repeats, [("forward", "calibration")], **known)


def _model(settings):
    # The published vocabulary: most of the smallest model that is cut out.
    return random_model(configuration(settings) if settings.quick else F2LLMConfig.from_family(_SOURCE))


def calibration(settings, task):
    """Calibrate on ``value`` texts."""
    batch, model = _texts(task["value"]), _model(settings).to(device())
    figures = time_and_memory(lambda: calibrate(model, [batch]), settings.repeats, device())
    return {"tokens": sum(batch[1]), **figures}


def cutting(settings, task):
    """Cut the shape ``value`` out of the larger model."""
    model = _model(settings).cpu()
    target = pruned_config(model.config, _TINY_TARGET if settings.quick else {"family": task["value"]})
    importance = weight_importance(model)
    figures = time_and_memory(lambda: prune(model, target, importance), settings.repeats, torch.device("cpu"))
    return {"value": count_parameters(target), **figures}
