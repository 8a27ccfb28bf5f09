"""Records of an evaluation: its models, their scores, and what each example scored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.outputs import write_whole

logger = logging.getLogger("training")

# Bits per stored number, by sentence-transformers' name of the quantization.
PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}
# Tokens per text in the published evaluation.
DEFAULT_MAX_LENGTH = 8192
SCORES, EXAMPLES = "scores.json", "examples.npz"
# Of the meaning of scores. In version 1, int8 was the cosine of the codes, which no vector index compares.
VERSION = 2


def bytes_per_vector(dimension: int, precision: str) -> int:
    """Return the bytes of a stored embedding; binary ones are packed eight to a byte."""
    return -(-dimension * PRECISIONS[precision] // 8)


@dataclass(frozen=True)
class ModelRecord:
    """A model that was evaluated; name and revision are as the user gave them.

    Attributes:
        dimension: Full width of its embeddings.
        texts_per_second: Encoding rate in the last evaluation.
        identity: The commit, or a digest of the files, that the scores belong to.
        options: Options that change embeddings and differ from the defaults: ``prompts model``.
    """

    name: str
    revision: str | None = None
    parameters: int | None = None
    dimension: int | None = None
    texts_per_second: float | None = None
    identity: str | None = None
    options: str = ""

    @property
    def label(self) -> str:
        """Name, revision and options, as tables show them."""
        named = self.name if self.revision is None else f"{self.name}@{self.revision}"
        return f"{named} ({self.options})" if self.options else named


@dataclass(frozen=True)
class Score:
    """One score; tasks, types, subsets, splits and metrics are mteb's.

    Attributes:
        model: Label of the model (:attr:`ModelRecord.label`).
        languages: ISO 639-3 codes with script, such as ``deu-Latn``; two for a bitext.
        dimension: Leading dimensions used.
        value: The main metric, not in percent.
        examples: Number of queries, pairs or texts that were scored.
        data: Revision of the task's data.
    """

    model: str
    task: str
    task_type: str
    subset: str
    languages: tuple[str, ...]
    dimension: int
    precision: str
    metric: str
    value: float
    examples: int
    split: str = "test"
    data: str = ""

    @property
    def key(self) -> str:
        """Unique key of the score in an evaluation."""
        return "|".join((self.model, self.task, self.split, self.subset, str(self.dimension), self.precision))


@dataclass
class Evaluation:
    """All results of an evaluation.

    Attributes:
        examples: By :attr:`Score.key`, ``(n,)`` scores of the examples in the task's order, where the metric is their
            mean. Intervals and paired tests are computed from these.
        failures: By ``label: task``, why a task could not be run.
    """

    models: list[ModelRecord] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    examples: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def select(self, scores: Iterable[Score] | None = None, **fields: object) -> list[Score]:
        """Return the scores whose fields have the given values."""
        chosen = self.scores if scores is None else scores
        return [score for score in chosen if all(getattr(score, name) == value for name, value in fields.items())]

    def add_model(self, record: ModelRecord) -> None:
        """Add a model or replace its record; scores of another identity of the model are dropped."""
        before = next((model for model in self.models if model.label == record.label), None)
        if before is None:
            self.models.append(record)
            return
        if before.identity != record.identity:
            self._drop(self.select(model=record.label))
            prefix = f"{record.label}: "
            self.failures = {key: why for key, why in self.failures.items() if not key.startswith(prefix)}
        elif record.texts_per_second is None:
            record = replace(record, texts_per_second=before.texts_per_second)
        self.models[self.models.index(before)] = record

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

    def save(self, folder: Path) -> None:
        """Write ``scores.json`` and ``examples.npz`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{EXAMPLES}.partial"
        with partial.open("wb") as handle:
            np.savez_compressed(handle, **self.examples)
        partial.replace(folder / EXAMPLES)
        content = {
            "version": VERSION,
            "models": [asdict(model) for model in self.models],
            "scores": [asdict(score) for score in self.scores],
            "failures": self.failures,
        }
        write_whole(folder / SCORES, json.dumps(content, indent=1) + "\n")


def load_evaluation(folder: Path, missing_ok: bool = False) -> Evaluation:
    """Load what :meth:`Evaluation.save` wrote; with ``missing_ok``, a folder without scores is an empty evaluation."""
    if missing_ok and not (folder / SCORES).exists():
        return Evaluation()
    try:
        content = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        evaluation = Evaluation(
            [ModelRecord(**model) for model in content["models"]],
            [Score(**{**score, "languages": tuple(score["languages"])}) for score in content["scores"]],
            _load_examples(folder / EXAMPLES),
            dict(content["failures"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: holds no whole evaluation ({type(error).__name__}: {error}); delete {SCORES} and run it again"
        ) from None
    outdated = evaluation.select(precision="int8") if content.get("version", 1) < VERSION else []
    if outdated:
        evaluation._drop(outdated)
        logger.warning(
            "%s: its %d int8 scores compared codes instead of the vectors they stand for; they are left out, evaluate "
            "again to have them",
            *(folder, len(outdated)),
        )
    return evaluation


def _load_examples(path: Path) -> dict[str, NDArray[np.float32]]:
    # A damaged file must not cost the scores.
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        logger.warning("%s: cannot be read (%s); evaluate again to have them", path, type(error).__name__)
        return {}
