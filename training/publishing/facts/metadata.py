"""The YAML that heads a model's card: what the Hub filters and lists models by."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCardData

from hub_cards.hub_terms import hub_languages, licence_metadata
from hub_cards.markdown import one_line
from hub_cards.metadata import header
from training.evaluation.records import Evaluation, Score
from training.evaluation.selection import by_task, model_scores, task_mean
from training.publishing.facts.references import base_models, base_relation
from training.publishing.record import ModelRelease

LIBRARY, PIPELINE = "sentence-transformers", "sentence-similarity"


def shared_tags(matryoshka: bool, languages: Sequence[str]) -> list[str]:
    """Tags of every model of these shapes.

    Args:
        matryoshka: Whether its embeddings may be cut.
        languages: The Hub's codes of its languages.
    """
    tags = [LIBRARY, "transformers", "qwen3", "feature-extraction", PIPELINE, "text-embeddings-inference"]
    return tags + ["matryoshka"] * matryoshka + ["multilingual"] * (len(languages) > 1)


def _tags(release: ModelRelease, languages: Sequence[str]) -> list[str]:
    tags = shared_tags(len(release.dimensions) > 1, languages)
    if not release.is_adapter:
        return tags
    # A server of that kind loads no adapter.
    return [tag for tag in tags if tag != "text-embeddings-inference"] + ["peft", "lora"]


def model_metadata(release: ModelRelease, evaluation: Evaluation, label: str | None, *, datasets: Sequence[str]) -> str:
    """The header of a model's card.

    Args:
        release: The model.
        evaluation: Its scores.
        label: Its label among them; None if it has none.
        datasets: Further data sets on the Hub that it was trained on.
    """
    languages = hub_languages(release.languages)
    bases = base_models(release)
    known = [source.dataset for stage in release.stages for source in stage.sources if source.dataset]
    metadata = ModelCardData(
        language=languages or None,
        **licence_metadata([release.licence]),
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=_tags(release, languages),
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        base_model_relation=base_relation(release) if bases else None,
        datasets=list(dict.fromkeys([*known, *datasets])) or None,
        # The name of the model's index, which there is with results alone.
        model_name=release.name if label else None,
        eval_results=evaluation_results(evaluation, label) if label else None,
    )
    return header(metadata)


def evaluation_results(evaluation: Evaluation, label: str) -> list[EvalResult]:
    """The float32 scores of a model by width and task, each the mean over the task's subsets, in [0, 1]."""
    widths = sorted({score.dimension for score in evaluation.select(model=label, precision="float32")}, reverse=True)
    return [
        _result(scores, "" if width == widths[0] else f", first {width} dimensions")
        for width in widths
        for scores in by_task(model_scores(evaluation, label, width)).values()
    ]


def _result(scores: Sequence[Score], view: str) -> EvalResult:
    first = scores[0]
    return EvalResult(
        task_type=first.task_type.lower() or "unknown",
        task_name=first.task_type,
        dataset_type="-".join(one_line(first.task).split()) or "unknown",
        dataset_name=first.task,
        dataset_config=first.subset if len(scores) == 1 else None,
        dataset_split=first.split,
        dataset_revision=first.data or None,
        metric_type=first.metric,
        metric_name=f"{first.metric}{view}",
        metric_value=round(task_mean(scores), 6),
    )
