"""The record of a released model, ``release.json``: all that its card says beyond the scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.hub import Content

# Name of the file in a packed folder.
RECORD = "release.json"


@dataclass(frozen=True)
class Reference:
    """Another model, by what may be published of it.

    ``kind`` is ``stage`` (of the same lineage), ``hub``, ``local`` (the last part of a folder), ``scratch`` (random
    weights) or ``unknown``; the last two have no name.
    """

    kind: str
    name: str = ""
    revision: str | None = None  # commit on the Hub


@dataclass(frozen=True)
class SourceRecord:
    """A source that a stage was trained on; what is unknown is None."""

    name: str
    task_type: str | None  # retrieval, clustering or classification
    languages: tuple[str, ...]  # ISO 639-3 codes
    rows: int | None  # training rows, after the cap
    validation_rows: int | None
    instruction: str | None = None  # of its queries
    licence: str | None = None  # from the manifest
    dataset: str | None = None  # data set on the Hub that it belongs to


@dataclass(frozen=True)
class StageRecord:
    """One stage of the training lineage; what is unknown is None.

    ``kind`` is ``training``, ``adapter`` (training of one), ``merged_adapter`` (training of one that was then merged
    into its base), ``pruning``, ``merging`` or ``unknown`` (a model without a run).
    """

    name: str
    kind: str
    start: Reference  # the model that it started from
    teacher: Reference | None = None
    parameters: int | None = None  # of the model that it made
    given: tuple[str, ...] = ()  # names of the arguments that the recipe gave
    arguments: Mapping[str, Any] = field(default_factory=dict)  # all in effect, except those that name paths
    sources: tuple[SourceRecord, ...] = ()  # data of training, or of the calibration of pruning
    steps: int | None = None  # optimizer steps
    epochs: float | None = None
    # Of the last evaluation (eval_loss, eval_source/NAME, …), and train_loss, the mean loss of the last logged steps.
    metrics: Mapping[str, float] = field(default_factory=dict)
    parents: tuple[Reference, ...] = ()  # the models that were merged
    # Arguments that were changed during training: the step from which on they hold, and keys: name to the value before
    # and after, None for one that was not given.
    changes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that is released, or that was merged into the released weights; what is unknown is None.

    ``match`` says how the base is known to be the one that the adapter was trained on: ``trained`` (loaded by this
    name), ``same`` (equal weights), ``rounded`` (equal after rounding to the dtype on the Hub) or ``stated`` (not
    checked).
    """

    base: Reference
    match: str
    rank: int | None = None
    alpha: float | None = None  # updates are scaled by alpha / rank, or alpha / sqrt(rank) with rslora
    targets: tuple[str, ...] = ()  # names of the adapted linear layers
    dora: bool = False  # whether the lengths of weight vectors were trained, too
    rslora: bool = False
    parameters: int | None = None
    base_weights: str | None = None  # digest of the weight files of the base on the Hub
    base_code: bool = False  # whether the base is known to contain the remote code
    merged: bool = False  # whether its updates are in the released weights


@dataclass(frozen=True)
class ModelRelease:
    """A released model."""

    name: str  # without organisation: f2llm-v2-330m
    licence: str  # SPDX identifier of the weights
    parameters: int  # of an adapter, its own
    dtype: str  # of the weights
    dimension: int  # full width of an embedding
    dimensions: tuple[int, ...]  # trained widths, the full one first; more than one for a matryoshka model
    max_length: int  # maximum tokens of a text
    shape: Mapping[str, Any]  # hidden_size, num_hidden_layers, …; of an adapter, that of its base, empty if unknown
    prompts: Mapping[str, str]  # by name, as in config_sentence_transformers.json
    languages: tuple[str, ...]  # ISO 639-3 codes of all training data
    stages: tuple[StageRecord, ...]  # from the oldest stage to the model's own
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries that wrote the model
    trained_dtype: str | None = None  # in which the weights were saved and evaluated, before rounding
    author: str | None = None
    # Rows of the last training stage, as training.evaluation.summary.training_rows counts them; empty if unknown.
    language_rows: Mapping[str, int] = field(default_factory=dict)
    adapter: AdapterRecord | None = None  # the release itself, or merged into it
    files: Mapping[str, int] = field(default_factory=dict)  # bytes of every packed file except the record, by path
    sha256: Mapping[str, str] = field(default_factory=dict)  # hash of the same files

    @property
    def is_adapter(self) -> bool:
        """Whether the release is an adapter, which needs its base."""
        return self.adapter is not None and not self.adapter.merged

    def to_json(self) -> str:
        """Return the text of ``release.json``."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def contents_of(folder: Path) -> dict[str, Content]:
    """Return the files of a packed folder except the record, by path; hidden files are an uploading client's."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: Content(path) for name, path in paths.items() if name != RECORD and "/." not in f"/{name}"}


def changed_files(record: Mapping[str, Any], contents: Mapping[str, Content]) -> Iterator[str]:
    """Yield the files that were changed, added or deleted since a record was written; first those of another size."""
    found = {name: content.size for name, content in contents.items() if name != RECORD}
    resized = {name for name, _ in record["files"].items() ^ found.items()}
    yield from sorted(resized)
    # Hashing large files takes minutes.
    yield from (name for name in found if name not in resized and contents[name].sha256 != record["sha256"].get(name))


def load_release(folder: Path) -> ModelRelease:
    """Load the record of a packed folder."""
    path = folder / RECORD
    try:
        content, known = json.loads(path.read_text(encoding="utf-8")), ModelRelease.__dataclass_fields__
        parsed = {key: tuple(content[key]) for key in ("dimensions", "languages")}
        parsed["stages"] = tuple(map(_stage, content["stages"]))
        if adapter := content.get("adapter"):
            typed = {"base": Reference(**adapter["base"]), "targets": tuple(adapter["targets"])}
            parsed["adapter"] = AdapterRecord(**{**adapter, **typed})
        # A later version may have more fields.
        return ModelRelease(**{key: parsed.get(key, content[key]) for key in content if key in known})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no record of a packed model ({type(error).__name__}: {error}); pack it") from None


def _stage(content: dict[str, Any]) -> StageRecord:
    sources = (SourceRecord(**{**each, "languages": tuple(each["languages"])}) for each in content["sources"])
    parsed = {
        "start": Reference(**content["start"]),
        "teacher": content["teacher"] and Reference(**content["teacher"]),
        "sources": tuple(sources),
        "parents": tuple(Reference(**parent) for parent in content["parents"]),
        **{key: tuple(content[key]) for key in ("given", "changes")},
    }
    return StageRecord(**{**content, **parsed})
