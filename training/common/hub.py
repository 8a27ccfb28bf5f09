"""Names and files as the Hub knows them: repositories, revisions, and file contents by size and hash."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from training.common.errors import UserError

# Suffix of the branch on which a new revision is made.
SCRATCH = ".partial"
# What git allows in the name of a branch or tag (git-check-ref-format), without slashes.
_REVISION = re.compile(r"(?!.*\.\.)(?!.*\.lock$)[A-Za-z0-9][A-Za-z0-9._+-]*(?<!\.)")
# The Hub's own file of a repository, which says which names are large files. It is never removed.
ATTRIBUTES = ".gitattributes"
# Larger files are uploaded one by one before the commit.
LARGE_BYTES = 2**20


def check_repository(name: str, option: str = "--repo") -> str:
    """Return the name of a repository if it is ``ORG/NAME``; ``option`` is where the user gave it."""
    if name.count("/") != 1 or not may_be_on_hub(name):
        raise UserError(f"{option} {name!r}: it is not ORG/NAME; give the owner and the name, such as my-org/my-model")
    return name


def may_be_on_hub(name: str) -> bool:
    """Return whether the Hub allows the name, with or without an organisation."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_revision(option: str, name: str) -> str:
    """Return the name of a branch or tag if git allows it and uploads do not use it."""
    if not _REVISION.fullmatch(name):
        raise UserError(f"{option} {name!r}: cannot name a revision; use letters, digits and . _ + -, such as v1.0")
    if name.endswith(SCRATCH):
        raise UserError(f"{option} {name!r}: names that end with {SCRATCH} are those of unfinished uploads")
    return name


@dataclass(frozen=True)
class Content:
    """The content of a file to upload: a file on disk, or bytes.

    Hashes hold for what is sent: a small file is read once and sent from memory, a large one must not change until it
    is sent.
    """

    source: Path | bytes

    @classmethod
    def of(cls, source: Path | bytes | Content) -> Content:
        """Return the content of a source; an existing content keeps its hashes."""
        return source if isinstance(source, Content) else cls(source)

    @cached_property
    def _stamp(self) -> tuple[int, ...]:
        """What changes with every write to a file: size and times."""
        status = self.source.stat()
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @cached_property
    def payload(self) -> Path | bytes:
        """What is sent: the hashed bytes, or the path of a large file."""
        if isinstance(self.source, bytes) or self._stamp[0] >= LARGE_BYTES:
            return self.source
        return self.source.read_bytes()

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.payload) if isinstance(self.payload, bytes) else self._stamp[0]

    @cached_property
    def sha256(self) -> str:
        """Hash of the content, in hexadecimal digits."""
        with BytesIO(self.payload) if isinstance(self.payload, bytes) else self.payload.open("rb") as file:
            return sha_fileobj(file).hex()

    @property
    def is_unchanged(self) -> bool:
        """Whether what is sent is still what was hashed."""
        return isinstance(self.payload, bytes) or Content(self.payload)._stamp == self._stamp

    def is_in(self, file: RepoFile) -> bool:
        """Return whether a file of a revision has this content; only files of the same size are hashed."""
        if file.size != self.size:
            return False
        if file.lfs is not None:
            return file.lfs.sha256 == self.sha256
        return git_hash(self.payload if isinstance(self.payload, bytes) else self.payload.read_bytes()) == file.blob_id


def same_files(wanted: Mapping[str, Content], found: Mapping[str, RepoFile]) -> bool:
    """Return whether a revision holds exactly the wanted files, not counting :data:`ATTRIBUTES`."""
    return {*wanted} - {ATTRIBUTES} == {*found} - {ATTRIBUTES} and all(
        path in found and content.is_in(found[path]) for path, content in wanted.items()
    )
