"""The published shapes, with the one that a release has marked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from hub_cards.markdown import Markdown, link, plain
from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.memory import count_parameters
from training.publishing.record import ModelRelease

__all__ = ["family_rows"]

_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def family_rows(release: ModelRelease, links: Mapping[str, str]) -> list[list[Any]]:
    """Model, width, layers, MLP, heads and parameters of each published shape, the smallest first.

    The release stands in bold in the place of its shape; if it has another, in a row of its own by its size.

    Args:
        release: The model.
        links: Repositories on the Hub by the names of models.
    """
    rows = []
    for name in FAMILY:
        if name != release.family:
            config = F2LLMConfig.from_family(name)
            shown = link(links[name]) if name in links else plain(name)
            rows.append((_published_parameters(name), shown, [getattr(config, key) for key in _SHAPE]))
    own = [release.shape.get(key) for key in _SHAPE]
    rows.append((release.parameters, Markdown(f"**{plain(release.name)}** (this model)"), own))
    rows.sort(key=lambda row: row[0])
    return [
        [name, width, layers, mlp, None if heads is None else f"{heads} / {kv}", count]
        for count, name, (width, layers, mlp, heads, kv) in rows
    ]


@cache
def _published_parameters(name: str) -> int:
    return count_parameters(F2LLMConfig.from_family(name))
