"""What a user can put right."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """A fault in a recipe, manifest, data file or folder: one line that says what, where and what to do about it.

    Commands print the line and exit with status 2, without a traceback.
    """
