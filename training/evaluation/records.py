"""Records of an evaluation (models, scores, examples), and those that a table, figure or comparison is about."""

from __future__ import annotations

import difflib
import json
import logging
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from training.common.errors import UserError, in_one_line
from training.common.outputs import whole_file, write_whole

logger = logging.getLogger("training")

# Bits per stored number, by sentence-transformers' name of the quantization.
PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}
# Tokens per text in the published evaluation.
DEFAULT_MAX_LENGTH = 8192
SCORES, EXAMPLES = "scores.json", "examples.npz"
# A word, a separator and the step: step-1000, stage2-checkpoint_200; step1000 is common, too. Digits at the end of a
# commit's hash follow no separator.
_REVISION = re.compile(r"(?P<before>|.*[-_/.])(?P<word>[a-z]+)(?:[-_/]|(?<=step))(?P<step>\d+)", re.IGNORECASE)


def layers_text(layers: int) -> str:
    """Return how options of a record name a model that ends after so many layers."""
    return "1 layer" if layers == 1 else f"{layers} layers"


def bytes_per_vector(dimension: int, precision: str) -> int:
    """Return the bytes of a stored embedding; binary ones are packed eight to a byte."""
    return -(-dimension * PRECISIONS[precision] // 8)


@dataclass(frozen=True)
class ModelRecord:
    """A model that was evaluated; name and revision are as the user gave them."""

    name: str
    revision: str | None = None
    parameters: int | None = None
    dimension: int | None = None  # the full width
    texts_per_second: float | None = None
    identity: str | None = None  # commit, or a digest of the files
    options: str = ""  # those that change embeddings and differ from the defaults: ``prompts model``

    @property
    def layers(self) -> int | None:
        """The layers after which the model ends, if it is an exit."""
        found = re.search(r"(\d+) layers?\b", self.options)
        return int(found[1]) if found else None

    def of_exit(self, layers: int, parameters: int) -> ModelRecord:
        """Return the record of the model's first layers; the time of a pass is that of all of them."""
        options = ", ".join(filter(None, [self.options, layers_text(layers)]))
        return replace(self, options=options, parameters=parameters, texts_per_second=None)

    @property
    def label(self) -> str:
        """Name, revision and options, as tables show them."""
        named = self.name if self.revision is None else f"{self.name}@{self.revision}"
        return f"{named} ({self.options})" if self.options else named


@dataclass(frozen=True)
class Score:
    """One score; tasks, types, subsets, splits and metrics are mteb's."""

    model: str  # a label
    task: str
    task_type: str
    subset: str
    languages: tuple[str, ...]  # ISO 639-3 codes with script, such as ``deu-Latn``; two for a bitext
    dimension: int
    precision: str
    metric: str
    value: float  # the main metric, not in percent
    examples: int  # the number of queries, pairs or texts
    split: str = "test"
    data: str = ""  # the revision of the task's data

    @property
    def key(self) -> str:
        """Unique key of the score in an evaluation."""
        return "|".join((self.model, self.task, self.split, self.subset, str(self.dimension), self.precision))


@dataclass
class Evaluation:
    """All results of an evaluation: one row per score, with which all tables, figures and tests are computed."""

    models: list[ModelRecord] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    # By :attr:`Score.key`, the ``(n,)`` scores of the examples in the task's order, where the metric is their mean.
    examples: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # why a task could not be run, by ``label: task``

    def select(self, scores: Iterable[Score] | None = None, **fields: object) -> list[Score]:
        """Return the scores whose fields have the given values."""
        chosen = self.scores if scores is None else scores
        return [score for score in chosen if all(getattr(score, name) == value for name, value in fields.items())]

    def add_model(self, record: ModelRecord) -> None:
        """Add a model or replace its record; scores of another identity of the model are dropped."""
        models = {model.label: model for model in self.models}
        before = models.get(record.label, record)
        if before.identity != record.identity:
            self._drop(self.select(model=record.label))
            self.forget_failures(f"{record.label}: ")
        elif record.texts_per_second is None:
            record = replace(record, texts_per_second=before.texts_per_second)
        self.models = list({**models, record.label: record}.values())

    def put(self, scores: Sequence[Score], examples: Mapping[str, NDArray[np.float32]]) -> None:
        """Add all scores of a model, task, dimension and precision, with their examples; they replace earlier ones."""
        views = {(score.model, score.task, score.dimension, score.precision) for score in scores}
        self._drop([each for each in self.scores if (each.model, each.task, each.dimension, each.precision) in views])
        self.scores += scores
        self.examples |= examples

    def _drop(self, scores: Sequence[Score]) -> None:
        keys = {score.key for score in scores}
        self.scores = [score for score in self.scores if score.key not in keys]
        self.examples = {key: values for key, values in self.examples.items() if key not in keys}

    def forget_failures(self, *prefixes: str) -> None:
        """Drop the failures whose keys begin with one of the prefixes."""
        self.failures = {key: why for key, why in self.failures.items() if not key.startswith(prefixes)}

    def save(self, folder: Path) -> None:
        """Write ``scores.json`` and ``examples.npz`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / EXAMPLES) as partial, partial.open("wb") as handle:
            np.savez_compressed(handle, **self.examples)
        models, scores = (list(map(asdict, records)) for records in (self.models, self.scores))
        content = {"version": 2, "models": models, "scores": scores, "failures": self.failures}
        write_whole(folder / SCORES, json.dumps(content, indent=1) + "\n")


def load_evaluation(folder: Path, missing_ok: bool = False) -> Evaluation:
    """Load what :meth:`Evaluation.save` wrote; with ``missing_ok``, a folder without scores is an empty evaluation."""
    if missing_ok and not (folder / SCORES).exists():
        return Evaluation()
    try:
        content = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        models = [ModelRecord(**model) for model in content["models"]]
        scores = [Score(**{**score, "languages": tuple(score["languages"])}) for score in content["scores"]]
        evaluation = Evaluation(models, scores, failures=dict(content["failures"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = in_one_line(error)
        raise UserError(f"{folder}: holds no whole evaluation ({why}); delete {SCORES} and run it again") from None
    try:
        evaluation.examples.update(np.load(folder / EXAMPLES) if (folder / EXAMPLES).exists() else {})
    # Damaged examples must not cost the scores.
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        logger.warning("%s: not read, nothing is tested (%s)", folder / EXAMPLES, in_one_line(error))
    return evaluation


def labels(evaluation: Evaluation) -> list[str]:
    """Return the labels of the models that have scores, in the order of the evaluation's models."""
    scored = {score.model for score in evaluation.scores}
    return [model.label for model in evaluation.models if model.label in scored]


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones, and offer similar ones."""
    if name not in (known := sorted(set(known))):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:10]
        raise UserError(f"{kind} {name!r} is unknown; there are {', '.join(near) or 'none'}")


def model_scores(evaluation: Evaluation, model: str, dimension: int | None = None) -> list[Score]:
    """Return the float32 scores of one model at one dimension (default: the largest)."""
    check_known("model", model, (score.model for score in evaluation.scores))
    found = evaluation.select(model=model, precision="float32")
    known = sorted({score.dimension for score in found}, reverse=True)
    if not known or dimension not in (None, *known):
        offered = ", ".join(map(str, known)) or "none"
        raise UserError(f"model {model!r} lacks these scores in float32; dimensions with scores: {offered}")
    return evaluation.select(found, dimension=dimension or known[0])


def shared_scores(evaluation: Evaluation, models: Iterable[str]) -> dict[str, list[Score]]:
    """Return the float32 scores at full width, by model, of the tasks that all models have; empty if there are none.

    Models without such scores are ignored.
    """
    scored = [model for model in models if evaluation.select(model=model, precision="float32")]
    return of_shared_tasks({model: model_scores(evaluation, model) for model in scored})


def of_shared_tasks(groups: Mapping[Any, Sequence[Score]]) -> dict[Any, list[Score]]:
    """Return the scores of the tasks that all groups have; empty if there are none."""
    tasks = set.intersection(*({score.task for score in group} for group in groups.values())) if groups else set()
    return {key: [score for score in group if score.task in tasks] for key, group in groups.items() if tasks}


def by_task(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """Return the scores of each task, sorted by split and subset."""
    tasks: dict[str, list[Score]] = {score.task: [] for score in scores}
    for score in sorted(scores, key=lambda score: (score.split, score.subset)):
        tasks[score.task].append(score)
    return tasks


def task_mean(scores: Sequence[Score]) -> float:
    """Return the macro mean: the mean over tasks of their means over subsets, as MTEB averages."""
    return fmean(fmean(score.value for score in subsets) for subsets in by_task(scores).values())


@dataclass(frozen=True)
class Sweep:
    """Checkpoints of one training: labels by step (or checkpoint, epoch, …), and that of the finished model."""

    name: str
    unit: str
    steps: list[tuple[int, str]]
    final: str | None


def find_sweeps(evaluation: Evaluation) -> list[Sweep]:
    """Return the trainings of which two or more checkpoints were scored.

    A step is the number at the end of a revision, or of a folder ``checkpoint-N``. The finished model of such a folder
    is the run's folder or ``model`` in it.
    """
    scored, plain = set(labels(evaluation)), {}
    steps: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for record in evaluation.models:
        name, revision = record.name.rstrip("/"), record.revision
        # Other models are called something-2, too.
        if revision is None and (folder := re.fullmatch(r"(.+)/(checkpoint-\d+)", name)):
            name, revision = folder.groups()
        if record.label not in scored:
            continue
        if revision is None:
            plain[name] = record.label
        elif found := _REVISION.fullmatch(revision):
            steps[name, found["before"], found["word"]][int(found["step"])] = record.label
    sweeps = []
    for (model, before, unit), found in steps.items():
        if len(found) > 1:
            final = plain.get(model) or plain.get(f"{model}/model")
            sweeps.append(Sweep(f"{model}@{before}{unit}" if before else model, unit, sorted(found.items()), final))
    return sweeps


def finished_models(evaluation: Evaluation) -> list[str]:
    """Return labels of scored models without intermediate checkpoints; an unfinished run has its last one."""
    passed = {label for sweep in find_sweeps(evaluation) for _, label in sweep.steps[: None if sweep.final else -1]}
    return [label for label in labels(evaluation) if label not in passed]
