"""What the revision of a checkpoint holds: the model as a release has it, a card, and where the training stood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from training.common.hub_names import check_revision
from training.common.run_folder import RECIPE
from training.common.yaml_file import load_yaml
from training.publishing.cleaning import check_nothing_private, clean_arguments, private_texts
from training.publishing.hub.checkpoint_card import CheckpointFacts, checkpoint_card
from training.publishing.hub.progress import STATE, TIMING, progress_of
from training.publishing.lineage import Lineage
from training.publishing.model_files import ModelFiles, copy_model_files, read_model_files
from training.publishing.record import Reference
from training.publishing.states import ModelState, read_json
from training.publishing.training_data import sources_of
from training.publishing.weights import Weights, read_weights

TRAINING_STATE = "training_state.json"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Revision:
    """A checkpoint, ready to be uploaded.

    Attributes:
        name: Of the revision: ``stage1-step-005000``.
        files: All that it holds, by path.
        weights: Which of them hold the weights.
        facts: What the card says.
        shape: Of the model.
        began: The first entry of the training's log, which tells a run from another; None if there is none yet.
    """

    name: str
    files: Mapping[str, Path | bytes]
    weights: tuple[str, ...]
    facts: CheckpointFacts
    shape: Mapping[str, Any]
    began: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CheckpointedRun:
    """A run whose checkpoints are published.

    Attributes:
        run: Its folder.
        stage: What its revisions are named after.
    """

    run: Path
    stage: str

    @classmethod
    def of(cls, run: Path, stage: str | None = None) -> CheckpointedRun:
        """The run of a folder, named after it unless told otherwise.

        Raises:
            UserError: If the name cannot be that of a revision.
        """
        return cls(run, check_revision("--stage-name", stage or run.resolve().name))

    @cached_property
    def _keys(self) -> Mapping[str, Any]:
        return load_yaml(self.run / RECIPE)

    def _state(self, checkpoint: Path) -> ModelState:
        return ModelState(self.run, checkpoint, self._keys)

    @cached_property
    def _origins(self) -> tuple[Reference, Reference | None]:
        """What the run started from, and learns from. Found once: a teacher's weights may have to be read for it."""
        return Lineage(self._state(self.run)).origins()

    @cached_property
    def _languages(self) -> tuple[str, ...]:
        return tuple(sorted({code for source in sources_of(self._state(self.run)) for code in source.languages}))

    def revision(self, checkpoint: Path, folder: Path, repository: str, final: str | None = None) -> Revision:
        """Writes what the revision of a checkpoint holds, but for the weights, which stay where they are.

        Args:
            checkpoint: ``checkpoint-N``, in the run or elsewhere: model files and ``trainer_state.json``.
            folder: Where to write; what is there is removed.
            repository: Name on the Hub.
            final: Name on the Hub of the finished model; None if it is not known.

        Raises:
            UserError: If the checkpoint is damaged or holds an adapter, or a file would tell something private.
        """
        state = self._state(checkpoint)
        files = read_model_files(checkpoint)
        weights = read_weights(checkpoint, files.config)
        trained = read_json(checkpoint / STATE)
        name = f"{self.stage}-step-{trained['global_step']:06d}"
        model = repository.rpartition("/")[2]
        places = {"revision": name, "name": model, "repository": repository, "final": final}
        facts = self._facts(state, files, weights, trained, places)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        copy_model_files(files, folder, weights.dtype)
        told = {
            **{key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch", "metrics")},
            "arguments": clean_arguments(self._keys),
            "log": [_without_timing(entry) for entry in trained["log_history"]],
        }
        began = next(iter(told["log"]), None)
        _write(folder / TRAINING_STATE, json.dumps(told, indent=2, ensure_ascii=False))
        _write(folder / "README.md", checkpoint_card(facts))
        check_nothing_private(folder, private_texts([state]))
        written = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        of_weights = {file: checkpoint / file for file in {*weights.files.values()}}
        index = {_INDEX: checkpoint / _INDEX} if (checkpoint / _INDEX).is_file() else {}
        return Revision(name, {**written, **of_weights, **index}, tuple(sorted(of_weights)), facts, files.shape, began)

    def _facts(
        self,
        state: ModelState,
        files: ModelFiles,
        weights: Weights,
        trained: Mapping[str, Any],
        places: Mapping[str, Any],
    ) -> CheckpointFacts:
        progress = progress_of(state)
        start, teacher = self._origins
        return CheckpointFacts(
            **places,
            stage=self.stage,
            step=trained["global_step"],
            max_steps=trained["max_steps"],
            epoch=trained["epoch"],
            metrics=progress.metrics,
            dimension=files.config.hidden_size,
            dimensions=files.dimensions,
            parameters=weights.parameters,
            prompts=files.prompts,
            start=start,
            teacher=teacher,
            languages=self._languages,
        )


def _without_timing(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not key.endswith(TIMING)}


def _write(path: Path, text: str) -> None:
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
