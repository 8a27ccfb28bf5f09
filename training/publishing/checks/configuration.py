"""``config.json``: a Qwen3 configuration that is sound in itself and agrees with the release."""

from __future__ import annotations

from collections.abc import Iterator

from training.common.errors import in_one_line
from training.publishing.checks.packed import (
    CONFIG,
    TOKENIZER_CONFIG,
    TRANSFORMER_MODULE,
    Finding,
    PackedFolder,
)
from training.publishing.record import RECORD

_REPACK = "pack the run again"


def check_configuration(packed: PackedFolder) -> Iterator[Finding]:
    """The model type and the class that every loader of Qwen3 knows, and as many layer types as layers."""
    config = packed.table(CONFIG)
    if config.get("model_type") != "qwen3":
        wrong = f"model_type is {config.get('model_type')!r}: plain transformers and servers know 'qwen3' only"
        yield Finding(CONFIG, wrong, _REPACK)
    if config.get("architectures") != ["Qwen3Model"]:
        yield Finding(CONFIG, f"architectures is {config.get('architectures')!r}, not ['Qwen3Model']", _REPACK)
    layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        count = len(types) if isinstance(types, list) else "no"
        yield Finding(CONFIG, f"{count} layer_types for {layers} layers", "give one for each layer")
    window = config.get("max_window_layers")
    if isinstance(window, int) and isinstance(layers, int) and window > layers:
        yield Finding(CONFIG, f"max_window_layers {window} is more than the {layers} layers", f"set it to {layers}")


def check_validity(packed: PackedFolder) -> Iterator[Finding]:
    """What transformers' own class and ours say of the configuration."""
    from transformers import Qwen3Config

    from modeling_f2llm import F2LLMConfig

    packed.table(CONFIG)
    for kind in (Qwen3Config, F2LLMConfig):
        try:
            kind.from_pretrained(packed.path, local_files_only=True).validate()
        # Strict data classes raise errors of their own, older validators plain ones.
        except Exception as error:
            yield Finding(CONFIG, f"{kind.__name__} refuses it ({in_one_line(error)})", _REPACK)
            return


def check_matryoshka(packed: PackedFolder) -> Iterator[Finding]:
    """The widths that servers allow: the full one first, none wider, as the release says."""
    config = packed.table(CONFIG)
    width, dims = config.get("hidden_size"), config.get("matryoshka_dimensions")
    if config.get("is_matryoshka") is not True:
        if len(packed.release.dimensions) > 1:
            yield Finding(CONFIG, "is_matryoshka is not true: servers refuse to truncate", "set it to true")
        return
    if not isinstance(dims, list) or not dims:
        wrong = "matryoshka_dimensions is missing: servers cannot tell which dimensions were trained"
        yield Finding(CONFIG, wrong, _REPACK)
        return
    wide = [dim for dim in dims if not isinstance(dim, int) or not 1 <= dim <= width]
    if wide:
        yield Finding(CONFIG, f"matryoshka_dimensions {wide} do not fit hidden_size {width}", "leave them out")
    elif dims[0] != width or sorted(dims, reverse=True) != dims:
        wrong = f"matryoshka_dimensions {dims} do not start with hidden_size {width} and fall from there"
        yield Finding(CONFIG, wrong, "order them")
    elif list(packed.release.dimensions) != dims:
        wrong = f"dimensions {list(packed.release.dimensions)}, but config.json has {dims}"
        yield Finding(RECORD, wrong, _REPACK)


def check_release(packed: PackedFolder) -> Iterator[Finding]:
    """The shape that the record and so the card tell."""
    config, release = packed.table(CONFIG), packed.release
    if release.dimension != config.get("hidden_size"):
        wrong = f"dimension {release.dimension}, but hidden_size is {config.get('hidden_size')}"
        yield Finding(RECORD, wrong, _REPACK)
    for name, value in release.shape.items():
        if name in config and config[name] != value:
            yield Finding(RECORD, f"{name} is {value!r}, but config.json has {config[name]!r}", _REPACK)


def check_lengths(packed: PackedFolder) -> Iterator[Finding]:
    """How long a text may be: the model, its tokenizer, sentence-transformers and the record agree."""
    positions = packed.table(CONFIG).get("max_position_embeddings")
    length = packed.table(TOKENIZER_CONFIG).get("model_max_length")
    if not isinstance(positions, int):
        yield Finding(CONFIG, f"max_position_embeddings is {positions!r}", _REPACK)
        return
    if not isinstance(length, int) or length > positions:
        wrong = f"model_max_length {length} is more than the {positions} positions of the model"
        yield Finding(TOKENIZER_CONFIG, wrong, f"set it to {positions} or less")
        return
    if length != packed.release.max_length:
        wrong = f"max_length {packed.release.max_length}, but the tokenizer truncates at {length}"
        yield Finding(RECORD, wrong, _REPACK)
    if TRANSFORMER_MODULE in packed.files:
        given = packed.table(TRANSFORMER_MODULE).get("max_seq_length", length)
        if given != length:
            wrong = f"max_seq_length {given}, but the tokenizer truncates at {length}"
            yield Finding(TRANSFORMER_MODULE, wrong, f"set it to {length}")
