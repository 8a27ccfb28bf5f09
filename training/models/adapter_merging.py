"""Merging: an adapter's updates are added to its base's weights, and the sum is saved as a released folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modeling_f2llm.configuration_f2llm import matryoshka_dims
from modeling_f2llm.modeling_f2llm import F2LLMModel
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import check_output, locked, new_folder
from training.common.run_folder import write_whole
from training.models.adapter import attach_adapter, merge
from training.models.adapter_folder import MERGED_ADAPTER, AdapterFolder, base_revision
from training.models.loading import load_base
from training.models.model_identity import model_file, model_revision
from training.models.settings import saved_prompts, why_not_last_token
from training.models.tokenizer import load_tokenizer

_ARGUMENTS = "training_arguments.json"


def merge_adapter(adapter: AdapterFolder, output: Path, base: str | None = None, any_base: bool = False) -> None:
    """Writes the merged model, in fp32, whole or not at all; nothing is done if it is there already.

    Tokenizer and prompts are the adapter's if it has its own, else its base's.

    Args:
        adapter: The adapter.
        output: The folder to write.
        base: Where its base is now; where the adapter says if None.
        any_base: Whether another model of its base's shape will do.

    Raises:
        UserError: If adapter and base do not belong together, or the folder holds something else.
        StoppedError: If the folder cannot be written.
    """
    base = base or adapter.base
    check_output(output, [Path(adapter.name), Path(base)])
    # Under another name it must be the same weights, and somebody must have noted which.
    if base != adapter.base and adapter.base_revision is None and not any_base:
        raise UserError(
            f"--base {base}: {adapter.name} was trained on {adapter.base}; give that, leave --base out, or add "
            "--accept-other-base if it is the same model under another name"
        )
    record = {
        "adapter": {"name": adapter.name, "revision": model_revision(adapter.name, "the adapter")},
        "base": {"name": base, "revision": base_revision(base, "--base")},
    }
    with locked(output):
        if output.exists():
            if _read(output / MERGED_ADAPTER) == record:
                return
            raise UserError(f"{output}: the folder holds something else; give another --output")
        _merge(adapter, base, any_base, record, output)


def _merge(adapter: AdapterFolder, base: str, any_base: bool, record: dict[str, Any], output: Path) -> None:
    spoken = adapter.name if model_file(adapter.name, "modules.json") else base
    if (other := why_not_last_token(spoken)) is not None:
        raise UserError(f"{spoken}: {other}; only an adapter of a model that is pooled at the last token is merged")
    model = load_base(adapter, base, same=not any_base)
    attach_adapter(model, adapter, trainable=False)
    merge(model)
    trained = model_file(adapter.name, _ARGUMENTS, adapter.revision)
    _set_dims(model, trained)
    _write(model, load_tokenizer(spoken), saved_prompts(spoken) or {}, record, trained, output)


def _set_dims(model: F2LLMModel, path: Path | None) -> None:
    """The widths that the adapter was trained at, where its arguments say so; those of the base otherwise."""
    width = model.config.hidden_size
    widths = trained_widths((_read(path) if path else None) or {}, width)
    if widths is not None:
        model.config.is_matryoshka = len(widths) > 1
        model.config.matryoshka_dimensions = widths if len(widths) > 1 else None


def trained_widths(arguments: Mapping[str, Any], width: int) -> list[int] | None:
    """The widths that a stage was trained at, the full one first; None if its arguments do not say.

    Args:
        arguments: Those of the stage.
        width: The full one.
    """
    if "matryoshka" not in arguments:
        return None
    if not arguments["matryoshka"]:
        return [width]
    given = arguments["matryoshka_dimensions"]
    return matryoshka_dims(width, arguments["matryoshka_min_dim"]) if given is None else sorted({*given, width})[::-1]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(
    model: F2LLMModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, str],
    record: dict[str, Any],
    trained: Path | None,
    output: Path,
) -> None:
    try:
        with new_folder(output) as partial:
            build_sentence_transformer(model, tokenizer, prompts).save_pretrained(str(partial), create_model_card=False)
            write_whole(partial / MERGED_ADAPTER, json.dumps(record, indent=2) + "\n")
            # With them it can be packed as a state of the adapter's run.
            if trained is not None:
                shutil.copyfile(trained, partial / _ARGUMENTS)
    # A full disk comes out of safetensors as an error of its own.
    except Exception as error:
        raise StoppedError(f"{output}: the merged model could not be written ({in_one_line(error)})") from error
