"""What lies in the folder: all that the record lists, as it was packed, and nothing besides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from training.common.content import Content
from training.publishing.checks.packed import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Finding, PackedFolder
from training.publishing.record import RECORD

NEEDED = (
    *("README.md", "LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
    *("1_Pooling/config.json", "config_sentence_transformers.json", "training_arguments.json", RECORD),
)
# An adapter has its base's configuration.
NEEDED_OF_ADAPTERS = (
    *(file for file in NEEDED if file != "config.json"),
    *(ADAPTER_CONFIG, ADAPTER_WEIGHTS),
)
# Of training, of programs that ran here, and of systems: none of it belongs to a model.
_STATE = ("trainer_state", "optimizer", "scheduler", "rng_state", "training_args.", "projection", "events.out.tfevents")
_FOLDERS = {"__pycache__", "runs", "prepared", "global_step", "wandb"}
_SYSTEM = {"Thumbs.db", "desktop.ini"}
_REPACK = "pack the run again"


def check_needed(packed: PackedFolder) -> Iterator[Finding]:
    """Every file without which the folder is not complete by itself."""
    for file in _needed(packed):
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
        elif packed.is_link(packed.path / file):
            yield Finding(file, "is a link: what it points to would not be uploaded", "copy the file here")


def check_listed(packed: PackedFolder) -> Iterator[Finding]:
    """The record lists every other file, and each is the one that was packed: scores hold for these weights alone."""
    listed, hashes = packed.release.files, packed.release.sha256
    for file, size in listed.items():
        if file not in packed.files:
            if file not in _needed(packed):
                yield Finding(file, f"is missing, but {RECORD} lists it", _REPACK)
        elif packed.files[file] != size:
            wrong = f"has {packed.files[file]:,} bytes, but {RECORD} says {size:,}"
            yield Finding(file, wrong, _REPACK)
        elif Content(packed.path / file).sha256 != hashes.get(file):
            yield Finding(file, f"is not the file whose hash {RECORD} has", _REPACK)
    for file in packed.files:
        if file not in listed and file not in (RECORD, ".gitattributes"):
            yield Finding(file, f"is not in {RECORD}", "delete it, or pack the run again")


def _needed(packed: PackedFolder) -> tuple[str, ...]:
    return NEEDED_OF_ADAPTERS if packed.is_adapter else NEEDED
