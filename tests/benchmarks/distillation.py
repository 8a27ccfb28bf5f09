"""What distillation adds to a training step: nothing, a read from the teacher's cache, or the teacher's forward pass.

The student is the shape that trains in ``step``; the teacher has the 0.6B shape with the same share of its layers.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch

from tests.benchmarks.common import autocast, batches, build_models, configuration, device
from tests.benchmarks.step import embed, stepper, training_lengths
from tests.benchmarks.timing import Contestant
from training.distillation.teacher_cache import TeacherCache

_TEACHER = "f2llm-v2-0.6b"
# As many texts are in the cache beside those of the batch: reads are spread over a file, as in training.
_OTHER_TEXTS = 20_000


def run(settings, suite):
    """Time the three steps in every precision."""
    lengths = training_lengths(settings, suite)
    batch, _ = batches(lengths)
    student = configuration(settings, **settings.step_shape)
    teacher = _teacher(settings)
    facts = {"rows": len(lengths), "real_tokens": batch["input_ids"].numel(), "texts": lengths.size}
    pairs = [(name, "without", f"time of {name} over the time of without") for name in ("cached", "online")]
    for precision in settings.precisions:

        def online(precision=precision):
            with torch.no_grad(), autocast(precision):
                return embed(teacher, batch)[:, : student.hidden_size].float()

        with TemporaryDirectory() as folder:
            cached = _read(Path(folder), online(), teacher.config.hidden_size)
            contestants = {
                name: Contestant(
                    stepper(build_models(settings, **settings.step_shape)["ours"], batch, precision, targets=targets)
                )
                for name, targets in (("without", lambda: None), ("cached", cached), ("online", online))
            }
            known = {"precision": precision, "check": _check, "facts": facts}
            suite.compare("a step of distillation", contestants, settings.repeats, pairs, **known)


def _teacher(settings):
    whole = configuration(settings, _TEACHER).num_hidden_layers
    share = settings.step_shape.get("num_hidden_layers")
    layers = {} if share is None else {"num_hidden_layers": max(whole * share // 8, 1)}
    teacher = build_models(settings, name=_TEACHER, **layers)["ours"].eval()
    # Where both have one shape, as in a quick run, it would say what the student says.
    with torch.no_grad():
        teacher.norm.weight.mul_(2)
    return teacher


def _read(folder, embeddings, teacher_width):
    """Read the batch's texts from a cache that holds others, too."""
    texts, width = embeddings.shape
    source = SimpleNamespace(name="benchmark", description={"fingerprint": "", "texts": texts + _OTHER_TEXTS})
    places = np.sort(np.random.default_rng(0).permutation(texts + _OTHER_TEXTS)[:texts])
    whole = torch.zeros(texts + _OTHER_TEXTS, teacher_width)
    whole[places, :width] = embeddings.cpu()
    cache = TeacherCache(folder, [source], {}, teacher_width)
    cache.fill(lambda _, positions: whole[positions])
    return lambda: torch.from_numpy(cache.read("benchmark", places, width)).to(device()).float()


def _check(losses):
    """The contrastive terms are the same in all three steps, the distillation term from the cache and online."""
    for name, expected in [*losses["without"].items(), ("distillation", losses["online"]["distillation"])]:
        found = [terms[name] for terms in losses.values() if name in terms]
        assert len(found) == (2 if name == "distillation" else 3), f"the steps lack the term {name}: {losses}"
        worst = max(abs(loss - expected) for loss in found)
        assert worst <= 1e-2 * abs(expected), f"the first losses differ in {name}: {losses}"
