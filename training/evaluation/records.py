"""What an evaluation leaves behind: one record a score, what each example scored, and what the models are."""

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
from training.common.run_folder import write_whole

logger = logging.getLogger("training")

# Bits of a stored number, by sentence-transformers' name of the quantization.
PRECISIONS = {"float32": 32, "int8": 8, "binary": 1}
SCORES, EXAMPLES = "scores.json", "examples.npz"
# Of the scores' meaning. Up to version 1, int8 was the cosine of codes, which no vector index compares.
VERSION = 2


def bytes_per_vector(dimension: int, precision: str) -> int:
    """Bytes of a stored embedding; binary ones are packed eight to a byte."""
    return -(-dimension * PRECISIONS[precision] // 8)


@dataclass(frozen=True)
class ModelRecord:
    """A model that was evaluated.

    Attributes:
        name: Folder or Hub name, as given.
        revision: Commit, branch or step; None if it has none.
        parameters: Number of parameters.
        dimension: Full width of its embeddings.
        texts_per_second: Encoding rate over the texts that the last evaluation encoded.
        identity: What the scores belong to: the commit, or a digest of the files.
        options: Options that change embeddings, where they are not the usual ones: ``prompts model``.
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
    """One score.

    Attributes:
        model: Label of the model (:attr:`ModelRecord.label`).
        task: Name of the task.
        task_type: As mteb names it: Retrieval, BitextMining, Classification, Clustering, ...
        subset: mteb's subset, often a language or pair of languages.
        languages: ISO 639-3 codes with script, such as ``deu-Latn``; two for a bitext.
        dimension: Leading dimensions used.
        precision: One of ``PRECISIONS``.
        metric: Name of the task's main metric, such as ``ndcg_at_10``.
        value: The score, in [0, 1] for all metrics that are so bounded.
        examples: Number of queries, pairs or texts that were scored.
        split: mteb's split.
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
        """Names the score among all of an evaluation."""
        return "|".join((self.model, self.task, self.split, self.subset, str(self.dimension), self.precision))


@dataclass
class Evaluation:
    """Everything that an evaluation found.

    Attributes:
        models: What was evaluated.
        scores: The scores.
        examples: By :attr:`Score.key`, ``(n,)`` what each example scored, in the task's order, where the metric is a
            mean over examples; intervals and paired tests are drawn from these.
        failures: By label of the model and task, ``label: task``, why it could not be run.
    """

    models: list[ModelRecord] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    examples: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def select(self, scores: Iterable[Score] | None = None, **fields: object) -> list[Score]:
        """The scores whose fields have the given values."""
        chosen = self.scores if scores is None else scores
        return [score for score in chosen if all(getattr(score, name) == value for name, value in fields.items())]

    def add_model(self, record: ModelRecord) -> None:
        """Adds a model, or takes its place again; what was found before it changed is dropped."""
        before = next((model for model in self.models if model.label == record.label), None)
        if before is None:
            self.models.append(record)
            return
        if before.identity != record.identity:
            self._drop([score for score in self.scores if score.model == record.label])
            of_model = f"{record.label}: "
            self.failures = {key: why for key, why in self.failures.items() if not key.startswith(of_model)}
        elif record.texts_per_second is None:
            record = replace(record, texts_per_second=before.texts_per_second)
        self.models[self.models.index(before)] = record

    def put(self, scores: Sequence[Score], examples: Mapping[str, NDArray[np.float32]]) -> None:
        """Adds the scores of one model, task, dimension and precision; they replace earlier ones.

        Args:
            scores: All subsets' scores.
            examples: By :attr:`Score.key`, what each example scored, where there is such.
        """
        views = {(score.model, score.task, score.dimension, score.precision) for score in scores}
        self._drop([each for each in self.scores if (each.model, each.task, each.dimension, each.precision) in views])
        self.scores += scores
        self.examples |= examples

    def drop_outdated(self, folder: Path, version: int) -> None:
        """Drops what an earlier version of this code meant otherwise, and says so.

        Args:
            folder: Where it was read from.
            version: That of the scores.
        """
        outdated = self.select(precision="int8") if version < VERSION else []
        if outdated:
            self._drop(outdated)
            logger.warning(
                "%s: its %d int8 scores compared codes instead of the vectors taken back from them; they are left out, "
                "evaluate again to have them",
                folder,
                len(outdated),
            )

    def _drop(self, scores: Sequence[Score]) -> None:
        gone = {score.key for score in scores}
        self.scores = [score for score in self.scores if score.key not in gone]
        self.examples = {key: values for key, values in self.examples.items() if key not in gone}

    def save(self, folder: Path) -> None:
        """Writes ``scores.json`` and ``examples.npz`` into a folder, which is made."""
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
    """Reads what :meth:`Evaluation.save` wrote.

    Args:
        folder: The folder.
        missing_ok: An evaluation of nothing if the folder holds none.

    Raises:
        UserError: If the folder holds no whole evaluation.
    """
    if missing_ok and not (folder / SCORES).exists():
        return Evaluation()
    try:
        content = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        examples = _load_examples(folder / EXAMPLES)
        evaluation = Evaluation(
            [ModelRecord(**model) for model in content["models"]],
            [_score(fields) for fields in content["scores"]],
            examples,
            dict(content["failures"]),
        )
        evaluation.drop_outdated(folder, content.get("version", 1))
        return evaluation
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: holds no whole evaluation ({type(error).__name__}: {error}); delete {SCORES} and run it again"
        ) from None


def _load_examples(path: Path) -> dict[str, NDArray[np.float32]]:
    """What examples scored; nothing, with a notice, where the file is damaged: the scores are worth more."""
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        logger.warning("%s: cannot be read (%s); evaluate again to have them", path, type(error).__name__)
        return {}


def _score(fields: dict[str, object]) -> Score:
    languages: Sequence[str] = fields.pop("languages")  # type: ignore[assignment]
    return Score(languages=tuple(languages), **fields)  # type: ignore[arg-type]
