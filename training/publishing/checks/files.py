"""Checks of the files of a packed folder: completeness, weights, an adapter and its base, remote code.

What needs the base of an adapter is checked if the base is on this machine; otherwise a notice says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from safetensors import SafetensorError

from training.common.hub import ATTRIBUTES, Content
from training.models.adapters import ADAPTER_WEIGHTS
from training.models.encoders import foreign_files
from training.models.model_folder import is_finite
from training.publishing.adapter import adapter_fields
from training.publishing.checks.packed import FaultError, Finding, PackedFolder
from training.publishing.model_files import ADAPTER_CONFIG, AUTO_MAP, CONFIG, code_files
from training.publishing.record import RECORD, AdapterRecord
from training.publishing.states import is_hub_name
from training.publishing.weights import INDEX, weights_digest

NEEDED = (
    *("README.md", "LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
    *("1_Pooling/config.json", "config_sentence_transformers.json", "training_arguments.json", RECORD),
)
_NEEDED_OF_ADAPTERS = (*(file for file in NEEDED if file != CONFIG), ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Files that do not belong in a release: those of training, of programs and systems, and pickles.
_STATE = ("trainer_state", "optimizer", "scheduler", "rng_state", "training_args.", "projection", "events.out.tfevents")
_OTHER = {"__pycache__", "runs", "prepared", "global_step", "wandb", "Thumbs.db", "desktop.ini"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib")
# Fields of the record that do not depend on the base of an adapter.
_OWN_FIELDS = ("parameters", "dimension", "prompts", "dtype")


def check_contents(packed: PackedFolder) -> Iterator[Finding]:
    """Everything is there that a folder needs, and nothing of training, caches or systems, no pickles, no links."""
    for file in _NEEDED_OF_ADAPTERS if packed.is_adapter else NEEDED:
        if file not in packed.files:
            yield Finding(file, "is missing")
    for file in packed.files:
        path = PurePosixPath(file)
        if path.name.startswith(_STATE):
            yield Finding(file, "is training state", "delete it")
        elif file.endswith(_PICKLES):
            yield Finding(file, "is not safetensors: files of this kind can run code", "delete it")
        elif any(part.startswith(".") or part in _OTHER for part in path.parts) and file != ATTRIBUTES:
            yield Finding(file, "does not belong in a release", "delete it")
        elif packed.is_link(file):
            yield Finding(file, "is a link: its target would not be uploaded", "copy the file here")


def check_listed(packed: PackedFolder) -> Iterator[Finding]:
    """The record lists every other file, each unchanged since it was packed: scores hold for these weights only."""
    sizes, hashes = packed.release.files, packed.release.sha256
    for file, size in sizes.items():
        if file not in packed.files:
            yield Finding(file, f"is missing, but {RECORD} lists it")
        elif packed.files[file] != size:
            yield Finding(file, f"has {packed.files[file]:,} bytes, but {RECORD} says {size:,}")
        elif Content(packed.path / file).sha256 != hashes.get(file):
            yield Finding(file, f"is not the file whose hash {RECORD} has")
    for file in packed.files.keys() - sizes.keys() - {RECORD, ATTRIBUTES}:
        yield Finding(file, f"is not in {RECORD}", "delete it, or pack the run again")


def check_record(packed: PackedFolder) -> Iterator[Finding]:
    """The record has the shape, widths, length, prompts, parameters and dtype that the files give."""
    fields = {**packed.model.fields, "dtype": packed.model.weights.dtype}
    for name, value in fields.items():
        depends_on_base = packed.is_adapter and packed.base is None and name not in _OWN_FIELDS
        recorded = getattr(packed.release, name)
        if name != "adapter" and not depends_on_base and recorded != value:
            yield Finding(RECORD, f"{name} is {recorded}, but the files give {value}")


def check_weights(packed: PackedFolder) -> Iterator[Finding]:
    """Every weight is finite, and in the file that the index names."""
    weights = packed.model.weights
    for name, file in weights.files.items():
        try:
            tensor = weights.load(name)
        except SafetensorError:
            yield Finding(INDEX, f"does not name the file that holds {name}")
        else:
            if not is_finite(tensor):
                yield Finding(file, f"{name} is NaN or infinite", "pack an earlier checkpoint")


def _adapter(packed: PackedFolder) -> AdapterRecord:
    adapter = packed.release.adapter
    if adapter is None or adapter.merged:
        raise FaultError(RECORD, "has no adapter, but the folder holds one")
    return adapter


def check_base(packed: PackedFolder) -> Iterator[Finding]:
    """The base is the Hub repository of the record, and has the weights that it had when the adapter was packed."""
    adapter, table = _adapter(packed), packed.json(ADAPTER_CONFIG)
    named = table.get("base_model_name_or_path")
    if not isinstance(named, str) or not is_hub_name(named) or named != adapter.base.name:
        wrong = f"base_model_name_or_path is {named!r}, not {adapter.base.name!r}"
        yield Finding(ADAPTER_CONFIG, wrong, "pack again with --base ORG/NAME")
    if packed.base is None:
        wrong = (
            f"not checked against its base {adapter.base.name}, which is not on this machine: names and shapes of the "
            "weights, the tokenizer's ids, the embeddings"
        )
        yield Finding(ADAPTER_CONFIG, wrong, "give its folder as --base FOLDER", fault=False)
    elif adapter.base_weights not in (None, weights_digest(packed.base.folder)):
        wrong = f"{packed.base.folder} has other weights than {adapter.base.name} had when the adapter was packed"
        yield Finding(ADAPTER_CONFIG, wrong, "give that model as --base FOLDER, or pack the run again")
    if adapter.match == "stated":
        wrong = f"that {adapter.base.name} is what the adapter was trained on was stated, not checked"
        yield Finding(RECORD, wrong, "pack the run again where that model is in the Hub's cache", fault=False)
    for name, value in adapter_fields(table).items():
        if value != getattr(adapter, name):
            yield Finding(RECORD, f"its {name} is {getattr(adapter, name)!r}, but {ADAPTER_CONFIG} has {value!r}")
    for file in packed.files:
        if file.endswith(".py"):
            yield Finding(file, "is code, which comes from an adapter's base", "delete it")


def check_remote_code(packed: PackedFolder) -> Iterator[Finding]:
    """``auto_map`` names our classes; the files that they need are there, and no other code."""
    found = packed.json(CONFIG).get("auto_map")
    if found != AUTO_MAP:
        yield Finding(CONFIG, f"auto_map is {found!r}, not {AUTO_MAP!r}")
        return
    needed, there = ({path.name for path in code_files(AUTO_MAP)}, {f for f in packed.files if f.endswith(".py")})
    for file in sorted(needed - there):
        yield Finding(file, "is missing, and auto_map needs it")
    for file in sorted(there - needed):
        yield Finding(file, "is code that auto_map does not need", "delete it")
    for file in foreign_files(packed.path):
        # Older code may be right, but is not what is tested here.
        wrong = "differs from modeling_f2llm of this checkout"
        yield Finding(file, wrong, "pack the run again for the newer code", fault=False)


def foreign_code(packed: PackedFolder) -> list[str]:
    """Return the files of code that loading the model may run and that differ from this checkout's."""
    folders = [packed.path] if packed.base is None else [packed.path, packed.base.folder]
    return [file for folder in folders for file in foreign_files(folder)]
