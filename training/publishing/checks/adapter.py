"""An adapter: a configuration that peft takes, weights that fit the base, and a base that a visitor can load.

What needs the base is checked where that is at hand; where it is not, a notice says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from training.common.errors import UserError, in_one_line
from training.models.adapter import require_peft
from training.models.adapter_shapes import expected_shapes
from training.publishing.adapter_base import is_hub_name
from training.publishing.adapter_model import adapter_fields
from training.publishing.checks.packed import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Finding, PackedFolder, UnreadableError
from training.publishing.checks.weights import DTYPE_NAMES, header, some
from training.publishing.record import RECORD, AdapterRecord
from training.publishing.weights import weights_digest

_REPACK = "pack the run again"
_BASE_CHECKS = "names and shapes of the weights, the tokenizer's ids, the embeddings"


def check_base(packed: PackedFolder) -> Iterator[Finding]:
    """The base has a name on the Hub, the same everywhere, and is the one that is at hand."""
    adapter = _adapter(packed)
    named = packed.table(ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not is_hub_name(named):
        wrong = f"base_model_name_or_path is {named!r}, no name on the Hub"
        yield Finding(ADAPTER_CONFIG, wrong, "pack again with --base ORG/NAME")
    elif named != adapter.base.name:
        yield Finding(RECORD, f"the base is {adapter.base.name!r}, but {ADAPTER_CONFIG} has {named!r}", _REPACK)
    if packed.base is None:
        wrong = f"not checked against its base {adapter.base.name}, which is not at hand: {_BASE_CHECKS}"
        yield Finding(ADAPTER_CONFIG, wrong, "give its folder as --base FOLDER", fault=False)
    elif adapter.base_weights not in (None, weights_digest(packed.base.folder)):
        wrong = f"{packed.base.folder} has other weights than {adapter.base.name} had when the adapter was packed"
        yield Finding(ADAPTER_CONFIG, wrong, "give that model as --base FOLDER, or pack the run again")
    if adapter.match == "stated":
        wrong = f"that {adapter.base.name} is what the adapter was trained on was stated, not checked"
        yield Finding(RECORD, wrong, "pack the run again where that model is in the Hub's cache", fault=False)


def check_adapter_configuration(packed: PackedFolder) -> Iterator[Finding]:
    """peft takes it for LoRA, and it says what the record says."""
    require_peft()
    from peft import LoraConfig, PeftConfig

    table, adapter = packed.table(ADAPTER_CONFIG), _adapter(packed)
    try:
        config = PeftConfig.from_pretrained(packed.path)
    # Damage comes out of the library as anything.
    except Exception as error:
        raise UnreadableError(ADAPTER_CONFIG, f"peft cannot read it ({in_one_line(error)})") from None
    if not isinstance(config, LoraConfig):
        yield Finding(ADAPTER_CONFIG, f"is of type {table.get('peft_type')!r}, not LORA", _REPACK)
        return
    if config.task_type != "FEATURE_EXTRACTION":
        wrong = f"task_type is {table.get('task_type')!r}: PeftModel would make another model of it"
        yield Finding(ADAPTER_CONFIG, wrong, "set it to 'FEATURE_EXTRACTION'")
    for name, value in adapter_fields(table).items():
        if value != getattr(adapter, name):
            wrong = f"its {name} is {getattr(adapter, name)!r}, but {ADAPTER_CONFIG} has {value!r}"
            yield Finding(RECORD, wrong, _REPACK)


def check_adapter_tensors(packed: PackedFolder) -> Iterator[Finding]:
    """The weights of such an adapter, of one dtype, as many as the record says; of its base's shapes."""
    held = header(packed, ADAPTER_WEIGHTS)
    adapter, release = _adapter(packed), packed.release
    dtypes = sorted({DTYPE_NAMES.get(dtype, dtype) for _, dtype in held.values()})
    if dtypes != [release.dtype]:
        yield Finding(ADAPTER_WEIGHTS, f"is of {', '.join(dtypes)}, but {RECORD} says {release.dtype}", _REPACK)
    parameters = sum(prod(shape) for shape, _ in held.values())
    if not parameters == release.parameters == adapter.parameters:
        wrong = f"{release.parameters:,} parameters, but the adapter has {parameters:,}"
        yield Finding(RECORD, wrong, _REPACK)
    unknown = [name for name in held if not _is_of(name, adapter)]
    if unknown:
        yield Finding(ADAPTER_WEIGHTS, f"has, beyond the layers that it adapts, {some(unknown)}", _REPACK)
    if packed.base is None:
        return
    require_peft()
    try:
        expected = expected_shapes(packed.path, packed.base.config)
    except UserError as error:
        yield Finding(ADAPTER_CONFIG, f"makes no adapter of {adapter.base.name} ({in_one_line(error)})", _REPACK)
        return
    if missing := expected.keys() - held.keys():
        yield Finding(ADAPTER_WEIGHTS, f"lacks {some(missing)}", _REPACK)
    if foreign := held.keys() - expected.keys() - set(unknown):
        yield Finding(ADAPTER_WEIGHTS, f"has, beyond an adapter of its base, {some(foreign)}", _REPACK)
    for name in sorted(expected.keys() & held.keys()):
        if tuple(held[name][0]) != expected[name]:
            wrong = f"{name} is {tuple(held[name][0])}, its base wants {expected[name]}"
            yield Finding(ADAPTER_WEIGHTS, wrong, "give its own base, or pack the run again")


def check_code(packed: PackedFolder) -> Iterator[Finding]:
    """No code: the base brings its own."""
    for file in packed.files:
        if file.endswith(".py"):
            yield Finding(file, "is code, which an adapter's base brings", "delete it")


def _adapter(packed: PackedFolder) -> AdapterRecord:
    """What the record says of the adapter.

    Raises:
        UnreadableError: If it says nothing.
    """
    if not packed.release.is_adapter:
        raise UnreadableError(RECORD, "tells of no adapter, but the folder holds one")
    return packed.release.adapter


def _is_of(name: str, adapter: AdapterRecord) -> bool:
    """Whether a weight is of one of the adapted layers."""
    parts = name.split(".")
    return name.startswith("base_model.model.") and any(
        target in parts or name.partition(".lora_")[0].endswith(f".{target}") for target in adapter.targets
    )
