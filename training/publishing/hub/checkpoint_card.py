"""The card of an intermediate checkpoint: which step of what it is, how to load it, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from huggingface_hub import ModelCard, ModelCardData

from hub_cards.hub_terms import hub_languages, licence_metadata
from hub_cards.markdown import code
from hub_cards.metadata import header
from hub_cards.render import render_checkpoint_card
from training.publishing.facts.metadata import LIBRARY, PIPELINE, shared_tags
from training.publishing.facts.references import reference_text
from training.publishing.record import Reference


@dataclass(frozen=True)
class CheckpointFacts:
    """What is known of a checkpoint.

    Attributes:
        repository: Name on the Hub, or a folder, that the example loads.
        revision: Of the checkpoint: ``stage1-step-005000``.
        name: Of the model that was trained.
        stage: Name of its stage.
        step: Optimizer steps done.
        dimension: Full width of an embedding.
        dimensions: Widths that are trained, the full one first.
        max_steps: Steps of the whole stage; None if unknown.
        epoch: Epochs done; None if unknown.
        metrics: Of its last log and evaluation by name, ``loss``, ``eval_loss``, ``eval_source/NAME``.
        parameters: Number of parameters; None if unknown.
        prompts: By name.
        start: What the stage started from; None if unknown.
        teacher: What it learns from; None without distillation.
        licence: SPDX identifier; None if none is stated.
        languages: ISO 639-3 codes of the training data.
        final: Name on the Hub of the finished model; None if it is not known.
    """

    repository: str
    revision: str
    name: str
    stage: str
    step: int
    dimension: int
    dimensions: tuple[int, ...]
    max_steps: int | None = None
    epoch: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    start: Reference | None = None
    teacher: Reference | None = None
    licence: str | None = None
    languages: tuple[str, ...] = ()
    final: str | None = None


def checkpoint_card(facts: CheckpointFacts) -> str:
    """The card of a checkpoint; what is not known is not on it."""
    start, teacher = (None if each is None else reference_text(each, {}) for each in (facts.start, facts.teacher))
    content = render_checkpoint_card(
        {
            "metadata": _metadata(facts),
            "facts": facts,
            "start": start,
            "teacher": teacher,
            "metrics": [[code(name), f"{value:.4g}"] for name, value in sorted(facts.metrics.items(), key=_by_kind)],
            "has_prompt": bool(facts.prompts.get("query")),
        }
    )
    # Fails on a header that the Hub could not read.
    return ModelCard(content).content


def _by_kind(item: tuple[str, float]) -> tuple[bool, str]:
    """Those of all data come before those of one source."""
    return "/" in item[0], item[0]


def _metadata(facts: CheckpointFacts) -> str:
    languages = hub_languages(facts.languages)
    base = facts.start.name if facts.start and facts.start.kind == "hub" else None
    return header(
        ModelCardData(
            language=languages or None,
            **(licence_metadata([facts.licence]) if facts.licence else {}),
            library_name=LIBRARY,
            pipeline_tag=PIPELINE,
            tags=[*shared_tags(len(facts.dimensions) > 1, languages), "intermediate-checkpoint"],
            base_model=base,
            base_model_relation="finetune" if base else None,
        )
    )
