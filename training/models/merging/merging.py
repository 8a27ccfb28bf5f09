"""Merges models into a complete folder, which is whole or absent."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.common.errors import UserError
from training.common.outputs import check_output, locked, new_folder
from training.models.merging.compatibility import check_compatible
from training.models.merging.method import Method
from training.models.merging.parents import Parent
from training.models.merging.record import MERGE, MERGED_FROM
from training.models.merging.streaming import MAX_SHARD_SIZE, common_dtype, write_average

logger = logging.getLogger("training")

# What is taken from the first parent as it is; besides, the folders of its modules. Not what tells of its training.
_TAKEN = (
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "*.py", "LICENSE*"),
)


def merge(
    parents: Sequence[Parent],
    method: Method,
    output: Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> dict[str, Any]:
    """Averages models, and writes a folder like theirs.

    The folder has the files of the first parent. Parents and weights stand in its ``config.json``, under
    ``merged_from``, and with their digests in ``merge.json``. If it is there already, nothing is done.

    Args:
        parents: The models.
        method: How they are averaged.
        output: Folder to be written.
        dtype: Of the weights written; that of the parents if None.
        max_shard_size: Of a file of weights at most, such as ``5GB``.

    Returns:
        The content of ``merge.json``.

    Raises:
        UserError: If the models cannot be merged, or ``output`` is one of theirs or holds something else.
        OSError: If it cannot be written.
    """
    check_output(output, [parent.folder for parent in parents])
    check_compatible(parents)
    dtype = dtype or common_dtype(parents)
    told = [{**parent.record(), "weight": share} for parent, share in zip(parents, method.shares, strict=True)]
    record = {
        "method": method.name,
        "dtype": str(dtype).removeprefix("torch."),
        "max_shard_size": max_shard_size,
        "parents": [{**each, "digest": parent.weights.digest()} for each, parent in zip(told, parents, strict=True)],
    }
    with locked(output):
        if _holds(output, record):
            logger.info("%s: is there already, nothing to do", output)
            return record
        with new_folder(output) as partial:
            _take_files(parents[0], partial)
            _write_json(partial / "config.json", _config(parents[0], record["dtype"], method, told))
            write_average(parents, method, dtype, partial, max_shard_size)
            _write_json(partial / MERGE, record)
    return record


def _holds(output: Path, record: dict[str, Any]) -> bool:
    """Whether a folder holds what would be written to it."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        there = json.loads((output / MERGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    if there != record:
        raise UserError(f"{output}: is there and holds something else; name another --output, or remove it")
    return True


def _take_files(parent: Parent, folder: Path) -> None:
    for pattern in _TAKEN:
        for path in parent.folder.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    for module in parent.read_json("modules.json"):
        # A module without settings may have no folder: a repository keeps no empty ones.
        if module["path"] and (parent.folder / module["path"]).is_dir():
            shutil.copytree(parent.folder / module["path"], folder / module["path"])


def _config(parent: Parent, dtype: str, method: Method, told: list[dict[str, Any]]) -> dict[str, Any]:
    # Older versions of the library call the key torch_dtype.
    kept = {key: value for key, value in parent.config.items() if key != "torch_dtype"}
    return {**kept, "dtype": dtype, MERGED_FROM: {"method": method.name, "parents": told}}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
