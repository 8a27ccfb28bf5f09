"""What lies in the folder: all that the record lists, in its size, and nothing besides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from training.publishing.checks.packed import Finding, PackedFolder
from training.publishing.record import RECORD

__all__ = ["check_foreign", "check_listed", "check_needed"]

NEEDED = (
    *("README.md", "LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
    *("1_Pooling/config.json", "config_sentence_transformers.json", "training_arguments.json", RECORD),
)
# Of training, of programs that ran here, and of systems: none of it belongs to a model.
_STATE = ("trainer_state", "optimizer", "scheduler", "rng_state", "training_args.", "projection", "events.out.tfevents")
_FOLDERS = {"__pycache__", "runs", "prepared", "global_step", "wandb"}
_SYSTEM = {"Thumbs.db", "desktop.ini"}
_REPACK = "pack the run again"


def check_needed(packed: PackedFolder) -> Iterator[Finding]:
    """Every file without which the folder is not complete by itself."""
    for file in NEEDED:
        if file not in packed.files:
            yield Finding(file, "is missing", _REPACK)


def check_foreign(packed: PackedFolder) -> Iterator[Finding]:
    """Nothing of training, of caches, of the system; no links."""
    for file in packed.files:
        path = PurePosixPath(file)
        if path.name.startswith(_STATE):
            yield Finding(file, "is training state", "delete it")
        elif any(part.startswith(".") or part in _FOLDERS for part in path.parts) or path.name in _SYSTEM:
            # A repository on the Hub keeps this one.
            if file != ".gitattributes":
                yield Finding(file, "does not belong into a release", "delete it")
        elif (packed.path / file).is_symlink():
            yield Finding(file, "is a link: what it points to would not be uploaded", "copy the file here")


def check_listed(packed: PackedFolder) -> Iterator[Finding]:
    """The record lists every other file and its size."""
    listed = packed.release.files
    for file, size in listed.items():
        if file not in packed.files:
            if file not in NEEDED:
                yield Finding(file, f"is missing, but {RECORD} lists it", _REPACK)
        elif packed.files[file] != size:
            wrong = f"has {packed.files[file]:,} bytes, but {RECORD} says {size:,}"
            yield Finding(file, wrong, _REPACK)
    for file in packed.files:
        if file not in listed and file not in (RECORD, ".gitattributes"):
            yield Finding(file, f"is not in {RECORD}", "delete it, or pack the run again")
