"""What an adapter is, and what it was trained on, as sentences and rows of its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub_cards.markdown import Markdown, code, link
from training.publishing.facts.references import reference_text
from training.publishing.record import AdapterRecord, ModelRelease

_UNITS = ("bytes", "kB", "MB", "GB")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def adapter_facts(release: ModelRelease, links: Mapping[str, str]) -> dict[str, Any] | None:
    """Of the adapter that a release is or has merged into it; None for other models.

    Args:
        release: The model.
        links: Repositories on the Hub by the names of stages and models.
    """
    adapter = release.adapter
    if adapter is None:
        return None
    return {
        "kind": "DoRA" if adapter.dora else "LoRA",
        "base": reference_text(adapter.base, links),
        "base_link": link(adapter.base.name) if adapter.base.kind == "hub" else reference_text(adapter.base, links),
        "base_name": adapter.base.name,
        "base_code": adapter.base_code,
        "size": _size(release.parameters * _BYTES[release.dtype]),
        "shape": _shape(adapter),
        "merged": adapter.merged,
        "match": adapter.match,
    }


def _shape(adapter: AdapterRecord) -> Markdown | None:
    """Rank, scale and layers in a sentence; None if they are no longer at hand."""
    if adapter.rank is None or adapter.alpha is None:
        return None
    root = " (over the square root of the rank)" if adapter.rslora else ""
    targets = ", ".join(map(code, adapter.targets))
    return Markdown(f"rank {adapter.rank}, alpha {adapter.alpha:g}{root}, on {targets}")


def _size(count: int) -> str:
    power = max(power for power in range(len(_UNITS)) if power == 0 or count >= 1000**power)
    return f"{count / 1000**power:.3g} {_UNITS[power]}"
