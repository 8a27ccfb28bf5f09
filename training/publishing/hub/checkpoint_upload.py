"""Uploads checkpoints of a run, each as a revision of its own, and keeps the list of them on the main branch."""

from __future__ import annotations

import json
from pathlib import Path

from training.common.content import ATTRIBUTES, Content
from training.common.errors import UserError
from training.common.hub_names import SCRATCH
from training.common.outputs import temporary_folder
from training.publishing.hub.checkpoint_files import TRAINING_STATE, CheckpointedRun, Revision
from training.publishing.hub.checkpoint_index import INDEX, CheckpointIndex, held_by_release
from training.publishing.hub.destination import INCIDENTAL
from training.publishing.hub.hub import Hub
from training.publishing.hub.revision import WrittenMeanwhileError
from training.publishing.record import RECORD

# Tries to list a revision, each from what another run has listed meanwhile.
_LISTINGS = 5


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
        with temporary_folder() as folder:
            final = self.repo if finished else None
            revision = self.source.revision(checkpoint, Path(folder) / "revision", self.repo, final)
            index = None if finished else self._index(INDEX in held)
            self._check(revision, index)
            message = f"{revision.facts.stage}, step {revision.facts.step:,}"
            self.hub.publish(self.repo, revision.files, revision=revision.name, message=message)
        if not finished:
            self._list(revision)
        return revision.name

    def _list(self, revision: Revision) -> None:
        """Takes a revision into the list, which another run may be writing to."""
        for tries_left in reversed(range(_LISTINGS)):
            refs = self.hub.repository(self.repo).refs()
            head = next(branch.target_commit for branch in refs.branches if branch.name == "main")
            held = {*(self.hub.files(self.repo, head) or {})} - {ATTRIBUTES}
            index = self._index(INDEX in held, head)
            index.add(revision)
            # A licence that was chosen on the Hub's site stays.
            others = {path: self.hub.read(self.repo, path, head) for path in held - {INDEX, "README.md"}}
            listed = {path: content for path, content in others.items() if content is not None}
            listed |= index.files(self.repo)
            try:
                self.hub.publish(self.repo, listed, message=f"List {revision.name}", parent=head)
            except WrittenMeanwhileError:
                if not tries_left:
                    raise
            else:
                return

    def _index(self, there: bool, revision: str = "main") -> CheckpointIndex:
        try:
            return CheckpointIndex(self.hub.read(self.repo, INDEX, revision) if there else None)
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
        reason = reason or self._other_run(revision)
        if reason:
            raise self._refusal(reason)
        found = self.hub.files(self.repo, revision.name)
        if found is None:
            return
        for path in revision.weights:
            if path not in found or not Content(revision.files[path]).is_in(found[path]):
                raise self._refusal(f"its revision {revision.name} has other weights")

    def _other_run(self, revision: Revision) -> str | None:
        """Why a revision does not belong here: another run of the stage has revisions. None if it does.

        The first entry of the log is the same in all checkpoints of a run, however often it was resumed, and holds the
        loss, the norm of the gradient and the learning rate: another seed, data or schedule differs in one of them.
        """
        refs, first = self.hub.repository(self.repo).refs(), f"{revision.facts.stage}-step-"
        branches = sorted(branch.name for branch in refs.branches) if refs else []
        held = next((name for name in branches if name.startswith(first) and not name.endswith(SCRATCH)), None)
        if held is None or revision.began is None:
            return None
        try:
            began = json.loads(self.hub.read(self.repo, TRAINING_STATE, held) or b"")["log"]
        except (ValueError, KeyError, TypeError):
            return f"its revision {held} has no {TRAINING_STATE} that could be read"
        return f"its revision {held} is of another run" if began and began[0] != revision.began else None

    def _refusal(self, reason: str) -> UserError:
        return UserError(
            f"{self.repo}: {reason}", "give another repository or --stage-name, or --replace to replace it"
        )
