"""The weights: safetensors alone, exactly the tensors that the configuration wants, finite, of the dtype that is told.

Files are read tensor by tensor, and large tensors piece by piece: no more than a piece is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from training.common.errors import in_one_line
from training.publishing.checks.packed import CONFIG, Finding, PackedFolder, UnreadableError
from training.publishing.record import RECORD

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5", ".joblib")
_SHARD_BYTES = 5 * 1000**3
# Elements that are looked at together.
_PIECE = 2**24
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_REPACK = "pack the run again"
_SHOWN = 3


def check_pickles(packed: PackedFolder) -> Iterator[Finding]:
    """No file that runs code when it is loaded."""
    for file in packed.files:
        if file.endswith(_PICKLES):
            yield Finding(
                file, "is no safetensors: files of this kind can run code, or are training state", "delete it"
            )


def check_shards(packed: PackedFolder) -> Iterator[Finding]:
    """At least one file, none over 5 GB (a Hub limit of convenience: a broken download loses no more than that)."""
    for file in _weight_files(packed):
        size = packed.files[file]
        if size > _SHARD_BYTES:
            yield Finding(file, f"is {size / 1000**3:.1f} GB large", "pack again with --max-shard-size 5GB")


def check_index(packed: PackedFolder) -> Iterator[Finding]:
    """The index names every tensor in the shard that holds it."""
    files = _weight_files(packed)
    if INDEX not in packed.files:
        if files != [SINGLE]:
            yield Finding(INDEX, f"is missing, but the weights are in {some(files)}", _REPACK)
        return
    listed = packed.table(INDEX).get("weight_map")
    if not isinstance(listed, dict):
        yield Finding(INDEX, "has no weight_map", _REPACK)
        return
    held = {name: file for file in files for name in header(packed, file)}
    for file in sorted({str(file) for file in listed.values()} - set(files)):
        yield Finding(INDEX, f"names {file}, which is not there", _REPACK)
    wrong = sorted(name for name in {*listed, *held} if listed.get(name) != held.get(name))
    if wrong and {str(file) for file in listed.values()} <= set(files):
        yield Finding(INDEX, f"does not say where {some(wrong)} lies", _REPACK)


def check_tensors(packed: PackedFolder) -> Iterator[Finding]:
    """The tensors of a ``Qwen3Model`` of this configuration, no more and no fewer, in their shapes."""
    held = _tensors(packed)
    prefixed = [name for name in held if name.startswith("model.")]
    if prefixed:
        wrong = f"tensors have the prefix 'model.' ({some(prefixed)}): Qwen3Model has none"
        yield Finding(_place(packed, prefixed), wrong, "save the encoder, not the language model")
        return
    expected = _expected(packed)
    for name, names in (("lacks", expected.keys() - held.keys()), ("has, beyond the model,", held.keys() - expected)):
        if names:
            yield Finding(_place(packed, names), f"{name} {some(names)}", _REPACK)
    for name in sorted(expected.keys() & held.keys()):
        shape = tuple(held[name][0])
        if shape != expected[name]:
            wrong = f"{name} is {shape}, the configuration wants {expected[name]}"
            yield Finding(_place(packed, [name]), wrong, _REPACK)


def check_dtype(packed: PackedFolder) -> Iterator[Finding]:
    """One dtype, the one that the configuration and the record tell, and as many parameters."""
    held = _tensors(packed)
    dtypes = sorted({DTYPE_NAMES.get(dtype, dtype) for _, dtype in held.values()})
    if len(dtypes) != 1:
        yield Finding(_place(packed, held), f"mixes {', '.join(dtypes)}", _REPACK)
        return
    config, release = packed.table(CONFIG), packed.release
    told = config.get("dtype", config.get("torch_dtype"))
    if told != dtypes[0]:
        yield Finding(CONFIG, f"dtype is {told!r}, but the weights are {dtypes[0]}", f"set it to {dtypes[0]!r}")
    if release.dtype != dtypes[0]:
        yield Finding(RECORD, f"dtype is {release.dtype!r}, but the weights are {dtypes[0]}", _REPACK)
    parameters = sum(prod(shape) for shape, _ in held.values())
    if release.parameters != parameters:
        yield Finding(RECORD, f"{release.parameters:,} parameters, but the weights have {parameters:,}", _REPACK)


def check_finite(packed: PackedFolder) -> Iterator[Finding]:
    """No weight is NaN or infinite."""
    for file in _weight_files(packed):
        header(packed, file)
        broken = [name for name in _open_names(packed, file) if not _is_finite(packed, file, name)]
        if broken:
            yield Finding(file, f"{some(broken)} is NaN or infinite", "pack an earlier checkpoint")


def _weight_files(packed: PackedFolder) -> list[str]:
    files = [file for file in packed.files if file.endswith(".safetensors")]
    if not files:
        raise UnreadableError(SINGLE, "is missing: the folder has no weights")
    return files


def header(packed: PackedFolder, file: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor of a file.

    Raises:
        UnreadableError: If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(packed.path / file, framework="pt") as stored:
            if (stored.metadata() or {}).get("format") != "pt":
                raise UnreadableError(file, "lacks the metadata 'format: pt', without which transformers refuses it")
            pieces = {name: stored.get_slice(name) for name in stored.keys()}
            return {name: (piece.get_shape(), piece.get_dtype()) for name, piece in pieces.items()}
    except (OSError, SafetensorError) as error:
        raise UnreadableError(file, f"is no safetensors file ({in_one_line(error)})") from None


def _open_names(packed: PackedFolder, file: str) -> Iterable[str]:
    return list(header(packed, file))


def _is_finite(packed: PackedFolder, file: str, name: str) -> bool:
    from safetensors import safe_open

    with safe_open(packed.path / file, framework="pt") as stored:
        piece = stored.get_slice(name)
        shape = piece.get_shape()
        if not shape:
            return bool(stored.get_tensor(name).isfinite())
        rows = max(1, _PIECE // max(1, prod(shape[1:])))
        return all(bool(piece[start : start + rows].isfinite().all()) for start in range(0, shape[0], rows))


def _tensors(packed: PackedFolder) -> dict[str, tuple[list[int], str]]:
    return {name: tensor for file in _weight_files(packed) for name, tensor in header(packed, file).items()}


def _expected(packed: PackedFolder) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that transformers makes of the configuration, without making them.

    Raises:
        UnreadableError: If it makes none of it.
    """
    import torch
    from transformers import Qwen3Config, Qwen3Model

    packed.table(CONFIG)
    try:
        with torch.device("meta"):
            model = Qwen3Model(Qwen3Config.from_pretrained(packed.path, local_files_only=True))
    except Exception as error:
        raise UnreadableError(CONFIG, f"makes no Qwen3Model ({in_one_line(error)})") from None
    return {name: tuple(weights.shape) for name, weights in model.state_dict().items()}


def _place(packed: PackedFolder, names: Iterable[Any]) -> str:
    """The file that holds one of the tensors, or the first one."""
    files, names = _weight_files(packed), set(names)
    return next((file for file in files if names & header(packed, file).keys()), files[0])


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
