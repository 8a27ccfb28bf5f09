"""Names on the Hub, checked before anything is sent: a repository with its owner, a branch, a tag."""

from __future__ import annotations

import re

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from training.common.errors import UserError, in_one_line

# What git allows in the name of a branch or tag (git-check-ref-format), less slashes.
_REVISION = re.compile(r"(?!.*\.\.)(?!.*\.lock$)[A-Za-z0-9][A-Za-z0-9._+-]*(?<!\.)")


def check_repository(name: str, option: str = "--repo") -> str:
    """The name of a repository, which must say whose it is; ``option`` gave it.

    Raises:
        UserError: If it is not ``ORG/NAME``.
    """
    owner, slash, own = name.partition("/")
    fault = "" if owner and slash and own and "/" not in own else "it is not ORG/NAME"
    if not fault:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            fault = in_one_line(error)
    if fault:
        raise UserError(f"{option} {name!r}: {fault}; give the owner and the name, such as my-org/my-model")
    return name


def check_revision(option: str, name: str) -> str:
    """The name of a branch or tag.

    Raises:
        UserError: If git has no such names, or it is one that uploads use.
    """
    if not _REVISION.fullmatch(name):
        raise UserError(f"{option} {name!r}: cannot name a revision; use letters, digits and . _ + -, such as v1.0")
    if name.endswith(SCRATCH):
        raise UserError(f"{option} {name!r}: names that end with {SCRATCH} are those of unfinished uploads")
    return name


# Ending of the branch on which a new revision is made.
SCRATCH = ".partial"
