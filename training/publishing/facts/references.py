"""How a card names another model, and what a release is based on."""

from __future__ import annotations

from collections.abc import Mapping

from hub_cards.markdown import Markdown, code, link
from training.publishing.record import ModelRelease, Reference, StageRecord

_WITHOUT_NAME = {"scratch": "random weights", "unknown": "what is not recorded"}
# The Hub's relation to the base model, by the kind of the last stage.
_RELATIONS = {"training": "finetune", "pruning": "finetune", "merging": "merge", "quantization": "quantized"}


def reference_text(reference: Reference, links: Mapping[str, str]) -> Markdown:
    """A model in a sentence or a table.

    Args:
        reference: The model.
        links: Repositories on the Hub by the names of stages and models.
    """
    if reference.kind in _WITHOUT_NAME:
        return Markdown(_WITHOUT_NAME[reference.kind])
    if reference.kind == "hub" or reference.name in links:
        named = link(links.get(reference.name, reference.name))
        return Markdown(f"{named} at {code(reference.revision[:12])}") if reference.revision else named
    return code(reference.name)


def origins(release: ModelRelease) -> list[Reference]:
    """What the release descends from, through its stages: models that are none of them, or random weights.

    An adapter descends from its base.
    """
    if release.adapter is not None and release.adapter.base.kind == "hub":
        return [release.adapter.base]
    stages = {stage.name: stage for stage in release.stages}
    return list(dict.fromkeys(_origins(release.stages[-1], stages, frozenset()))) if release.stages else []


def _origins(stage: StageRecord, stages: Mapping[str, StageRecord], seen: frozenset[str]) -> list[Reference]:
    found = []
    for reference in stage.parents or (stage.start,):
        if reference.kind == "stage" and reference.name in stages.keys() - seen - {stage.name}:
            found += _origins(stages[reference.name], stages, seen | {stage.name})
        elif reference.kind != "unknown":
            found.append(reference)
    return found


def base_models(release: ModelRelease) -> list[str]:
    """Names of the models on the Hub that the release descends from."""
    return list(dict.fromkeys(each.name for each in origins(release) if each.kind == "hub"))


def base_relation(release: ModelRelease) -> str:
    """What the release is to the models that it is based on, as the Hub names it."""
    return "adapter" if release.is_adapter else _RELATIONS.get(release.stages[-1].kind, "finetune")


def base_links(release: ModelRelease) -> dict[str, str]:
    """The name on the Hub of an adapter's base, by what the lineage calls it."""
    if release.adapter is None or release.adapter.base.kind != "hub" or not release.stages:
        return {}
    stages = {stage.name: stage for stage in release.stages}
    start = release.stages[-1].start
    # Training that went on from an adapter has that adapter's base.
    for _ in release.stages:
        if start.kind != "stage" or start.name not in stages or stages[start.name].kind != "adapter":
            break
        start = stages[start.name].start
    return {start.name: release.adapter.base.name} if start.kind in ("stage", "local") else {}
