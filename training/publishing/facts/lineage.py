"""How a model came about, stage by stage: what each one did, on what, and by which settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hub_cards.markdown import Markdown, code, link, setting
from training.publishing.facts.references import reference_text
from training.publishing.record import ModelRelease, SourceRecord, StageRecord

_KINDS = {
    **{"training": "training", "pruning": "pruning", "merging": "merging", "quantization": "quantization"},
    "unknown": "not recorded",
    **{"adapter": "training of an adapter", "merged_adapter": "training of an adapter, merged"},
}
_OF_ADAPTERS = ("adapter", "merged_adapter")


def lineage_facts(release: ModelRelease, links: Mapping[str, str]) -> dict[str, Any]:
    """Rows and sentences of the part of the card that tells how the model was made.

    Args:
        release: The model.
        links: Repositories on the Hub by the names of stages and models.
    """
    stages = release.stages
    return {
        "stages": [{"name": stage.name, "sentences": _sentences(stage, links)} for stage in stages],
        "stage_rows": [_row(stage, links) for stage in stages],
        "settings": _settings(stages, written_only=True),
        "all_settings": _settings(stages, written_only=False),
        "setting_stages": [code(stage.name) for stage in stages if stage.arguments],
        "sources": _sources(stages),
        "source_stages": [code(stage.name) for stage in stages if stage.sources],
        "instructions": [
            [code(name), instruction] for name, instruction in _instructions(stages).items() if instruction is not None
        ],
    }


def _row(stage: StageRecord, links: Mapping[str, str]) -> list[Any]:
    losses = [stage.metrics.get(name) for name in ("train_loss", "eval_loss")]
    return [
        code(stage.name),
        _KINDS.get(stage.kind, stage.kind),
        _start(stage, links),
        stage.teacher and reference_text(stage.teacher, links),
        stage.parameters,
        _rows(stage),
        stage.steps,
        None if stage.epochs is None else f"{stage.epochs:.3g}",
        *(None if loss is None else f"{loss:.4g}" for loss in losses),
    ]


def _start(stage: StageRecord, links: Mapping[str, str]) -> Markdown:
    return Markdown(", ".join(reference_text(reference, links) for reference in stage.parents or (stage.start,)))


def _sentences(stage: StageRecord, links: Mapping[str, str]) -> list[Markdown]:
    told = {
        **dict.fromkeys(("training", *_OF_ADAPTERS), _training),
        "pruning": _pruning,
        "merging": _merging,
        "unknown": _unknown,
    }.get(stage.kind)
    sentences = told(stage, links) if told else [f"Made from {_start(stage, links)}."]
    return [Markdown(sentence) for sentence in sentences]


def _training(stage: StageRecord, links: Mapping[str, str]) -> list[str]:
    given = stage.arguments
    sentences = [*_begun(stage, links), *_extent(stage), *_changed(stage), *_losses(stage)]
    if "instructions" in given:
        carried = "the instruction of their source" if given["instructions"] else "no instruction"
        sentences.append(f"Queries carry {carried}.")
    if stage.teacher is not None:
        weight = f", weight {given['distillation_weight']:g}" if "distillation_weight" in given else ""
        sentences.append(
            f"Beside that it learns the embeddings of {reference_text(stage.teacher, links)}: the mean squared error, "
            f"before they are made of unit length{weight}."
        )
    return sentences


def _unknown(stage: StageRecord, links: Mapping[str, str]) -> list[str]:
    settings = "" if stage.arguments else ", by which settings"
    told = [
        f"The model came without its run: on what data it was trained{settings} and with which losses is not known."
    ]
    named = stage.start.kind != "unknown"
    return told + [f"The card that came with it names {_start(stage, links)} as what it was made from."] * named


def _begun(stage: StageRecord, links: Mapping[str, str]) -> list[str]:
    start, amount = _start(stage, links), _amount(stage)
    if stage.kind not in _OF_ADAPTERS:
        return [f"Trained from {start}{amount}."]
    sentences = [f"An adapter was trained from {start}{amount}; the weights of its base stayed as they were."]
    return sentences + ["Then it was merged into them."] * (stage.kind == "merged_adapter")


def _merging(stage: StageRecord, links: Mapping[str, str]) -> list[str]:
    given = stage.arguments
    named = "Spherical interpolation" if given["method"] == "slerp" else "Mean"
    shares = zip(given["models"], given["weights"], strict=True)
    return [f"{named} of the weights of {', '.join(f'{code(model)} ({share:.3g})' for model, share in shares)}."]


def _extent(stage: StageRecord) -> list[str]:
    given = stage.arguments
    told = [] if stage.steps is None else [_counted(stage.steps, "step")]
    told += [] if stage.epochs is None else [_counted(float(f"{stage.epochs:.3g}"), "epoch")]
    if "global_batch_size" in given:
        told.append(f"batches of {given['global_batch_size']:,} queries, each of one source")
    sentences = [f"{', '.join(told)}."] if told else []
    if "learning_rate" in given:
        schedule = f" ({code(given['lr_scheduler_type'])})" if "lr_scheduler_type" in given else ""
        sentences.append(f"The highest learning rate is {given['learning_rate']:g}{schedule}.")
    return sentences


def _changed(stage: StageRecord) -> list[str]:
    """What was changed while it was trained: the table of settings has the last values."""
    return [
        f"From step {note['step']} on, {code(key)} was {_given(after)} instead of {_given(before)}."
        for note in stage.changes
        for key, (before, after) in note["keys"].items()
    ]


def _given(value: Any) -> str:
    return "the default" if value is None else code(setting(value))


def _losses(stage: StageRecord) -> list[str]:
    given = stage.arguments
    sentences = []
    kinds = dict.fromkeys(source.task_type for source in stage.sources)
    counts = [f"{given[key]} for {kind}" for kind in kinds if (key := f"num_hard_negatives_{kind}") in given]
    if counts and "temperature" in given:
        in_batch = " and, for retrieval, with the passages of the batch" if "retrieval" in kinds else ""
        sentences.append(
            f"Queries are contrasted with hard negatives ({', '.join(counts)}){in_batch}, at temperature "
            f"{given['temperature']:g}."
        )
    if given.get("matryoshka"):
        sentences.append("These losses are computed at every width and weighted (matryoshka).")
    return sentences


def _pruning(stage: StageRecord, links: Mapping[str, str]) -> list[str]:
    given = stage.arguments
    sentences = [f"Cut from {_start(stage, links)}{'' if not stage.sources else ', measured' + _amount(stage)}."]
    if given.get("prune_to"):
        target = ", ".join(f"{code(key)} {code(setting(value))}" for key, value in given["prune_to"].items())
        sentences.append(f"What it is cut to: {target}.")
    kept = {"prune_hidden": "hidden channels", "prune_layers": "layers"}
    chosen = [f"{what} by {code(setting(given[key]))}" for key, what in kept.items() if key in given]
    if chosen:
        sentences.append(f"It keeps {' and '.join(chosen)}.")
    if given.get("trim_vocabulary"):
        sentences.append("Tokens that the sources do not use are dropped.")
    return sentences


def _amount(stage: StageRecord) -> str:
    if not stage.sources:
        return ""
    rows, languages = _rows(stage), _languages(stage.sources)
    counted = f"{_counted(rows, 'row')} of " if rows else ""
    spoken = f" in {_counted(languages, 'language')}" if languages else ""
    return f" on {counted}{_counted(len(stage.sources), 'source')}{spoken}"


def _rows(stage: StageRecord) -> int | None:
    """Rows of all sources; None where those of one are not known."""
    rows = [source.rows for source in stage.sources]
    return None if not rows or None in rows else sum(rows)


def _counted(number: float, noun: str) -> str:
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"


def _languages(sources: tuple[SourceRecord, ...]) -> int:
    return len({code for source in sources for code in source.languages} - {"mul", "zxx"})


def _settings(stages: tuple[StageRecord, ...], written_only: bool) -> list[list[Any]]:
    """A row a key, a column a stage: the value in effect, a dash where the stage does not know the key."""
    told = [stage for stage in stages if stage.arguments]
    given = [{**stage.written, **stage.arguments} for stage in told]
    keys = [key for stage in told for key in (stage.written if written_only else {**stage.arguments, **stage.written})]
    return [
        [code(key), *(code(setting(each[key])) if key in each else None for each in given)]
        for key in dict.fromkeys(keys)
    ]


def _all_sources(stages: tuple[StageRecord, ...]) -> list[SourceRecord]:
    return [source for stage in stages for source in stage.sources]


def _instructions(stages: tuple[StageRecord, ...]) -> dict[str, str | None]:
    return {source.name: source.instruction for source in _all_sources(stages)}


def _sources(stages: tuple[StageRecord, ...]) -> list[list[Any]]:
    """A row a source: what it is, then the rows that each stage with sources read of it."""
    told = [stage for stage in stages if stage.sources]
    rows = [{source.name: source for source in stage.sources} for stage in told]
    by_name = {source.name: source for source in reversed(_all_sources(stages))}
    ordered = dict.fromkeys(source.name for source in _all_sources(stages))
    return [
        [*_source(by_name[name]), *(of_stage[name].rows if name in of_stage else None for of_stage in rows)]
        for name in ordered
    ]


def _source(source: SourceRecord) -> list[Any]:
    languages = sorted(source.languages)
    spoken = ", ".join(languages) if len(languages) < 5 else str(len(languages))
    name = code(source.name)
    if source.dataset:
        name = Markdown(f"{name} of {link(source.dataset, 'datasets/')}")
    return [name, source.task_type, spoken or None, source.licence]
