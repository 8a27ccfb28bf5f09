"""Uploads checkpoints of a run, each as a revision of its own, and keeps the list of them on the main branch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from training.errors import UserError
from training.publishing.checkpoint_files import CheckpointedRun, Revision
from training.publishing.checkpoint_index import INDEX, CheckpointIndex, held_by_release
from training.publishing.content import ATTRIBUTES, Content
from training.publishing.destination import INCIDENTAL
from training.publishing.hub import Hub
from training.publishing.record import RECORD

__all__ = ["CheckpointUpload"]


class CheckpointUpload:
    """Uploads of one run's checkpoints to one repository; doing it twice changes nothing.

    The repository may hold the finished model on its main branch: then that branch is left alone. Otherwise that holds
    the list of the revisions, and nothing else.

    Args:
        source: The run.
        repo: ``ORG/NAME``; made if need be.
        hub: The Hub.
        private: Whether a new repository is private; as its owner's settings say if None.
        replace: Whether revisions may be replaced, and checkpoints be put beside those of another stage of the name.
    """

    def __init__(
        self, source: CheckpointedRun, repo: str, hub: Hub, *, private: bool | None = None, replace: bool = False
    ) -> None:
        self.source, self.repo, self.hub = source, repo, hub
        self.private, self.replace = private, replace

    def upload(self, checkpoint: Path) -> str:
        """Uploads a checkpoint, and lists it.

        Args:
            checkpoint: ``checkpoint-N``, in the run or kept elsewhere.

        Returns:
            The name of its revision.

        Raises:
            UserError: If the repository holds something else, the revision has other weights, the checkpoint is
                damaged, or the Hub refuses the upload.
            HubUnavailableError: If the Hub is down. The revision is whole or absent.
        """
        self.hub.ensure_repo(self.repo, "model", self.private)
        held = {*(self.hub.files(self.repo) or {})} - {ATTRIBUTES}
        finished = RECORD in held
        if not finished and not held <= {*INCIDENTAL, INDEX} and not self.replace:
            raise self._refusal(f"holds {len(held)} files that no {INDEX} tells of")
        with TemporaryDirectory(prefix="f2llm-revision-") as folder:
            final = self.repo if finished else None
            revision = self.source.revision(checkpoint, Path(folder) / "revision", self.repo, final)
            index = None if finished else self._index(INDEX in held)
            self._check(revision, index)
            message = f"{revision.facts.stage}, step {revision.facts.step:,}"
            self.hub.publish(self.repo, revision.files, revision=revision.name, message=message)
        if index is not None:
            index.add(revision)
            # A licence that was chosen on the Hub's site stays.
            others = {path: self.hub.read(self.repo, path) for path in held - {INDEX, "README.md"}}
            listed = {path: content for path, content in others.items() if content is not None}
            listed |= index.files(self.repo)
            self.hub.publish(self.repo, listed, message=f"List {revision.name}")
        return revision.name

    def _index(self, there: bool) -> CheckpointIndex:
        try:
            return CheckpointIndex(self.hub.read(self.repo, INDEX) if there else None)
        except UserError as error:
            raise UserError(f"{self.repo}: {error}") from None

    def _check(self, revision: Revision, index: CheckpointIndex | None) -> None:
        """Makes sure that nothing else is replaced.

        Raises:
            UserError: If something would be.
        """
        if self.replace:
            return
        if index is None:
            reason = held_by_release(self.hub.read(self.repo, RECORD) or b"", revision.facts.stage)
        else:
            reason = index.objection(revision)
        if reason:
            raise self._refusal(reason)
        found = self.hub.files(self.repo, revision.name)
        if found is None:
            return
        for path in revision.weights:
            if path not in found or not Content(revision.files[path]).is_in(found[path]):
                raise self._refusal(f"its revision {revision.name} has other weights")

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.repo}: {reason}; give another repository or --stage-name, or --replace to replace it")
