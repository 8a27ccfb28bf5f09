"""The published shapes, with the one that a release has marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub_cards.markdown import Markdown, link, plain
from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.publishing.record import ModelRelease

_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def family_rows(
    release: ModelRelease, links: Mapping[str, str], members: Mapping[str, ModelRelease] | None = None
) -> list[list[Any]]:
    """Model, width, layers, MLP, heads and parameters of each published shape, the smallest first.

    The release stands in bold in the place of its shape, and each model released with it likewise, by its link; one of
    another shape in a row of its own by its size.

    Args:
        release: The model.
        links: Repositories on the Hub by the names of models.
        members: The models released with it, by their repositories on the Hub.
    """
    members = members or {}
    taken = {release.family, *(member.family for member in members.values())}
    rows = []
    for name in FAMILY:
        if name not in taken:
            config = F2LLMConfig.from_family(name)
            shown = link(links[name]) if name in links else plain(name)
            rows.append((parameters(config), shown, [getattr(config, key) for key in _SHAPE]))
    rows += [(member.parameters, link(repository), _shape(member)) for repository, member in members.items()]
    rows.append((release.parameters, Markdown(f"**{plain(release.name)}** (this model)"), _shape(release)))
    rows.sort(key=lambda row: row[0])
    return [
        [name, width, layers, mlp, None if heads is None else f"{heads} / {kv}", count]
        for count, name, (width, layers, mlp, heads, kv) in rows
    ]


def _shape(release: ModelRelease) -> list[Any]:
    return [release.shape.get(key) for key in _SHAPE]


def parameters(config: F2LLMConfig) -> int:
    """Parameters of a model of a published shape, embeddings included; counting those of a model takes far longer."""
    width, head = config.hidden_size, config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    # Queries and output, keys and values; their norms; the MLP; the two norms of a layer.
    layer = 2 * width * heads * head + 2 * head + 3 * width * config.intermediate_size + 2 * width
    return config.vocab_size * width + config.num_hidden_layers * layer + width
