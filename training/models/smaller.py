"""Write the first layers of a model as a model of its own, which needs none of the other weights."""

from __future__ import annotations

import logging
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from modeling_f2llm.configuration_f2llm import F2LLMConfig, keep_layers
from training.common.errors import UserError
from training.common.outputs import check_output
from training.models.export import RECORD, write_settings
from training.models.model_folder import WeightFiles, load_json, recorded_folder, write_json

logger = logging.getLogger("training")

# What a card says of the larger model that holds for the smaller one, too.
_KEPT = ("language", "license", "license_name", "license_link", "datasets")
_FIELDS = ("num_hidden_layers", "layer_types", "max_window_layers", "exit_layers")
_CARD = """
# {name}

The first {layers} of the {depth} layers of {model}, with its final norm: {parameters:,} parameters, embeddings of
{width} dimensions{cut}. {trained}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name!r})
query = model.encode_query("Where do giant pandas live?")
passages = model.encode_document(["Giant pandas live in Sichuan.", "The Eiffel Tower stands in Paris."])
print(model.similarity(query, passages))
```
"""


def export_smaller(folder: Path, output: Path, layers: int) -> None:
    """Write the first layers of a model as a SentenceTransformer folder of stock Qwen3, with a card.

    It is written whole or not at all; nothing is done if it is there already.
    """
    check_output(output, [folder])
    weights = WeightFiles(folder)
    with recorded_folder(output, RECORD, {"layers": layers, "weights": weights.digest()}) as partial:
        if partial is None:
            return
        write_settings(folder, weights, partial)
        config = F2LLMConfig.from_pretrained(partial)
        depth, exits = config.num_hidden_layers, config.exit_layers or [config.num_hidden_layers]
        known = f"it was trained to end after {', '.join(map(str, exits))}"
        if not 1 <= layers <= depth:
            raise UserError(f"--layers {layers}: {folder} has {depth} layers; {known}")
        if layers not in exits:
            logger.warning("--layers %d: expect poor embeddings of %s; %s", layers, folder, known)
        keep_layers(config, layers)
        kept = [name for name in weights.tensors if _layer_of(name) < layers]
        tensors = {name: weights.read(name) for name in kept}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        written = load_json(partial / "config.json")
        own = {name: value for name, value in config.to_dict().items() if name in written and name in _FIELDS}
        write_json(partial / "config.json", {**written, **own})
        facts = {
            **{"name": output.name, "model": folder.name, "layers": layers, "depth": depth},
            **{"width": config.hidden_size, "parameters": sum(prod(weights.shapes[name]) for name in kept)},
        }
        _write_card(folder / "README.md", partial / "README.md", config, layers in exits, facts)


def _layer_of(name: str) -> int:
    parts = name.removeprefix("model.").split(".")
    return int(parts[1]) if parts[0] == "layers" else -1


def _write_card(source: Path, target: Path, config: F2LLMConfig, is_exit: bool, facts: dict[str, Any]) -> None:
    """Write a card that has nothing of the larger model's but what holds for the smaller one."""
    given = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict() if source.is_file() else {}
    tags = ["sentence-transformers", "feature-extraction", "qwen3"]
    header = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "tags": tags}
    data = ModelCardData(**header, **{name: given[name] for name in _KEPT if name in given})
    narrower = config.matryoshka_dimensions[1:] if config.matryoshka_dimensions else ()
    cut = f" that may be cut to {', '.join(map(str, narrower))}" if narrower else ""
    trained = f"The larger model was {'' if is_exit else 'not '}trained to end here, too."
    card = _CARD.format(**facts, cut=cut, trained=trained)
    target.write_text(f"---\n{data.to_yaml()}\n---\n{card}", encoding="utf-8")
