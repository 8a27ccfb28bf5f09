"""Merge an adapter into its base: one complete model with the same embeddings, which needs no peft.

:func:`merge_named` is the work of ``merge.py``: it averages models, or merges the one adapter that is named.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from modeling_f2llm.configuration_f2llm import matryoshka_dims
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.common.errors import StoppedError, UserError, in_one_line
from training.common.outputs import check_output, locked, new_folder, write_whole
from training.common.run_folder import FINAL_MODEL
from training.models.adapters import attach_adapter, merge_into_base
from training.models.loading import load_base, load_tokenizer
from training.models.merging import MAX_SHARD_SIZE, find_parent, mean_of, merge, slerp_of
from training.models.model_folder import read_json
from training.models.model_ref import (
    MERGED_ADAPTER,
    AdapterFolder,
    base_revision,
    find_adapter,
    model_file,
    model_revision,
    prompts_of,
    why_not_last_token,
)

_ARGUMENTS = "training_arguments.json"


def merge_adapter(adapter: AdapterFolder, output: Path, base: str | None = None, any_base: bool = False) -> None:
    """Write the merged model, in fp32, whole or not at all; do nothing if it is there already.

    Tokenizer and prompts are the adapter's if it has them. With ``any_base`` the base may have other weights than in
    training.
    """
    base = base or adapter.base
    check_output(output, [Path(adapter.name), Path(base)])
    # Under another name it must have the recorded weights.
    if base != adapter.base and adapter.base_revision is None and not any_base:
        raise UserError(
            f"--base {base}: {adapter.name} was trained on {adapter.base}; give that, or add --accept-other-base"
        )
    record = {
        "adapter": {"name": adapter.name, "revision": model_revision(adapter.name, "the adapter", adapter.revision)},
        "base": {"name": base, "revision": base_revision(base, "--base")},
    }
    with locked(output):
        if output.exists():
            if read_json(output / MERGED_ADAPTER) == record:
                return
            raise UserError(f"{output}: the folder holds something else; give another --output")
        _write(adapter, base, any_base, record, output)


def _write(adapter: AdapterFolder, base: str, any_base: bool, record: dict[str, Any], output: Path) -> None:
    described = adapter.name if model_file(adapter.name, "modules.json") else base
    if (other := why_not_last_token(described)) is not None:
        raise UserError(f"{described}: {other}; only an adapter of a model that is pooled at the last token is merged")
    model = load_base(adapter, base, same=not any_base)
    attach_adapter(model, adapter, trainable=False)
    merge_into_base(model)
    arguments = model_file(adapter.name, _ARGUMENTS, adapter.revision)
    widths = trained_widths(read_json(arguments) if arguments else {}, model.config.hidden_size)
    if widths is not None:
        model.config.is_matryoshka = len(widths) > 1
        model.config.matryoshka_dimensions = widths if len(widths) > 1 else None
    merged = build_sentence_transformer(model, load_tokenizer(described), prompts_of(described) or {})
    try:
        with new_folder(output) as partial:
            merged.save_pretrained(str(partial), create_model_card=False)
            write_whole(partial / MERGED_ADAPTER, json.dumps(record, indent=2) + "\n")
            # With them it can be packed as a state of the adapter's run.
            if arguments is not None:
                shutil.copyfile(arguments, partial / _ARGUMENTS)
    # safetensors reports a full disk with its own exception.
    except Exception as error:
        raise StoppedError(f"{output}: the merged model could not be written ({in_one_line(error)})") from error


def trained_widths(arguments: Mapping[str, Any], width: int) -> list[int] | None:
    """Return the embedding widths that a stage was trained at, the full one first; None if its arguments do not say."""
    if not arguments.get("matryoshka"):
        return [width] if "matryoshka" in arguments else None
    given = arguments["matryoshka_dimensions"]
    return matryoshka_dims(width, arguments["matryoshka_min_dim"]) if given is None else sorted({*given, width})[::-1]


def merge_named(
    models: list[str],
    output: Path,
    weights: list[float] | None = None,
    slerp: float | None = None,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    base: str | None = None,
    accept_other_base: bool = False,
) -> str:
    """Average the named models, or merge the one named adapter into its base; return a line about the result."""
    adapter = _named_adapter(models[0]) if len(models) == 1 else None
    if adapter is None and (base is not None or accept_other_base):
        raise UserError(f"--base, --accept-other-base: {models[0]} is no adapter (it lacks adapter_config.json)")
    if adapter is not None:
        averaging = {"--weights": weights, "--slerp": slerp, "--dtype": dtype, "--max-shard-size": max_shard_size}
        if given := [option for option, value in averaging.items() if value is not None]:
            raise UserError(f"{given[0]}: {models[0]} is an adapter, which is merged in fp32; leave the option out")
        merge_adapter(adapter, output, base, accept_other_base)
        return f"{output} ({MERGED_ADAPTER} records adapter and base)"
    method = mean_of(len(models), weights) if slerp is None else slerp_of(len(models), slerp)
    parents = [find_parent(word) for word in models]
    written = None if dtype is None else getattr(torch, dtype)
    record = merge(parents, method, output, written, max_shard_size or MAX_SHARD_SIZE)
    counted = ", ".join(f"{each['weight']:.4g} {each['name']}" for each in record["parents"])
    return f"{output}: {record['method']} of {counted}, in {record['dtype']}"


def _named_adapter(word: str) -> AdapterFolder | None:
    if Path(word).is_dir():
        # A folder without a model is reported with the other faulty models.
        return find_adapter(word) or find_adapter(str(Path(word, FINAL_MODEL)))
    name, _, revision = word.partition("@")
    return find_adapter(name, revision or None)
