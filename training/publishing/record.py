"""What a released model is and where it comes from, as data: all that a card may say beyond the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.common.errors import UserError

# Name of the file in a packed folder.
RECORD = "release.json"


@dataclass(frozen=True)
class Reference:
    """Another model, as far as it may be told.

    Attributes:
        kind: ``stage`` (of the same lineage, by its name), ``hub`` (a public name), ``local`` (a folder of somebody's
            machine: only its last part is told), ``scratch`` (no model: random weights) or ``unknown``.
        name: As the kind says; empty for ``scratch`` and ``unknown``.
        revision: Commit on the Hub, if known.
    """

    kind: str
    name: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class SourceRecord:
    """A source that a stage was trained on.

    Attributes:
        name: Of the source.
        task_type: ``retrieval``, ``clustering`` or ``classification``; None if that is no longer known.
        languages: ISO 639-3 codes.
        rows: Rows trained on, after the cap; None if the prepared data is no longer at hand.
        validation_rows: Rows held back; None likewise.
        instruction: Of its queries; None if there is none.
        licence: As the manifest gives it; None if it gives none.
        dataset: Name on the Hub of the data set that it is of; None if it is of none.
    """

    name: str
    task_type: str | None
    languages: tuple[str, ...]
    rows: int | None
    validation_rows: int | None
    instruction: str | None = None
    licence: str | None = None
    dataset: str | None = None


@dataclass(frozen=True)
class StageRecord:
    """One stage of the lineage.

    Attributes:
        name: Of the stage.
        kind: ``training``, ``adapter`` (training of one), ``merged_adapter`` (training of one that was merged into its
            base then), ``pruning``, ``merging``, ``quantization`` or ``unknown`` (a model without a run).
        start: What it started from.
        teacher: What it learnt from; None without distillation.
        parameters: Parameters of the model that it made; None if that is no longer at hand.
        written: Keys that the recipe gave, without those that name places.
        arguments: Every hyper-parameter in effect, without those that name places.
        sources: What it was trained, or calibrated, on.
        steps: Optimizer steps done; None for pruning.
        epochs: Epochs done; None for pruning.
        metrics: Of its last evaluation, by name: ``eval_loss``, ``eval_source/NAME``, …; and ``train_loss``, the mean
            loss of the last logged steps.
        parents: What was merged; empty for other stages.
        changes: Of keys while it was trained, each with ``step``, from which on they held, and ``keys``: name to the
            value before and the value from then on, None for a key that was not given.
    """

    name: str
    kind: str
    start: Reference
    teacher: Reference | None = None
    parameters: int | None = None
    written: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[SourceRecord, ...] = ()
    steps: int | None = None
    epochs: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[Reference, ...] = ()
    changes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that is released, or that was merged into the weights that are.

    Attributes:
        base: The model that it adapts; for a released adapter a name on the Hub.
        match: How that is known to be what it was trained on: ``trained`` (it was loaded by this name), ``same`` (the
            weights are equal), ``rounded`` (equal once rounded to the dtype of those on the Hub), or ``stated``
            (whoever packed it says so).
        rank: Of its updates; None, as the fields below, if that is no longer at hand.
        alpha: Its updates are scaled by it over the rank, or over the rank's square root.
        targets: Names of the linear layers that are adapted.
        dora: Whether lengths of weight vectors were learnt, too.
        rslora: Whether the scale has the square root.
        parameters: Number of its parameters.
        base_weights: Digest of the base's files of weights as they are on the Hub; None if they were not at hand.
        base_code: Whether the base is known to bring the remote code.
        merged: Whether its updates are in the released weights.
    """

    base: Reference
    match: str
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    parameters: int | None = None
    base_weights: str | None = None
    base_code: bool = False
    merged: bool = False


@dataclass(frozen=True)
class ModelRelease:
    """A released model.

    Attributes:
        name: Of the model, without organisation: ``f2llm-v2-330m``.
        licence: SPDX identifier of the weights.
        parameters: Number of parameters; of an adapter its own.
        dtype: Of the weights: ``bfloat16``, ``float32`` or ``float16``.
        dimension: Full width of an embedding.
        dimensions: Widths that the model was trained at, the full one first; one alone if it is not matryoshka.
        max_length: Tokens of a text at most.
        shape: ``hidden_size``, ``num_hidden_layers`` and so on, as the configuration has them; of an adapter those of
            its base, and nothing if that was not at hand.
        prompts: By name, as ``config_sentence_transformers.json`` has them.
        languages: ISO 639-3 codes of all training data.
        stages: How the model came about, the oldest stage first and its own last.
        versions: Of the libraries that wrote the model, by name.
        family: Published shape that it has (``f2llm-v2-330m``); None if it is another.
        trained_dtype: Dtype in which the run saved the weights and in which they were evaluated; ``dtype`` may be
            another, to which they were rounded.
        author: Whom to name as the author; None if nobody was named.
        language_rows: Training rows of the last training stage by language, as
            :func:`training.evaluation.resources.training_rows` counts them; empty if its data does not tell.
        adapter: The adapter that the release is or has merged into it; None for other models.
        files: Bytes of every packed file but this one, by path.
        sha256: Hash of the same files, by path.
    """

    name: str
    licence: str
    parameters: int
    dtype: str
    dimension: int
    dimensions: tuple[int, ...]
    max_length: int
    shape: Mapping[str, Any]
    prompts: Mapping[str, str]
    languages: tuple[str, ...]
    stages: tuple[StageRecord, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None
    trained_dtype: str | None = None
    author: str | None = None
    language_rows: Mapping[str, int] = field(default_factory=dict)
    adapter: AdapterRecord | None = None
    files: Mapping[str, int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether the release is an adapter, which needs its base."""
        return self.adapter is not None and not self.adapter.merged

    def to_json(self) -> str:
        """The record as the text of ``release.json``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def load_release(folder: Path) -> ModelRelease:
    """Reads the record of a packed folder.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        return _release(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of a packed model ({type(error).__name__}: {error}); pack it") from None


def _release(content: dict[str, Any]) -> ModelRelease:
    stages = tuple(_stage(stage) for stage in content["stages"])
    lists = {key: tuple(content[key]) for key in ("dimensions", "languages")}
    adapter = content.get("adapter") and _adapter(content["adapter"])
    return ModelRelease(**{**content, **lists, "stages": stages, "adapter": adapter})


def _adapter(content: dict[str, Any]) -> AdapterRecord:
    given = {"base": Reference(**content["base"]), "targets": tuple(content["targets"])}
    return AdapterRecord(**{**content, **given})


def _stage(content: dict[str, Any]) -> StageRecord:
    sources = tuple(SourceRecord(**{**each, "languages": tuple(each["languages"])}) for each in content["sources"])
    teacher = content["teacher"] and Reference(**content["teacher"])
    references = {
        "start": Reference(**content["start"]),
        "teacher": teacher,
        "parents": tuple(Reference(**parent) for parent in content.get("parents", ())),
        "changes": tuple(content.get("changes", ())),
    }
    return StageRecord(**{**content, **references, "sources": sources})
