"""Uploads every checkpoint of a run as its own revision, and lists them on the main branch."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
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
from training.publishing.model_files import copy_model_files, read_model_files
from training.publishing.record import RECORD
from training.publishing.states import ModelState, check_nothing_private, clean_arguments, private_texts, read_json
from training.publishing.weights import read_weights

logger = logging.getLogger("training")

INDEX, TRAINING_STATE = "checkpoints.json", "training_state.json"
_WEIGHTS_INDEX = "model.safetensors.index.json"
# Tries to list a revision, each from what another run has listed meanwhile.
_LISTINGS = 5


@dataclass(frozen=True)
class Revision:
    """A checkpoint, ready to be uploaded.

    Attributes:
        facts: What its card says, with its name.
        files: By path.
        weights: Which files hold the weights.
        stage: Shape and start, which identify its stage.
        began: The first entry of the training's log, which identifies its run; None if the log is empty.
    """

    facts: CheckpointFacts
    files: Mapping[str, Content]
    weights: tuple[str, ...]
    stage: Mapping[str, Any]
    began: Mapping[str, Any] | None


class CheckpointUpload:
    """Uploads checkpoints of a run; a second time, this changes nothing.

    The main branch is left alone if it holds a finished model. Otherwise it holds the list of revisions.

    Args:
        run: The run's folder.
        place: The repository, created if it does not exist; ``replace`` allows to replace revisions, and to put them
            beside those of another stage of this name.
        hub: The Hub.
        stage: What revisions are named after; the run's folder if None.
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

    def revision(self, checkpoint: Path, folder: Path, finished: bool = False) -> Revision:
        """Write the files of a checkpoint's revision, except the weights, to a new folder.

        Args:
            checkpoint: ``checkpoint-N``, in the run or elsewhere: a model and ``trainer_state.json``.
            folder: The new folder.
            finished: Whether the repository holds the finished model.
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
        entries = trained["log_history"]
        log = [{key: entry[key] for key in entry if not key.endswith(TIMING)} for entry in entries]
        public = {key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch", "metrics")}
        public |= {"arguments": clean_arguments(state.keys), "log": log}
        (folder / TRAINING_STATE).write_text(_json(public), encoding="utf-8")
        (folder / CARD).write_text(checkpoint_card(facts).rstrip("\n") + "\n", encoding="utf-8")
        check_nothing_private(folder, private_texts([state]))
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        names = tuple(sorted({*weights.files.values()}))
        files |= {name: checkpoint / name for name in (*names, _WEIGHTS_INDEX) if (checkpoint / name).is_file()}
        stage = {"shape": dict(model.shape), "start": facts.start and asdict(facts.start)}
        contents = {path: Content(file) for path, file in files.items()}
        return Revision(facts, contents, names, stage, log[0] if log else None)

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
            revision = self.revision(checkpoint, Path(folder) / "revision", finished)
            facts = revision.facts
            index = None if finished else self._index(held)
            if not self.place.replace:
                self._check(revision, index)
            self.repo.publish(revision.files, f"{facts.stage}, step {facts.step:,}", facts.revision)
        if not finished:
            self._list(revision)
        return facts.revision

    def _check(self, revision: Revision, index: Mapping[str, Any] | None) -> None:
        """Refuse to replace other weights, or to mix revisions of two stages of one name, or of two runs of a stage."""
        name, stage = revision.facts.revision, revision.facts.stage
        if index is None:
            try:
                known = [each["name"] for each in json.loads(self.repo.read(RECORD) or b"")["stages"]]
            except (ValueError, KeyError, TypeError):
                raise self._refusal(f"its {RECORD} is not a record of a model") from None
            if stage not in known:
                raise self._refusal(f"holds a model that was made without a stage {stage!r}")
        elif index["stages"].get(stage, revision.stage) != revision.stage:
            raise self._refusal(f"holds checkpoints of another stage {stage!r}")
        branches = sorted((self.repo.refs() or {"branch": {}})["branch"])
        others = [each for each in branches if each.startswith(f"{stage}-step-") and not each.endswith(SCRATCH)]
        if others and revision.began is not None:
            # The same in all checkpoints of a run, even a resumed one. It has the loss, the gradient norm and the
            # learning rate: another seed, data or schedule changes one of them.
            try:
                log = json.loads(self.repo.read(TRAINING_STATE, others[0]) or b"")["log"]
            except (ValueError, KeyError, TypeError):
                raise self._refusal(f"its revision {others[0]} has no {TRAINING_STATE} that can be read") from None
            if log and log[0] != revision.began:
                raise self._refusal(f"its revision {others[0]} is of another run")
        found = self.repo.files(name)
        for path in revision.weights if found is not None else ():
            if path not in found or not revision.files[path].is_in(found[path]):
                raise self._refusal(f"its revision {name} has other weights")

    def _refusal(self, reason: str) -> UserError:
        remedy = "give another repository or --stage-name, or --replace to replace it"
        return UserError(f"{self.repo.name}: {reason}", remedy)

    def _index(self, held: set[str], revision: str = "main") -> dict[str, Any]:
        content = self.repo.read(INDEX, revision) if INDEX in held else None
        try:
            index = {"stages": {}, "revisions": {}} if content is None else json.loads(content)
            return {"languages": [], **index, "stages": {**index["stages"]}, "revisions": {**index["revisions"]}}
        except (ValueError, KeyError, TypeError) as error:
            fault = f"its {INDEX} is not a list of checkpoints ({type(error).__name__})"
            raise UserError(f"{self.repo.name}: {fault}; give another repository") from None

    def _list(self, revision: Revision) -> None:
        """Add a revision to the list, which another run may be writing as well."""
        for tries_left in reversed(range(_LISTINGS)):
            head = self.repo.refs()["branch"]["main"]
            held = {*(self.repo.files(head) or {})} - {ATTRIBUTES}
            index = self._index(held, head)
            # A licence that was chosen on the Hub's site stays.
            others = {path: self.repo.read(path, head) for path in held - {INDEX, CARD}}
            files = {path: content for path, content in others.items() if content is not None}
            try:
                files |= index_files(index, revision)
                self.repo.publish(files, f"List {revision.facts.revision}", parent=head)
                return
            except WrittenMeanwhileError:
                if not tries_left:
                    raise


def index_files(index: Mapping[str, Any], revision: Revision) -> dict[str, bytes]:
    """Return ``checkpoints.json`` and its card, with a further revision, for the main branch."""
    facts = revision.facts
    entry = {key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch")}
    names = {"train_loss": "loss", "eval_loss": "eval_loss"}
    entry |= {name: facts.metrics[key] for key, name in names.items() if key in facts.metrics}
    revisions = {**index["revisions"], facts.revision: entry}
    content = {
        "stages": dict(sorted({**index["stages"], facts.stage: revision.stage}.items())),
        "revisions": dict(sorted(revisions.items(), key=lambda item: (item[1]["stage"], item[1]["step"]))),
        "languages": sorted({*index["languages"], *facts.languages}),
    }
    card = checkpoints_card(facts.repository, content["revisions"], content["languages"])
    return {INDEX: _json(content).encode(), CARD: card.encode()}


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def run_push_checkpoints(arguments: argparse.Namespace) -> None:
    """Upload the checkpoints of a run, or of all stages of a recipe; or show what would be uploaded."""
    place = Destination(arguments.repo, private=arguments.private or None, replace=arguments.replace)
    hub, folder, stage_name = Hub(), arguments.run_folder, arguments.stage_name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    runs = [folder] if (folder / RECIPE).is_file() else sorted(path.parent for path in folder.glob(f"*/{RECIPE}"))
    found = [CheckpointUpload(run, place, hub, stage_name) for run in runs if _checkpoints(run)]
    if not found:
        raise UserError(f"{folder}: holds no checkpoint of a run; give the output_dir of one that has been saved")
    if stage_name is not None and len(found) > 1:
        raise UserError(f"--stage-name names one stage, {folder} holds {len(found)}; give the folder of one")
    if arguments.dry_run:
        sys.stdout.writelines(_preview(folder, place, found))
        return
    pushed = sum(_push(upload) for upload in found)
    address = place.repository(hub).address
    sys.stdout.write(f"{address}: holds {pushed} checkpoint{'s' if pushed != 1 else ''} of this run\n")


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run and of its queue, oldest first."""
    found = {path.name: path for path in (*checkpoints(run), *UploadQueue(run).pending())}
    return sorted(found.values(), key=step_of)


def _push(upload: CheckpointUpload) -> int:
    queue, pushed = UploadQueue(upload.run), 0
    pending = {path.name for path in queue.pending()}
    for checkpoint in _checkpoints(upload.run):
        try:
            # Linked first: a training that goes on may delete it meanwhile.
            queued = queue.add(checkpoint, limited=False)
        except UserError as error:
            logger.warning("%s", error)
            continue
        try:
            logger.info("%s: %s", upload.repo.address, upload.upload(queued))
        except BaseException:
            # Otherwise it would keep its disk space, and a training would upload it to its own repository.
            if queued.name not in pending and (upload.run / queued.name).is_dir():
                queue.remove(queued)
            raise
        queue.remove(queued)
        pushed += 1
    return pushed


def _preview(folder: Path, place: Destination, found: list[CheckpointUpload]) -> Iterator[str]:
    rows, cards, end = [], [], []
    for upload in found:
        for checkpoint in _checkpoints(upload.run):
            with temporary_folder() as temporary:
                revision = upload.revision(checkpoint, Path(temporary) / "revision")
                name, files = revision.facts.revision, revision.files
                yield f"{name}:\n{uploads.file_list(files)}\n"
                row, *end = uploads.upload_rows(place, f"{upload.repo.address}, revision {name}", files)
                rows.append(row)
                cards.append(uploads.card_text(files))
    yield uploads.summary([*rows, *end, ("cards", str(uploads.write_card(folder, "\n".join(cards))))])
