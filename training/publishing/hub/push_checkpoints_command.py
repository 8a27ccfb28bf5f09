"""The command that uploads every checkpoint of a run, and what its training left waiting."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.common.content import Content
from training.common.errors import UserError
from training.common.hub_names import check_repository
from training.common.outputs import temporary_folder
from training.common.run_folder import RECIPE, checkpoints
from training.publishing.hub.checkpoint_files import CheckpointedRun
from training.publishing.hub.checkpoint_upload import CheckpointUpload
from training.publishing.hub.hub import Hub
from training.publishing.hub.preview import amount, card_licence, file_list, summary, text_of, visibility, write_card
from training.publishing.hub.upload_queue import UploadQueue

logger = logging.getLogger("training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output_dir of a run, or of a recipe of stages")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the Hub, made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--stage-name", help="what revisions are named after (default: the run's folder)")
    parser.add_argument("--replace", action="store_true", help="even if a revision has other weights")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be uploaded, and write the cards beside RUN; needs no login",
    )


def run(arguments: argparse.Namespace) -> None:
    """Uploads the checkpoints, or shows what would be uploaded."""
    repo = check_repository(arguments.repo)
    sources = _sources(arguments.run_folder, arguments.stage_name)
    hub = Hub()
    if arguments.dry_run:
        sys.stdout.writelines(_preview(arguments, sources, repo, hub))
        return
    pushed = 0
    for source in sources:
        upload = CheckpointUpload(source, repo, hub, private=arguments.private or None, replace=arguments.replace)
        pushed += _push(source, upload)
    sys.stdout.write(f"{hub.address(repo)}: holds {pushed} checkpoint{'s' if pushed != 1 else ''} of this run\n")


def _sources(folder: Path, stage_name: str | None) -> list[CheckpointedRun]:
    """The runs in a folder that have checkpoints.

    Raises:
        UserError: If there are none, or one name is given for several.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    runs = [folder] if (folder / RECIPE).is_file() else sorted(path.parent for path in folder.glob(f"*/{RECIPE}"))
    runs = [run for run in runs if checkpoints(run) or UploadQueue(run).waiting()]
    if not runs:
        raise UserError(f"{folder}: holds no checkpoint of a run; give the output_dir of one that has been saved")
    if stage_name is not None and len(runs) > 1:
        raise UserError(f"--stage-name names one stage, {folder} holds {len(runs)}; give the folder of one")
    return [CheckpointedRun.of(run, stage_name) for run in runs]


def _checkpoints(source: CheckpointedRun) -> list[Path]:
    """Those that the run still has, and those that only wait; the oldest first."""
    waiting = {path.name: path for path in UploadQueue(source.run).waiting()}
    found = {path.name: path for path in checkpoints(source.run)} | waiting
    return sorted(found.values(), key=lambda path: int(path.name.rpartition("-")[2]))


def _push(source: CheckpointedRun, upload: CheckpointUpload) -> int:
    queue, pushed = UploadQueue(source.run), 0
    waited = {path.name for path in queue.waiting()}
    for checkpoint in _checkpoints(source):
        try:
            # Linked aside first: a training that goes on may delete it meanwhile.
            place = queue.add(checkpoint, limited=False)
        except UserError as error:
            logger.warning("%s", error)
            continue
        try:
            logger.info("%s: %s", upload.hub.address(upload.repo), upload.upload(place))
        except BaseException:
            # What only this command put there would keep its space on the disk, and go wherever a training uploads to.
            if place.name not in waited and (source.run / place.name).is_dir():
                queue.remove(place)
            raise
        queue.remove(place)
        pushed += 1
    return pushed


def _preview(arguments: argparse.Namespace, sources: Sequence[CheckpointedRun], repo: str, hub: Hub) -> Iterator[str]:
    rows, cards = [], []
    for source in sources:
        for checkpoint in _checkpoints(source):
            with temporary_folder() as folder:
                revision = source.revision(checkpoint, Path(folder) / "revision", repo)
                files = {path: Content(file) for path, file in revision.files.items()}
                yield f"{revision.name}:\n{file_list(files)}\n"
                rows.append(("upload", f"{amount(files)}, to {hub.address(repo)}, revision {revision.name}"))
                cards.append(text_of(files))
    rows += [("licence", card_licence(cards[0])), ("tag", "none"), ("visibility", visibility(arguments.private))]
    yield summary([*rows, ("cards", str(write_card(arguments.run_folder, "\n".join(cards))))])
