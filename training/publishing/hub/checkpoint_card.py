"""Cards of intermediate checkpoints: one for each, and the list of all on the main branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hub_cards.hub_terms import hub_languages, licence_metadata
from hub_cards.markdown import code
from hub_cards.metadata import header
from hub_cards.render import render_checkpoint_card, render_checkpoints_card
from training.publishing.card_lineage import LIBRARY, PIPELINE, reference_text, shared_tags
from training.publishing.record import Reference


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known of a checkpoint; None where it is not."""

    repository: str  # name on the Hub, or a folder, that the example loads
    revision: str  # stage1-step-005000
    name: str  # of the model that was trained
    stage: str
    step: int
    dimension: int  # full width of an embedding
    dimensions: tuple[int, ...]  # trained widths, the full one first
    max_steps: int | None = None
    epoch: float | None = None
    # Of its last log and evaluation: loss, eval_loss, eval_source/NAME.
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    start: Reference | None = None  # what the stage started from
    teacher: Reference | None = None
    licence: str | None = None  # SPDX identifier
    languages: tuple[str, ...] = ()  # ISO 639-3 codes of the training data
    final: str | None = None  # name on the Hub of the finished model


def checkpoint_card(facts: CheckpointFacts) -> str:
    """Return the card of a checkpoint; it leaves out what is not known."""
    start, teacher = (each and reference_text(each, {}) for each in (facts.start, facts.teacher))
    base = facts.start.name if facts.start and facts.start.kind == "hub" else None
    licence = licence_metadata([facts.licence]) if facts.licence else {}
    relation = "finetune" if base else None
    metadata = _metadata(
        facts.languages, len(facts.dimensions) > 1, base_model=base, base_model_relation=relation, **licence
    )
    # Metrics of all data come before those of one source.
    metrics = sorted(facts.metrics.items(), key=lambda item: ("/" in item[0], item[0]))
    content = render_checkpoint_card(
        {
            "metadata": metadata,
            "facts": facts,
            "start": start,
            "teacher": teacher,
            "metrics": [[code(name), f"{value:.4g}"] for name, value in metrics],
            "has_prompt": bool(facts.prompts.get("query")),
        }
    )
    # Raises on a header that the Hub could not read.
    return ModelCard(content).content


def checkpoints_card(repository: str, revisions: Mapping[str, Mapping[str, Any]], languages: Sequence[str]) -> str:
    """Return the card of the main branch: a table of all revisions, given by name in the order of the table."""
    rows = []
    for name, each in revisions.items():
        losses = [None if each.get(key) is None else f"{each[key]:.4g}" for key in ("train_loss", "eval_loss")]
        rows.append([name, each["stage"], each["step"], each["max_steps"], *losses])
    facts = {"metadata": _metadata(languages), "repository": repository, "rows": rows, "newest": rows[-1][0]}
    return ModelCard(render_checkpoints_card(facts)).content


def _metadata(languages: Sequence[str], matryoshka: bool = False, **fields: Any) -> str:
    known = hub_languages(languages)
    tags = [*shared_tags(matryoshka, known), "intermediate-checkpoint"]
    return header(
        ModelCardData(language=known or None, library_name=LIBRARY, pipeline_tag=PIPELINE, tags=tags, **fields)
    )
