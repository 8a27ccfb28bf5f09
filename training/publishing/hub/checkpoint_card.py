"""Cards of intermediate checkpoints: one for each, and the list of all on the main branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hub_cards.hub_terms import hub_languages
from hub_cards.markdown import code
from hub_cards.metadata import header
from hub_cards.render import render_checkpoint_card, render_checkpoints_card
from training.publishing.card_lineage import LIBRARY, PIPELINE, reference_text, shared_tags
from training.publishing.record import Reference


@dataclass(frozen=True)
class CheckpointFacts:
    """What a checkpoint's card says."""

    repository: str  # name on the Hub
    revision: str  # stage1-step-005000
    stage: str
    step: int
    max_steps: int
    epoch: float
    metrics: Mapping[str, float]  # of its last log and evaluation: train_loss, eval_loss, eval_source/NAME
    dimensions: tuple[int, ...]  # trained widths of embeddings, the full one first
    parameters: int
    prompts: Mapping[str, str]
    start: Reference | None  # what the stage started from, if it is known
    teacher: Reference | None
    languages: tuple[str, ...]  # ISO 639-3 codes of the training data
    finished: bool  # whether the repository holds the finished model


def checkpoint_card(facts: CheckpointFacts) -> str:
    """Return the card of a checkpoint."""
    start, teacher = (each and reference_text(each, {}) for each in (facts.start, facts.teacher))
    base = facts.start.name if facts.start and facts.start.kind == "hub" else None
    relation = {"base_model": base, "base_model_relation": "finetune" if base else None}
    # Metrics of all data come before those of one source.
    metrics = sorted(facts.metrics.items(), key=lambda item: ("/" in item[0], item[0]))
    content = render_checkpoint_card(
        {
            "metadata": _metadata(facts.languages, len(facts.dimensions) > 1, **relation),
            "facts": facts,
            "start": start,
            "teacher": teacher,
            "metrics": [[code(name), f"{value:.4g}"] for name, value in metrics],
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
    known = {"language": known or None, "library_name": LIBRARY, "pipeline_tag": PIPELINE, "tags": tags, **fields}
    return header(ModelCardData(**known))
