"""Where a model comes from, for its card: the header, references to other models, stages, settings and sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hub_cards.hub_terms import SPECIAL_LANGUAGES, hub_languages, licence_metadata
from hub_cards.markdown import Markdown, code, link, one_line, setting
from hub_cards.metadata import header
from training.evaluation.records import Evaluation, by_task, model_scores, task_mean
from training.publishing.record import ModelRelease, Reference, SourceRecord, StageRecord

LIBRARY, PIPELINE = "sentence-transformers", "sentence-similarity"
# The name on the card by the kind of a stage.
_KINDS = {
    "unknown": "not recorded",
    "adapter": "training of an adapter",
    "merged_adapter": "training of an adapter, merged",
}
_WITHOUT_NAME = {"scratch": "random weights", "unknown": "what is not recorded"}


def shared_tags(matryoshka: bool, languages: Sequence[str]) -> list[str]:
    """Return the tags of every model of this architecture."""
    tags = [LIBRARY, "transformers", "qwen3", "feature-extraction", PIPELINE, "text-embeddings-inference"]
    return tags + ["matryoshka"] * matryoshka + ["multilingual"] * (len(languages) > 1)


def model_metadata(release: ModelRelease, evaluation: Evaluation, label: str | None, *, datasets: Sequence[str]) -> str:
    """Return the YAML header of a model's card; ``label`` is its name among the scores, None if it has none."""
    languages = hub_languages(release.languages)
    tags = shared_tags(len(release.dimensions) > 1, languages)
    if release.is_adapter:
        # text-embeddings-inference loads no adapters.
        tags = [tag for tag in tags if tag != "text-embeddings-inference"] + ["peft", "lora"]
    bases = list(dict.fromkeys(each.name for each in origins(release) if each.kind == "hub"))
    is_merged = bool(release.stages) and release.stages[-1].kind == "merging"
    relation = "adapter" if release.is_adapter else "merge" if is_merged else "finetune"
    known = [source.dataset for stage in release.stages for source in stage.sources if source.dataset]
    metadata = ModelCardData(
        language=languages or None,
        **licence_metadata([release.licence]),
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        tags=tags,
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        base_model_relation=relation if bases else None,
        datasets=list(dict.fromkeys([*known, *datasets])) or None,
        # Only a card with results has an index of models.
        model_name=release.name if label else None,
        eval_results=list(_evaluation_results(evaluation, label)) if label else None,
    )
    return header(metadata)


def _evaluation_results(evaluation: Evaluation, label: str) -> Iterator[EvalResult]:
    """The float32 scores by width and task: means over the subsets of a task, in [0, 1]."""
    widths = sorted({score.dimension for score in evaluation.select(model=label, precision="float32")}, reverse=True)
    for width in widths:
        view = "" if width == widths[0] else f", first {width} dimensions"
        for scores in by_task(model_scores(evaluation, label, width)).values():
            first = scores[0]
            yield EvalResult(
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


def reference_text(reference: Reference, links: Mapping[str, str]) -> Markdown:
    """Return a model's name as text of a card; ``links`` are Hub repositories by the names of stages and models."""
    if reference.kind in _WITHOUT_NAME:
        return Markdown(_WITHOUT_NAME[reference.kind])
    if reference.kind == "hub" or reference.name in links:
        named = link(links.get(reference.name, reference.name))
        return Markdown(f"{named} at {code(reference.revision[:12])}") if reference.revision else named
    return code(reference.name)


def origins(release: ModelRelease) -> list[Reference]:
    """Return what the stages of a release started from: other models, or random weights; of an adapter, its base."""
    if release.adapter is not None and release.adapter.base.kind == "hub":
        return [release.adapter.base]
    found: dict[str, list[Reference]] = {}
    for stage in release.stages:
        # Stages come after those that they were made of.
        parents = stage.parents or (stage.start,)
        of_parents = [found.get(each.name, [each]) if each.kind == "stage" else [each] for each in parents]
        found[stage.name] = list(dict.fromkeys(each for own in of_parents for each in own if each.kind != "unknown"))
    return found[release.stages[-1].name] if release.stages else []


def base_links(release: ModelRelease) -> dict[str, str]:
    """Return the Hub name of an adapter's base by its name in the lineage."""
    if release.adapter is None or release.adapter.base.kind != "hub" or not release.stages:
        return {}
    # Training that continued an adapter has that adapter's base.
    continued = {stage.name: stage.start for stage in release.stages if stage.kind == "adapter"}
    start = release.stages[-1].start
    while start.kind == "stage" and start.name in continued:
        start = continued.pop(start.name)
    return {start.name: release.adapter.base.name} if start.kind in ("stage", "local") else {}


def lineage_facts(release: ModelRelease, links: Mapping[str, str]) -> dict[str, Any]:
    """Return the tables and sentences of the card's section on training."""
    stages = [_stage(stage, links) for stage in release.stages]
    with_settings = [stage for stage in release.stages if stage.arguments]
    with_sources = [stage for stage in release.stages if stage.sources]
    instructions = {source.name: source.instruction for stage in with_sources for source in stage.sources}
    return {
        "stages": stages,
        "stage_rows": [_row(facts) for facts in stages],
        "settings": _settings(with_settings, [key for stage in with_settings for key in stage.given]),
        "all_settings": _settings(with_settings, [key for stage in with_settings for key in stage.arguments]),
        "setting_stages": [code(stage.name) for stage in with_settings],
        "sources": _sources(with_sources),
        "source_stages": [code(stage.name) for stage in with_sources],
        "instructions": [[code(name), text] for name, text in instructions.items() if text is not None],
    }


def _stage(stage: StageRecord, links: Mapping[str, str]) -> dict[str, Any]:
    rows = [source.rows for source in stage.sources]
    task_types = dict.fromkeys(source.task_type for source in stage.sources)
    keys = {each: f"num_hard_negatives_{each}" for each in task_types}
    languages = {each for source in stage.sources for each in source.languages} - SPECIAL_LANGUAGES.keys()
    return {
        **vars(stage),
        "start": Markdown(", ".join(reference_text(each, links) for each in stage.parents or (stage.start,))),
        "known_start": stage.start.kind != "unknown",
        "teacher": stage.teacher and reference_text(stage.teacher, links),
        "sources": len(stage.sources),
        # None if those of one source are unknown.
        "rows": None if not rows or None in rows else sum(rows),
        "languages": len(languages),
        "epochs": None if stage.epochs is None else float(f"{stage.epochs:.3g}"),
        "negatives": [f"{stage.arguments[key]} for {each}" for each, key in keys.items() if key in stage.arguments],
        "retrieves": "retrieval" in task_types,
        "compares": "similarity" in task_types,
    }


def _row(stage: Mapping[str, Any]) -> list[Any]:
    losses = [stage["metrics"].get(name) for name in ("train_loss", "eval_loss")]
    return [
        *(code(stage["name"]), _KINDS.get(stage["kind"], stage["kind"]), stage["start"], stage["teacher"]),
        *(stage["parameters"], stage["rows"], stage["steps"]),
        None if stage["epochs"] is None else f"{stage['epochs']:g}",
        *(None if loss is None else f"{loss:.4g}" for loss in losses),
    ]


def _settings(stages: Sequence[StageRecord], keys: Iterable[str]) -> list[list[Any]]:
    return [
        [code(key), *(code(setting(stage.arguments[key])) if key in stage.arguments else None for stage in stages)]
        for key in dict.fromkeys(keys)
    ]


def _sources(stages: Sequence[StageRecord]) -> list[list[Any]]:
    """A row per source: what it is, as the first stage that read it says, then the rows that each stage read of it."""
    first: dict[str, SourceRecord] = {}
    for source in (source for stage in stages for source in stage.sources):
        first.setdefault(source.name, source)
    read = [{source.name: source.rows for source in stage.sources} for stage in stages]
    table = []
    for name, source in first.items():
        languages = source.languages
        shown = ", ".join(sorted(languages)) if len(languages) < 5 else str(len(languages))
        named = Markdown(f"{code(name)} of {link(source.dataset, 'datasets/')}") if source.dataset else code(name)
        table.append([named, source.task_type, shown or None, source.licence, *(rows.get(name) for rows in read)])
    return table
