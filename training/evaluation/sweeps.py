"""Which models of an evaluation are steps of one training."""

from __future__ import annotations

import re
from dataclasses import dataclass

from training.evaluation.records import Evaluation, ModelRecord
from training.evaluation.selection import labels

# A word, what separates it, and the step: step-1000, stage2-checkpoint_200; step1000 is common, too. The digits that a
# commit's hash ends in follow no separator.
_REVISION = re.compile(r"(?P<before>|.*[-_/.])(?P<word>[a-z]+)(?:[-_/]|(?<=step))(?P<step>\d+)", re.IGNORECASE)
# Folders that a run leaves behind. Other models are called something-2, too.
_FOLDER = re.compile(r"(?P<run>.+)/(?P<word>checkpoint)-(?P<step>\d+)")


@dataclass(frozen=True)
class Sweep:
    """Steps of one training.

    Attributes:
        name: Of the model, with what its revisions have in common if that is more than a word.
        unit: What is counted: ``step``, ``checkpoint``, ``epoch``.
        steps: Each with the label of its model, from the first to the last.
        final: Label of the finished model, that without a revision; None if there is none.
    """

    name: str
    unit: str
    steps: list[tuple[int, str]]
    final: str | None


def find_sweeps(evaluation: Evaluation) -> list[Sweep]:
    """The models that were scored at two steps or more.

    A step is the number at the end of a revision, or of a folder ``checkpoint-N``, whose finished model is the run's
    own folder or ``model`` in it.
    """
    scored = set(labels(evaluation))
    records = [record for record in evaluation.models if record.label in scored]
    plain = {record.name.rstrip("/"): record.label for record in records if record.revision is None}
    steps: dict[tuple[str, str, str], dict[int, str]] = {}
    for record in records:
        if place := _place(record):
            *series, step = place
            steps.setdefault((series[0], series[1], series[2]), {})[step] = record.label
    return [
        Sweep(
            f"{model}@{before}{unit}" if before else model,
            unit,
            sorted(found.items()),
            plain.get(model) or plain.get(f"{model}/model"),
        )
        for (model, before, unit), found in steps.items()
        if len(found) > 1
    ]


def _place(record: ModelRecord) -> tuple[str, str, str, int] | None:
    """Name of the model, what comes before the word in its revision, the word, and the step."""
    name = record.name.rstrip("/")
    if record.revision is not None:
        found = _REVISION.fullmatch(record.revision)
        return found and (name, found["before"], found["word"], int(found["step"]))
    found = _FOLDER.fullmatch(name)
    return found and (found["run"], "", found["word"], int(found["step"]))


def finished_models(evaluation: Evaluation) -> list[str]:
    """Labels of the models that have scores, without the steps that led to them; the last one stands for a run."""
    passed = set()
    for sweep in find_sweeps(evaluation):
        of_sweep = [label for _, label in sweep.steps]
        passed |= set(of_sweep if sweep.final else of_sweep[:-1])
    return [label for label in labels(evaluation) if label not in passed]
