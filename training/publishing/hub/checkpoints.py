"""Uploads every checkpoint of a run as its own revision, and lists them on the main branch."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hub_cards.hub_terms import hub_languages
from hub_cards.markdown import code
from hub_cards.metadata import header
from hub_cards.render import render_checkpoint_card, render_checkpoints_card
from training.common.errors import UserError
from training.common.hub import ATTRIBUTES, SCRATCH, Content, check_revision
from training.common.outputs import discard, scratch_folder, temporary_folder
from training.common.run_folder import RECIPE, checkpoints, holds_model, numbered_checkpoints, step_of
from training.common.yaml_file import load_yaml
from training.publishing.card_lineage import LIBRARY, PIPELINE, reference_text, shared_tags
from training.publishing.hub.hub import Hub, WrittenMeanwhileError
from training.publishing.hub.upload import CARD, INCIDENTAL, NOTHING_UPLOADED, Destination, preview, write_card
from training.publishing.lineage import STATE, TIMING, Lineage, progress_of, sources_of
from training.publishing.model_files import copy_model_files, read_model_files, read_weights
from training.publishing.record import RECORD, Reference
from training.publishing.states import ModelState, check_nothing_private, clean_arguments, private_texts, read_json

INDEX, TRAINING_STATE = "checkpoints.json", "training_state.json"
QUEUE = ".upload_queue"  # in the run's folder
QUEUE_LIMIT = 8  # each of them keeps a model's weights on the disk
# The files of a checkpoint that make the model; optimizer, scheduler and random states are left out.
_KEPT = (".json", ".jinja", ".safetensors", ".txt")
_WEIGHTS_INDEX = "model.safetensors.index.json"
# Tries to list a revision, each from what another run has listed meanwhile.
_LISTINGS = 5


class PushQueue:
    """The checkpoints of a run whose upload is pending, on disk: hard links that outlive the rotation of checkpoints.

    A checkpoint is in the queue whole or not at all, and stays until :meth:`remove`, even if the process is killed.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / QUEUE

    def pending(self) -> list[Path]:
        """Return the checkpoints in the queue, oldest step first."""
        return numbered_checkpoints(self.folder)

    def add(self, checkpoint: Path) -> Path:
        """Put a whole ``checkpoint-N`` into the queue, unless it is there; return its path in the queue.

        It is refused at the limit, or if the disk has no room for it and the run's next one.
        """
        queued = self.folder / checkpoint.name
        if queued.exists():
            return queued
        if len(self.pending()) >= QUEUE_LIMIT:
            raise UserError(f"{QUEUE_LIMIT} checkpoints are in the queue already")
        try:
            sizes = {path: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
            kept = [path for path in sizes if path.suffix in _KEPT]
            needed = sum(sizes.values()) + sum(sizes[path] for path in kept)
            free = shutil.disk_usage(checkpoint.parent).free
            if free < needed:
                raise UserError(f"the disk has {free / 1e9:.1f} GB left, and {needed / 1e9:.1f} GB must be free")
            with scratch_folder(queued) as partial:
                for path in kept:
                    link = partial / path.relative_to(checkpoint)
                    link.parent.mkdir(exist_ok=True)
                    try:
                        os.link(path, link)
                    except FileNotFoundError:
                        raise
                    # Another device, or a file system without hard links.
                    except OSError:
                        shutil.copyfile(path, link)
                if not (holds_model(partial) and (partial / STATE).is_file()):
                    raise FileNotFoundError(f"it lacks {STATE} or the model")
                partial.rename(queued)
        except FileNotFoundError as error:
            raise UserError(f"{checkpoint}: is gone or incomplete ({error}); it cannot be uploaded") from None
        return queued

    def remove(self, queued: Path) -> None:
        """Remove an uploaded checkpoint; do nothing if another process has."""
        with suppress(FileNotFoundError):
            discard(queued)
        # Fails while other checkpoints are pending.
        with suppress(OSError):
            self.folder.rmdir()

    def tidy(self) -> None:
        """Remove what killed processes left half linked or half deleted."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint's card says."""

    repository: str  # name on the Hub
    revision: str  # stage1-step-005000
    stage: str
    step: int
    max_steps: int
    epoch: float
    metrics: Mapping[str, float]  # of its last log and evaluation: train_loss, eval_loss, eval_source/NAME
    dimensions: tuple[int, ...]  # trained widths of embeddings, the full one first
    parameters: int
    prompts: Mapping[str, str]
    start: Reference | None  # what the stage started from, if it is known
    teacher: Reference | None
    languages: tuple[str, ...]  # ISO 639-3 codes of the training data
    finished: bool  # whether the repository holds the finished model


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
        known = {"start": start, "teacher": teacher, "languages": tuple(sorted(languages))}
        return {"repository": self.repo.name, "stage": self.stage, **known}

    def revision(self, checkpoint: Path, finished: bool = False) -> tuple[CheckpointFacts, dict[str, Content]]:
        """Return what the card of a checkpoint says, and its files.

        The card links the finished model if the repository holds it (``finished``).
        """
        model = read_model_files(checkpoint)
        weights = read_weights(checkpoint, model.config)
        trained = read_json(checkpoint / STATE)
        state = ModelState(self.run, checkpoint, self._state.keys)
        facts = CheckpointFacts(
            **self._known_of_run,
            **{key: trained[key] for key in ("max_steps", "epoch")},
            revision=f"{self.stage}-step-{trained['global_step']:06d}",
            step=trained["global_step"],
            metrics=progress_of(state)["metrics"],
            dimensions=model.dimensions,
            parameters=weights.parameters,
            prompts=model.prompts,
            finished=finished,
        )
        public = {key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch", "metrics")}
        public |= {"shape": dict(model.shape), "start": facts.start and asdict(facts.start)}
        public["arguments"] = clean_arguments(state.keys)
        log = [{key: entry[key] for key in entry if not key.endswith(TIMING)} for entry in trained["log_history"]]
        with temporary_folder() as name:
            folder = Path(name)
            copy_model_files(model, folder, weights.dtype)
            (folder / TRAINING_STATE).write_bytes(_json({**public, "log": log}))
            (folder / CARD).write_text(checkpoint_card(facts).rstrip("\n") + "\n", encoding="utf-8")
            check_nothing_private(folder, private_texts([state]))
            written = (path for path in sorted(folder.rglob("*")) if path.is_file())
            files = {path.relative_to(folder).as_posix(): Content(path.read_bytes()) for path in written}
        large = (checkpoint / name for name in {*weights.files.values(), _WEIGHTS_INDEX})
        return facts, {**files, **{path.name: Content(path) for path in large if path.is_file()}}

    def upload(self, checkpoint: Path) -> str:
        """Upload ``checkpoint-N``, and list it; return the name of its revision, which is complete or absent.

        Raises:
            HubUnavailableError: If the Hub is down.
        """
        self.repo.ensure(self.place.private)
        held = {*(self.repo.files() or {})} - {ATTRIBUTES}
        finished = RECORD in held
        if not finished and not held <= {*INCIDENTAL, INDEX} and not self.place.replace:
            raise self._refusal(f"holds {len(held)} files that no {INDEX} lists")
        facts, files = self.revision(checkpoint, finished)
        if not self.place.replace:
            self._check(facts.revision, files, finished)
        self.repo.write_branch(files, f"{facts.stage}, step {facts.step:,}", facts.revision)
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
            other, own = self._read(TRAINING_STATE, others[0]), json.loads(files[TRAINING_STATE].source)
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
                self.repo.write_branch(files, f"List {facts.revision}", parent=head)
                return
        raise WrittenMeanwhileError(self.repo.name, "main")


def checkpoint_card(facts: CheckpointFacts) -> str:
    """Return the card of a checkpoint."""
    start, teacher = (each and reference_text(each, {}) for each in (facts.start, facts.teacher))
    base = facts.start.name if facts.start and facts.start.kind == "hub" else None
    relation = {"base_model": base, "base_model_relation": "finetune" if base else None}
    # Metrics of all data come before those of one source.
    metrics = sorted(facts.metrics.items(), key=lambda item: ("/" in item[0], item[0]))
    content = render_checkpoint_card(
        {
            "metadata": _card_metadata(facts.languages, len(facts.dimensions) > 1, **relation),
            "facts": facts,
            "start": start,
            "teacher": teacher,
            "metrics": [[code(name), f"{value:.4g}"] for name, value in metrics],
        }
    )
    # Raises on a header that the Hub could not read.
    return ModelCard(content).content


def checkpoints_card(repository: str, revisions: Mapping[str, Mapping[str, Any]], languages: Sequence[str]) -> str:
    """Return the card of the main branch: a table of all revisions, given by name in the order of the table."""
    rows = []
    for name, each in revisions.items():
        losses = [None if each.get(key) is None else f"{each[key]:.4g}" for key in ("train_loss", "eval_loss")]
        rows.append([name, each["stage"], each["step"], each["max_steps"], *losses])
    facts = {"metadata": _card_metadata(languages), "repository": repository, "rows": rows, "newest": rows[-1][0]}
    return ModelCard(render_checkpoints_card(facts)).content


def _card_metadata(languages: Sequence[str], matryoshka: bool = False, **fields: Any) -> str:
    known = hub_languages(languages)
    tags = [*shared_tags(matryoshka, known), "intermediate-checkpoint"]
    known = {"language": known or None, "library_name": LIBRARY, "pipeline_tag": PIPELINE, "tags": tags, **fields}
    return header(ModelCardData(**known))


def index_files(listed: Mapping[str, Any], facts: CheckpointFacts) -> dict[str, bytes]:
    """Return ``checkpoints.json`` and its card, with a further revision, for the main branch."""
    entry = {key: getattr(facts, key) for key in ("stage", "step", "max_steps", "epoch")}
    entry |= {key: facts.metrics[key] for key in ("train_loss", "eval_loss") if key in facts.metrics}
    revisions = {**listed["revisions"], facts.revision: entry}
    content = {
        "revisions": dict(sorted(revisions.items(), key=lambda item: (item[1]["stage"], item[1]["step"]))),
        "languages": sorted({*listed["languages"], *facts.languages}),
    }
    return {INDEX: _json(content), CARD: checkpoints_card(facts.repository, **content).encode()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def run_push_checkpoints(arguments: argparse.Namespace) -> None:
    """Upload the checkpoints of a run, or of all stages of a recipe; or show what would be uploaded."""
    place, hub = Destination.of(arguments, arguments.repo), Hub()
    folder, stage_name, cards = arguments.run_folder, arguments.stage_name, []
    runs = [folder] if (folder / RECIPE).is_file() else sorted(path.parent for path in folder.glob(f"*/{RECIPE}"))
    found = [CheckpointUpload(run, place, hub, stage_name) for run in runs if _checkpoints(run)]
    if not found:
        raise UserError(f"{folder}: holds no checkpoint of a run; give the output_dir of one that has been saved")
    if stage_name is not None and len(found) > 1:
        raise UserError(f"--stage-name names one stage, {folder} holds {len(found)}; give the folder of one")
    for upload in found:
        queue = PushQueue(upload.run)
        for checkpoint in _checkpoints(upload.run):
            if arguments.dry_run:
                facts, files = upload.revision(checkpoint)
                sys.stdout.write(preview(hub, replace(place, revision=facts.revision), files))
                cards.append({CARD: files[CARD]})
            else:
                sys.stdout.write(f"{upload.repo.address}: uploaded {upload.upload(checkpoint)}\n")
                queue.remove(queue.folder / checkpoint.name)
    if arguments.dry_run:
        sys.stdout.write(write_card(folder, *cards) + NOTHING_UPLOADED)


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run and of its queue, oldest first; a training may delete its own meanwhile."""
    found = {path.name: path for path in (*checkpoints(run), *PushQueue(run).pending())}
    return sorted(found.values(), key=step_of)
