"""Writes what a model's folder says in the words that older readers know, too.

transformers 5 and sentence-transformers 5.4 moved and renamed settings. Both read the old form as well as the new one;
older versions of them, and servers that parse the files themselves, read the old form alone:

- ``config.json``: ``rope_theta`` moved into ``rope_parameters``. transformers 4 takes 10000 where it finds none, and so
  computes other embeddings without an error; text-embeddings-inference stopped until early in 2026; MLX stops.
- ``tokenizer_config.json``: ``additional_special_tokens`` became a list of ``extra_special_tokens``, which
  transformers 4 cannot read.
- ``modules.json``: the classes moved. Versions before 5.4 find no module, llama.cpp's converter no pooling.
- ``1_Pooling/config.json``: one ``pooling_mode`` took the place of a flag for each mode.
- ``sentence_bert_config.json``: ``max_seq_length`` and ``do_lower_case`` are no longer written;
  text-embeddings-inference and vLLM read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.common.run_folder import write_whole

_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_for_older_readers(folder: Path) -> None:
    """Rewrites the settings of a SentenceTransformer folder with last-token pooling; done twice, nothing changes.

    Args:
        folder: As ``SentenceTransformer.save_pretrained`` left it.

    Raises:
        OSError: If a file is missing or cannot be written.
        ValueError: If a file is damaged.
    """
    length = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
    # An adapter has none.
    if (folder / "config.json").is_file():
        _rewrite(folder / "config.json", _with_rope_theta)
    _rewrite(folder / "tokenizer_config.json", _with_additional_tokens)
    _rewrite(folder / "modules.json", _with_old_classes)
    _rewrite(folder / "1_Pooling/config.json", _with_flags)
    _rewrite(folder / "sentence_bert_config.json", lambda _: {"max_seq_length": length, "do_lower_case": False})


def _rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    content = change(json.loads(path.read_text(encoding="utf-8")))
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted({**config, "rope_theta": config["rope_parameters"]["rope_theta"]}.items()))


def _with_additional_tokens(config: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(config.get("extra_special_tokens"), list):
        return config
    old = {"extra_special_tokens": "additional_special_tokens"}
    return dict(sorted((old.get(name, name), value) for name, value in config.items()))


def _with_old_classes(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "type": f"sentence_transformers.models.{entry['type'].rpartition('.')[2]}"} for entry in modules]


def _with_flags(pooling: dict[str, Any]) -> dict[str, Any]:
    width = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension"))
    flags = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in _MODES}
    return {"word_embedding_dimension": width, **flags, "include_prompt": pooling["include_prompt"]}
