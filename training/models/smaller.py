"""Write a part of a model that is a model of its own: its first layers, its token embeddings at a lower rank."""

from __future__ import annotations

import logging
import shutil
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor

from modeling_f2llm.configuration_f2llm import F2LLMConfig, keep_layers
from training.common.errors import UserError
from training.common.outputs import check_output
from training.models.export import RECORD, write_settings
from training.models.model_folder import (
    EMBEDDINGS,
    FACTORS,
    WeightFiles,
    load_json,
    recorded_folder,
    write_json,
)

logger = logging.getLogger("training")

# What a card says of the larger model that holds for the smaller one, too.
_KEPT = ("language", "license", "license_name", "license_link", "datasets")
_FIELDS = ("num_hidden_layers", "layer_types", "max_window_layers", "exit_layers", "embedding_ranks")
# Stock libraries, which know no factors, would make random embeddings of a "qwen3".
_FACTORISED = {"model_type": "f2llm"}
_CARD = """
# {name}

A part of {model}: {what}. It has {parameters:,} parameters, and embeddings of {width} dimensions{cut}. {trained}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name!r}{trust})
query = model.encode_query("Where do giant pandas live?")
passages = model.encode_document(["Giant pandas live in Sichuan.", "The Eiffel Tower stands in Paris."])
print(model.similarity(query, passages))
```
"""


def export_smaller(folder: Path, output: Path, layers: int | None = None, rank: int | None = None) -> None:
    """Write the first layers of a model, or its token embeddings at a lower rank, as a SentenceTransformer folder.

    Without ``rank`` it is stock Qwen3; with it, the folder brings the code that multiplies the two factors. It is
    written whole or not at all; nothing is done if it is there already.
    """
    check_output(output, [folder])
    weights = WeightFiles(folder)
    with recorded_folder(output, RECORD, {"layers": layers, "rank": rank, "weights": weights.digest()}) as partial:
        if partial is None:
            return
        write_settings(folder, weights, partial)
        config = F2LLMConfig.from_pretrained(folder)
        depth, exits = config.num_hidden_layers, config.exit_layers or [config.num_hidden_layers]
        layers = depth if layers is None else layers
        known = f"it was trained to end after {', '.join(map(str, exits))}"
        if not 1 <= layers <= depth:
            raise UserError(f"--layers {layers}: {folder} has {depth} layers; {known}")
        if layers not in exits:
            logger.warning("--layers %d: expect poor embeddings of %s; %s", layers, folder, known)
        keep_layers(config, layers)
        tensors = {name: weights.read(name) for name in weights.tensors if _layer_of(name) < layers}
        more: dict[str, Any] = {}
        if rank is not None:
            more = {**_FACTORISED, "auto_map": load_json(folder / "config.json").get("auto_map")}
            _take_rank(tensors, weights, config, rank, folder)
            for path in folder.glob("*.py"):
                shutil.copyfile(path, partial / path.name)
        else:
            config.embedding_ranks = None
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        # A field that is not there stays away.
        own = {name: value for name, value in config.to_dict().items() if name in _FIELDS}
        written = {name: value for name, value in load_json(partial / "config.json").items() if name not in _FIELDS}
        write_json(partial / "config.json", {**written, **own, **more})
        facts = {
            **{"name": output.name, "model": folder.name, "width": config.hidden_size},
            "what": f"the first {layers} of {depth} layers" + (f", token embeddings of rank {rank}" if rank else ""),
            "parameters": sum(prod(tensor.shape) for tensor in tensors.values()),
            "trained": f"Training {'ended after these layers, too' if layers in exits else 'did not end there'}.",
            "trust": ", trust_remote_code=True" if rank else "",
        }
        _write_card(folder / "README.md", partial / "README.md", config, facts)


def _layer_of(name: str) -> int:
    parts = name.removeprefix("model.").split(".")
    return int(parts[1]) if parts[0] == "layers" else -1


def _take_rank(tensors: dict[str, Tensor], weights: WeightFiles, config: F2LLMConfig, rank: int, folder: Path) -> None:
    """Put the leading columns of the factors of the token embeddings in the place of their product."""
    ranks = config.embedding_ranks or []
    if rank not in ranks:
        trained = f"it was trained at {', '.join(map(str, ranks))}" if ranks else "train with 'embedding_ranks' first"
        raise UserError(f"--rank {rank}: the token embeddings of {folder} have no factors of this rank; {trained}")
    del tensors[EMBEDDINGS]
    for name in FACTORS:
        tensors[name] = weights.read(name)[:, :rank].contiguous()
    config.embedding_ranks = [each for each in ranks if each <= rank]


def _write_card(source: Path, target: Path, config: F2LLMConfig, facts: dict[str, Any]) -> None:
    """Write a card that has nothing of the larger model's but what holds for the smaller one."""
    given = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict() if source.is_file() else {}
    tags = ["sentence-transformers", "feature-extraction", "qwen3"]
    header = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "tags": tags}
    data = ModelCardData(**header, **{name: given[name] for name in _KEPT if name in given})
    narrower = config.matryoshka_dimensions[1:] if config.matryoshka_dimensions else ()
    cut = f" that may be cut to {', '.join(map(str, narrower))}" if narrower else ""
    target.write_text(f"---\n{data.to_yaml()}\n---\n{_CARD.format(**facts, cut=cut)}", encoding="utf-8")
