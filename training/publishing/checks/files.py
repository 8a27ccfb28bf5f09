"""Checks of the files of a packed folder: completeness, weights, an adapter and its base, remote code.

What needs the base of an adapter is checked if the base is on this machine; otherwise a notice says so.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from training.common.errors import UserError, in_one_line
from training.common.hub import Content
from training.models.adapters import ADAPTER_WEIGHTS, expected_shapes, require_peft
from training.models.encoders import foreign_files
from training.models.model_folder import is_finite
from training.publishing.adapter import adapter_fields
from training.publishing.checks.packed import Finding, PackedFolder, UnreadableError
from training.publishing.model_files import ADAPTER_CONFIG, CONFIG
from training.publishing.record import RECORD, AdapterRecord
from training.publishing.states import is_hub_name
from training.publishing.weights import INDEX, SINGLE, weights_digest

NEEDED = (
    *("README.md", "LICENSE", "config.json", "tokenizer.json", "tokenizer_config.json", "modules.json"),
    *("1_Pooling/config.json", "config_sentence_transformers.json", "training_arguments.json", RECORD),
)
_NEEDED_OF_ADAPTERS = (*(file for file in NEEDED if file != CONFIG), ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Files that do not belong into a release: those of training, of programs and systems, and pickles.
_STATE = ("trainer_state", "optimizer", "scheduler", "rng_state", "training_args.", "projection", "events.out.tfevents")
_OTHER = {"__pycache__", "runs", "prepared", "global_step", "wandb", "Thumbs.db", "desktop.ini"}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib")
# A file that every repository on the Hub has.
_ATTRIBUTES = ".gitattributes"
_SHARD_BYTES = 5 * 1000**3
# Remote code may import these and the standard library; transformers is built on huggingface_hub.
_ALLOWED = {"torch", "transformers", "huggingface_hub"}
_CLASSES = {"AutoConfig": "F2LLMConfig", "AutoModel": "F2LLMModel"}
_SHOWN = 3


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
        elif any(part.startswith(".") or part in _OTHER for part in path.parts) and file != _ATTRIBUTES:
            yield Finding(file, "does not belong into a release", "delete it")
        elif packed.is_link(packed.path / file):
            yield Finding(file, "is a link: what it points to would not be uploaded", "copy the file here")


def check_listed(packed: PackedFolder) -> Iterator[Finding]:
    """The record lists every other file, each unchanged since it was packed: scores hold for these weights only."""
    sizes, hashes = packed.release.files, packed.release.sha256
    for file, size in sizes.items():
        if file not in packed.files:
            if file not in (*NEEDED, ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                yield Finding(file, f"is missing, but {RECORD} lists it")
        elif packed.files[file] != size:
            yield Finding(file, f"has {packed.files[file]:,} bytes, but {RECORD} says {size:,}")
        elif Content(packed.path / file).sha256 != hashes.get(file):
            yield Finding(file, f"is not the file whose hash {RECORD} has")
    for file in packed.files:
        if file not in sizes and file not in (RECORD, _ATTRIBUTES):
            yield Finding(file, f"is not in {RECORD}", "delete it, or pack the run again")


def check_shards(packed: PackedFolder) -> Iterator[Finding]:
    """The index names the file of every tensor, and no file is over 5 GB: a broken download loses no more."""
    files = _weight_files(packed)
    for file in files:
        if packed.files[file] > _SHARD_BYTES:
            wrong = f"is {packed.files[file] / 1000**3:.1f} GB large"
            yield Finding(file, wrong, "pack again with --max-shard-size 5GB")
    if INDEX in packed.files:
        listed = packed.table(INDEX).get("weight_map")
        held = {name: file for file in files for name in packed.header(file)}
        if listed != held:
            wrong = {name for name in {*listed, *held} if listed.get(name) != held.get(name)}
            yield Finding(INDEX, f"does not name the file that holds {_some(wrong)}")
    elif files != [SINGLE]:
        yield Finding(INDEX, f"is missing, but the weights are in {_some(files)}")


def check_weights(packed: PackedFolder) -> Iterator[Finding]:
    """Exactly the tensors of a ``Qwen3Model`` of this configuration, of one dtype, finite, as the record says."""
    held: dict[str, Any] = {}
    for file in _weight_files(packed):
        held |= packed.header(file)
        yield from _check_finite(packed, file)
    prefixed = [name for name in held if name.startswith("model.")]
    if prefixed:
        wrong = f"tensors have the prefix 'model.' ({_some(prefixed)}): Qwen3Model has none"
        yield Finding(_weight_files(packed)[0], wrong, "save the encoder, not the language model")
        return
    yield from _check_tensors(packed, held, _expected(packed), "the configuration")


def check_adapter_weights(packed: PackedFolder) -> Iterator[Finding]:
    """The weights of such an adapter of its base, of one dtype, finite, as many as the record says."""
    held, adapter = packed.header(ADAPTER_WEIGHTS), _adapter(packed)
    yield from _check_finite(packed, ADAPTER_WEIGHTS)
    if packed.base is None:
        expected = {name: shape for name, (shape, _) in held.items() if _is_of(name, adapter)}
    else:
        require_peft()
        try:
            expected = expected_shapes(packed.path, packed.base.config)
        except UserError as error:
            yield Finding(ADAPTER_CONFIG, f"makes no adapter of {adapter.base.name} ({in_one_line(error)})")
            return
    yield from _check_tensors(packed, held, expected, "its base")


def _weight_files(packed: PackedFolder) -> list[str]:
    files = [file for file in packed.files if file.endswith(".safetensors")]
    if not files:
        raise UnreadableError(SINGLE, "is missing: the folder has no weights")
    return files


def _check_finite(packed: PackedFolder, file: str) -> Iterator[Finding]:
    broken = []
    for name in packed.header(file):
        # An open file keeps all that was read from it in memory.
        with safe_open(packed.path / file, framework="pt") as stored:
            broken += [] if is_finite(stored.get_tensor(name)) else [name]
    if broken:
        yield Finding(file, f"{_some(broken)} is NaN or infinite", "pack an earlier checkpoint")


def _check_tensors(
    packed: PackedFolder,
    held: Mapping[str, tuple[tuple[int, ...], str]],
    expected: Mapping[str, tuple[int, ...]],
    who: str,
) -> Iterator[Finding]:
    """Tensors other than ``who`` wants, and a dtype or count other than the record's."""
    file = _weight_files(packed)[0]
    for has, names in (("lacks", expected.keys() - held.keys()), ("has too many tensors:", held.keys() - expected)):
        if names:
            yield Finding(file, f"{has} {_some(names)}")
    for name in sorted(expected.keys() & held.keys()):
        if held[name][0] != expected[name]:
            yield Finding(file, f"{name} is {held[name][0]}, {who} wants {expected[name]}")
    dtypes = sorted({dtype for _, dtype in held.values()})
    if dtypes != [packed.release.dtype]:
        yield Finding(file, f"is of {', '.join(dtypes)}, but {RECORD} says {packed.release.dtype}")
    parameters = sum(prod(shape) for shape, _ in held.values())
    if packed.release.parameters != parameters:
        yield Finding(RECORD, f"{packed.release.parameters:,} parameters, but the weights have {parameters:,}")


def _expected(packed: PackedFolder) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that transformers itself makes of the configuration."""
    import torch
    from transformers import Qwen3Config, Qwen3Model

    packed.table(CONFIG)
    try:
        with torch.device("meta"):
            model = Qwen3Model(Qwen3Config.from_pretrained(packed.path, local_files_only=True))
    # A damaged configuration can raise any exception.
    except Exception as error:
        raise UnreadableError(CONFIG, f"makes no Qwen3Model ({in_one_line(error)})") from None
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _adapter(packed: PackedFolder) -> AdapterRecord:
    if not packed.release.is_adapter:
        raise UnreadableError(RECORD, "has no adapter, but the folder holds one")
    return packed.release.adapter


def _is_of(name: str, adapter: AdapterRecord) -> bool:
    """Whether a weight is of one of the adapted layers."""
    parts = name.split(".")
    return name.startswith("base_model.model.") and any(
        target in parts or name.partition(".lora_")[0].endswith(f".{target}") for target in adapter.targets
    )


def check_base(packed: PackedFolder) -> Iterator[Finding]:
    """The base is a Hub repository, consistently named, and has the weights that it had when the adapter was packed."""
    adapter = _adapter(packed)
    named = packed.table(ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not is_hub_name(named):
        wrong = f"base_model_name_or_path is {named!r}, not a name on the Hub"
        yield Finding(ADAPTER_CONFIG, wrong, "pack again with --base ORG/NAME")
    elif named != adapter.base.name:
        yield Finding(RECORD, f"the base is {adapter.base.name!r}, but {ADAPTER_CONFIG} has {named!r}")
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


def check_adapter_configuration(packed: PackedFolder) -> Iterator[Finding]:
    """The configuration is one that peft takes for LoRA, and says what the record says; there is no code."""
    require_peft()
    from peft import LoraConfig, PeftConfig

    table, adapter = packed.table(ADAPTER_CONFIG), _adapter(packed)
    try:
        config = PeftConfig.from_pretrained(packed.path)
    # A damaged configuration can raise any exception.
    except Exception as error:
        raise UnreadableError(ADAPTER_CONFIG, f"peft cannot read it ({in_one_line(error)})") from None
    if not isinstance(config, LoraConfig):
        yield Finding(ADAPTER_CONFIG, f"is of type {table.get('peft_type')!r}, not LORA")
    if config.task_type != "FEATURE_EXTRACTION":
        wrong = f"task_type is {table.get('task_type')!r}: PeftModel would make another model of it"
        yield Finding(ADAPTER_CONFIG, wrong, "set it to 'FEATURE_EXTRACTION'")
    for name, value in adapter_fields(table).items():
        if value != getattr(adapter, name):
            yield Finding(RECORD, f"its {name} is {getattr(adapter, name)!r}, but {ADAPTER_CONFIG} has {value!r}")
    for file in packed.files:
        if file.endswith(".py"):
            yield Finding(file, "is code, which an adapter's base brings", "delete it")


def check_remote_code(packed: PackedFolder) -> Iterator[Finding]:
    """``auto_map`` names our classes in files of the folder, which import no package that a user may not have."""
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    entries = packed.table(CONFIG).get("auto_map")
    if not isinstance(entries, dict) or any(
        str(entries.get(name)).rpartition(".")[2] != kind for name, kind in _CLASSES.items()
    ):
        yield Finding(CONFIG, f"auto_map is {entries!r}: it must name {' and '.join(_CLASSES.values())}")
        return
    reached: set[str] = set()
    for entry in entries.values():
        module, _, name = str(entry).rpartition(".")
        file = f"{module}.py"
        try:
            defined = {node.name for node in ast.parse(packed.text(file)).body if isinstance(node, ast.ClassDef)}
            reached |= {file, *(Path(each).name for each in get_relative_import_files(packed.path / file))}
        except (SyntaxError, ValueError) as error:
            raise UnreadableError(file, f"is not Python ({error})") from None
        except FileNotFoundError as error:
            yield Finding(file, f"imports {Path(error.filename).name}, which is not there")
            continue
        if name not in defined:
            yield Finding(file, f"does not define {name}, which auto_map names")
    for file in sorted(name for name in packed.files if name.endswith(".py")):
        if file not in reached:
            yield Finding(file, "is code that neither auto_map names nor a file of it imports", "delete it")
            continue
        # transformers refuses code from the Hub by this rule: every import must be installed, except in a `try`.
        try:
            imported = set(get_imports(packed.path / file))
        except SyntaxError as error:
            raise UnreadableError(file, f"is not Python ({error})") from None
        for package in sorted(imported - _ALLOWED - sys.stdlib_module_names):
            wrong = f"imports {package}: who loads the model need not have it"
            yield Finding(file, wrong, "keep remote code to torch and transformers")
    for file in foreign_files(packed.path):
        # Older code may be right, but is not what is tested here.
        wrong = "differs from modeling_f2llm of this checkout"
        yield Finding(file, wrong, "pack the run again for the newer code", fault=False)


def foreign_code(packed: PackedFolder) -> list[str]:
    """Return the files of code that loading the model may run and that differ from this checkout's."""
    folders = [packed.path] if packed.base is None else [packed.path, packed.base.folder]
    return [file for folder in folders for file in foreign_files(folder)]
