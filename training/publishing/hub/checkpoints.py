"""Uploads every checkpoint of a run as its own revision, and lists them on the main branch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from training.common.errors import UserError
from training.common.hub import ATTRIBUTES, SCRATCH, Content, check_revision
from training.common.outputs import temporary_folder
from training.common.run_folder import RECIPE, checkpoints, step_of
from training.common.yaml_file import load_yaml
from training.publishing.hub import upload as uploads
from training.publishing.hub.checkpoint_card import CheckpointFacts, checkpoint_card, checkpoints_card
from training.publishing.hub.hub import Hub, WrittenMeanwhileError
from training.publishing.hub.progress import STATE, TIMING, progress_of
from training.publishing.hub.upload import CARD, INCIDENTAL, Destination
from training.publishing.hub.upload_queue import UploadQueue
from training.publishing.lineage import Lineage, sources_of
from training.publishing.model_files import copy_model_files, read_model_files, read_weights
from training.publishing.record import RECORD
from training.publishing.states import ModelState, check_nothing_private, clean_arguments, private_texts, read_json

INDEX, TRAINING_STATE = "checkpoints.json", "training_state.json"
_WEIGHTS_INDEX = "model.safetensors.index.json"
# Tries to list a revision, each from what another run has listed meanwhile.
_LISTINGS = 5


class CheckpointUpload:
    """Uploads checkpoints of a run; a second time, this changes nothing.

    The main branch is left alone if it holds a finished model. Otherwise it holds the list of revisions, which are
    named after the ``stage``: by default, the run's folder.
    """

    def __init__(self, run: Path, place: Destination, hub: Hub, stage: str | None = None) -> None:
        self.run, self.place, self.repo = run, place, place.repository(hub)
        self.stage = check_revision("--stage-name", stage or run.resolve().name)

    @cached_property
    def _state(self) -> ModelState:
        return ModelState(self.run, self.run, load_yaml(self.run / RECIPE))

    @cached_property
    def _known_of_run(self) -> dict[str, Any]:
        """What the cards of all checkpoints say. A teacher's weights may have to be read for it."""
        start, teacher = Lineage(self._state).origins()
        languages = {code for source in sources_of(self._state) for code in source.languages}
        return {"start": start, "teacher": teacher, "languages": tuple(sorted(languages)), "stage": self.stage}

    def revision(
        self, checkpoint: Path, folder: Path, finished: bool = False
    ) -> tuple[CheckpointFacts, dict[str, Content]]:
        """Return what the card of a checkpoint says, and its files; all but the weights are written to a new folder.

        The card links the finished model if the repository holds it (``finished``).
        """
        model = read_model_files(checkpoint)
        weights = read_weights(checkpoint, model.config)
        trained = read_json(checkpoint / STATE)
        state = ModelState(self.run, checkpoint, self._state.keys)
        facts = CheckpointFacts(
            **self._known_of_run,
            repository=self.repo.name,
            revision=f"{self.stage}-step-{trained['global_step']:06d}",
            name=self.repo.name.rpartition("/")[2],
            final=self.repo.name if finished else None,
            step=trained["global_step"],
            max_steps=trained["max_steps"],
            epoch=trained["epoch"],
            metrics=progress_of(state).metrics,
            dimension=model.config.hidden_size,
            dimensions=model.dimensions,
            parameters=weights.parameters,
            prompts=model.prompts,
        )
        folder.mkdir()
        copy_model_files(model, folder, weights.dtype)
        public = {key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch", "metrics")}
        public |= {"shape": dict(model.shape), "start": facts.start and asdict(facts.start)}
        public["arguments"] = clean_arguments(state.keys)
        public["log"] = [
            {key: entry[key] for key in entry if not key.endswith(TIMING)} for entry in trained["log_history"]
        ]
        (folder / TRAINING_STATE).write_text(_json(public), encoding="utf-8")
        (folder / CARD).write_text(checkpoint_card(facts).rstrip("\n") + "\n", encoding="utf-8")
        check_nothing_private(folder, private_texts([state]))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        names = {*weights.files.values(), _WEIGHTS_INDEX}
        files |= {name: checkpoint / name for name in names if (checkpoint / name).is_file()}
        return facts, {path: Content(file) for path, file in files.items()}

    def upload(self, checkpoint: Path) -> str:
        """Upload ``checkpoint-N``, and list it; return the name of its revision.

        Raises:
            UserError: If the repository holds something else, the revision has other weights, the checkpoint is
                damaged, or the Hub refuses the upload.
            HubUnavailableError: If the Hub is down. The revision is complete or absent.
        """
        self.repo.ensure(self.place.private)
        held = {*(self.repo.files() or {})} - {ATTRIBUTES}
        finished = RECORD in held
        if not finished and not held <= {*INCIDENTAL, INDEX} and not self.place.replace:
            raise self._refusal(f"holds {len(held)} files that no {INDEX} lists")
        with temporary_folder() as folder:
            facts, files = self.revision(checkpoint, Path(folder) / "revision", finished)
            if not self.place.replace:
                self._check(facts.revision, files, finished)
            self.repo.publish(files, f"{facts.stage}, step {facts.step:,}", facts.revision)
        if not finished:
            self._list(facts)
        return facts.revision

    def _check(self, name: str, files: Mapping[str, Content], finished: bool) -> None:
        """Refuse to replace other weights, and to mix revisions of two runs or of two stages of one name."""
        if finished and self.stage not in [each["name"] for each in self._read(RECORD, "main")["stages"]]:
            raise self._refusal(f"holds a model that was made without a stage {self.stage!r}")
        branches = sorted(self.repo.refs()["branch"])
        others = [each for each in branches if each.startswith(f"{self.stage}-step-") and not each.endswith(SCRATCH)]
        if others:
            other, own = self._read(TRAINING_STATE, others[0]), read_json(Path(files[TRAINING_STATE].source))
            # The first entry of the log is the same in all checkpoints of a run, even a resumed one: it has the loss,
            # the gradient norm and the learning rate. It may be missing in the first checkpoints.
            logs = [state["log"][:1] for state in (other, own) if state["log"]]
            if any(other[key] != own[key] for key in ("shape", "start")) or logs[:1] != logs[-1:]:
                raise self._refusal(f"its revision {others[0]} is of another run")
        found = self.repo.files(name) or {}
        for path, content in files.items():
            if path.endswith(".safetensors") and found and not (path in found and content.is_in(found[path])):
                raise self._refusal(f"its revision {name} has other weights")

    def _refusal(self, reason: str) -> UserError:
        remedy = "give another repository or --stage-name, or --replace to replace it"
        return UserError(f"{self.repo.name}: {reason}", remedy)

    def _read(self, path: str, revision: str) -> Any:
        try:
            return json.loads(self.repo.read(path, revision) or b"")
        except ValueError:
            raise self._refusal(f"its {path} at {revision} is missing or damaged") from None

    def _list(self, facts: CheckpointFacts) -> None:
        """Add a revision to the list, which another run may be writing as well."""
        for _ in range(_LISTINGS):
            head = self.repo.refs()["branch"]["main"]
            held = {*(self.repo.files(head) or {})} - {ATTRIBUTES}
            listed = self._read(INDEX, head) if INDEX in held else {"revisions": {}, "languages": []}
            # A licence that was chosen on the Hub's site stays.
            files = {path: self.repo.read(path, head) or b"" for path in held - {INDEX, CARD}}
            files |= index_files(listed, facts)
            with suppress(WrittenMeanwhileError):
                self.repo.publish(files, f"List {facts.revision}", parent=head)
                return
        raise WrittenMeanwhileError(self.repo.name, "main")


def index_files(listed: Mapping[str, Any], facts: CheckpointFacts) -> dict[str, bytes]:
    """Return ``checkpoints.json`` and its card, with a further revision, for the main branch."""
    entry = {key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch")}
    entry |= {key: facts.metrics[key] for key in ("train_loss", "eval_loss") if key in facts.metrics}
    revisions = {**listed["revisions"], facts.revision: entry}
    content = {
        "revisions": dict(sorted(revisions.items(), key=lambda item: (item[1]["stage"], item[1]["step"]))),
        "languages": sorted({*listed["languages"], *facts.languages}),
    }
    card = checkpoints_card(facts.repository, content["revisions"], content["languages"])
    return {INDEX: _json(content).encode(), CARD: card.encode()}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def run_push_checkpoints(arguments: argparse.Namespace) -> None:
    """Upload the checkpoints of a run, or of all stages of a recipe; or show what would be uploaded."""
    place, hub = Destination.of(arguments, arguments.repo), Hub()
    folder, stage_name = arguments.run_folder, arguments.stage_name
    runs = [folder] if (folder / RECIPE).is_file() else sorted(path.parent for path in folder.glob(f"*/{RECIPE}"))
    found = [CheckpointUpload(run, place, hub, stage_name) for run in runs if _checkpoints(run)]
    if not found:
        raise UserError(f"{folder}: holds no checkpoint of a run; give the output_dir of one that has been saved")
    if stage_name is not None and len(found) > 1:
        raise UserError(f"--stage-name names one stage, {folder} holds {len(found)}; give the folder of one")
    if arguments.dry_run:
        sys.stdout.writelines(_preview(hub, folder, found))
        return
    for upload in found:
        queue = UploadQueue(upload.run)
        for checkpoint in _checkpoints(upload.run):
            sys.stdout.write(f"{upload.repo.address}: uploaded {upload.upload(checkpoint)}\n")
            queue.remove(queue.folder / checkpoint.name)


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run and of its queue, oldest first; a training may delete its own meanwhile."""
    found = {path.name: path for path in (*checkpoints(run), *UploadQueue(run).pending())}
    return sorted(found.values(), key=step_of)


def _preview(hub: Hub, folder: Path, found: list[CheckpointUpload]) -> Iterator[str]:
    cards = []
    for upload in found:
        for checkpoint in _checkpoints(upload.run):
            with temporary_folder() as temporary:
                facts, files = upload.revision(checkpoint, Path(temporary) / "revision")
                place = replace(upload.place, revision=facts.revision)
                yield uploads.preview(hub, place, files)
                # Kept in memory, as the folder goes.
                cards.append({CARD: Content(bytes(files[CARD].payload))})
    yield uploads.write_card(folder, *cards) + uploads.NOTHING_UPLOADED
