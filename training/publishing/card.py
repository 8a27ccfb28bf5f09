"""The card of a packed model, rendered from ``release.json`` and ``evaluation/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hub_cards.hub_terms import SPECIAL_LANGUAGES
from hub_cards.markdown import Markdown, code, link, plain, shell_json, shell_word
from hub_cards.render import render_model_card
from modeling_f2llm.configuration_f2llm import FAMILY, F2LLMConfig
from training.common.languages import language_name
from training.evaluation.figures import dimension_points
from training.evaluation.pairs import TASK
from training.evaluation.records import (
    Evaluation,
    Score,
    bytes_per_vector,
    finished_models,
    load_evaluation,
    model_scores,
    shared_scores,
    task_mean,
)
from training.evaluation.significance import Interval, bootstrap_interval, examples_of
from training.evaluation.summary import SHARES, GroupScore, languages_of, resource_class, summarize
from training.models.model_folder import count_parameters
from training.publishing.card_lineage import base_links, lineage_facts, model_metadata, origins, reference_text
from training.publishing.evaluation import EVALUATION, RESULTS, drawn_figures, own_label
from training.publishing.record import ModelRelease, load_release

CARD = "README.md"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size")
_QUESTION = "Where do giant pandas live?"
# Classes of languages by their share of the training rows.
_CLASS_NAMES = {
    "high": f"{100 * SHARES['high']:g} % of the training rows or more",
    "middle": f"{100 * SHARES['middle']:g} % or more",
    "low": "fewer",
    "none": "none",
}


def model_card(
    folder: Path,
    repository: str | None = None,
    *,
    links: Mapping[str, str] | None = None,
    datasets: Sequence[str] = (),
    collection: str | None = None,
    members: Mapping[str, ModelRelease] | None = None,
) -> str:
    """Return the card of a packed folder, the same for the same folder.

    It shows the figures that were drawn before, and nothing that was not measured.

    Args:
        folder: The packed folder.
        repository: Name on the Hub, which the examples load; the release's own name if None.
        links: Repositories on the Hub by the names of stages and models.
        datasets: Data sets on the Hub besides those of the record.
        collection: The family's collection on the Hub.
        members: The other models of the family by their repositories on the Hub.
    """
    release = load_release(folder)
    evaluation = load_evaluation(folder / EVALUATION, missing_ok=True)
    label = own_label(evaluation, release.name)
    links = {**base_links(release), **(links or {})}
    last = release.stages[-1] if release.stages else None
    width = _truncated(release.dimensions)
    languages = sorted(set(release.languages) - SPECIAL_LANGUAGES.keys())
    content = render_model_card(
        {
            "metadata": model_metadata(release, evaluation, label, datasets=datasets),
            "release": release,
            "repository": repository or release.name,
            "known": all(stage.kind != "unknown" for stage in release.stages),
            "origins": [reference_text(each, links) for each in origins(release)],
            "adapter": _adapter_facts(release, links),
            "teacher": reference_text(last.teacher, links) if last and last.teacher else None,
            "collection": collection,
            "truncated": width,
            "prompt_names": {name: text for name, text in release.prompts.items() if text},
            "languages": [[each, language_name(each)] for each in languages],
            "servers": _server_facts(release, repository or release.name, width),
            "family": family_rows(release, links, members),
            "results": _results_facts(release, evaluation, label) if label else None,
            "truncation": _truncation_facts(evaluation, label, width) if label else None,
            "figures": drawn_figures(folder),
            "pairs_result": f"{EVALUATION}/{RESULTS}" if (folder / EVALUATION / RESULTS).is_file() else None,
            "lineage": lineage_facts(release, links),
            "limits": _limits_facts(release, evaluation, label),
        }
    )
    # Raises an error for a header that the Hub could not read.
    return ModelCard(content).content


def _truncated(dimensions: Sequence[int]) -> int | None:
    """The width of the examples: the largest of at most half of the full one; None if there is one width."""
    smaller = [dim for dim in dimensions if 2 * dim <= dimensions[0]] or list(dimensions[1:])
    return max(smaller, default=None)


def _adapter_facts(release: ModelRelease, links: Mapping[str, str]) -> dict[str, Any] | None:
    adapter = release.adapter
    if adapter is None:
        return None
    base = reference_text(adapter.base, links)
    shape = None
    if adapter.rank is not None and adapter.alpha is not None:
        root = " (over the square root of the rank)" if adapter.rslora else ""
        targets = ", ".join(map(code, adapter.targets))
        shape = Markdown(f"rank {adapter.rank}, alpha {adapter.alpha:g}{root}, on {targets}")
    return {
        "kind": "DoRA" if adapter.dora else "LoRA",
        "base": base,
        "base_link": link(adapter.base.name) if adapter.base.kind == "hub" else base,
        "base_name": adapter.base.name,
        "base_code": adapter.base_code,
        "size": f"{release.parameters * _BYTES[release.dtype] / 1e6:.3g} MB",
        "shape": shape,
        "merged": adapter.merged,
        "match": adapter.match,
    }


def _server_facts(release: ModelRelease, repository: str, width: int | None) -> dict[str, str]:
    """Words of the servers' commands, quoted; ``width`` are the dimensions asked for, None for all."""
    prompt = release.prompts.get("query", "")
    cut = {"dimensions": width} if width else {}
    # llama.cpp reads these two escapes itself.
    escaped = (prompt + _QUESTION).replace("\\", "\\\\").replace("\n", "\\n")
    return {
        "repository": shell_word(repository),
        "tei": shell_json({"inputs": _QUESTION, **({"prompt_name": "query"} if prompt else {}), **cut}),
        "vllm": shell_json({"model": repository, "input": prompt + _QUESTION, **cut}),
        "vllm_config": shell_json({"is_matryoshka": True, "matryoshka_dimensions": list(release.dimensions)}),
        "llama": shell_word(escaped),
    }


def family_rows(
    release: ModelRelease, links: Mapping[str, str], members: Mapping[str, ModelRelease] | None = None
) -> list[list[Any]]:
    """Return model, width, layers, MLP, heads and parameters of each published shape, the smallest first.

    The release, in bold, and its ``members`` (by their repositories) replace the published shapes that they have.
    """
    released = [(link(repository), member) for repository, member in (members or {}).items()]
    released.append((Markdown(f"**{plain(release.name)}** (this model)"), release))
    taken = {each.family for _, each in released}
    rows = [(each.parameters, shown, each.shape) for shown, each in released]
    for name in FAMILY:
        if name not in taken:
            rows.append(
                (_published_parameters(name), link(links[name]) if name in links else plain(name), _shape(name))
            )
    rows.sort(key=lambda row: row[0])
    return [[name, *map(shape.get, _SHAPE), _heads(shape), parameters] for parameters, name, shape in rows]


def _heads(shape: Mapping[str, Any]) -> str | None:
    heads = shape.get("num_attention_heads")
    return None if heads is None else f"{heads} / {shape.get('num_key_value_heads')}"


def _shape(name: str) -> dict[str, Any]:
    return F2LLMConfig.from_family(name).to_dict()


@cache
def _published_parameters(name: str) -> int:
    return count_parameters(F2LLMConfig.from_family(name))


def _results_facts(release: ModelRelease, evaluation: Evaluation, label: str) -> dict[str, Any]:
    """Tables of results at full width in float32."""
    summary = summarize(evaluation, label, release.language_rows or None)
    scores = model_scores(evaluation, label)
    rows = release.language_rows
    by_script = sorted(summary.scripts, key=lambda group: (-group.languages, group.name))
    groups = [
        ("By script", "script", by_script, lambda language: language.partition("-")[2] or "unknown"),
        ("By training data", "rows", summary.classes, lambda language: resource_class(language, rows)),
    ]
    means = [("tasks", summary.macro)] if len(summary.tasks) > 1 else []
    means += [("examples", summary.micro), ("languages", summary.language_macro)]
    return {
        "width": summary.dimension,
        "tasks": [
            [
                *(code(task.task), task.task_type, code(task.metric)),
                *(*_score(task.value, task.interval), task.subsets, task.examples),
            ]
            for task in summary.tasks
        ],
        "means": [[name, f"{100 * value:.1f}"] for name, value in means if value is not None],
        "groups": [
            {"title": title, "name": name, "rows": _group_rows(evaluation, scores, own, group_of)}
            for title, name, own, group_of in groups
            if own
        ],
        "languages": [
            [code(name), language_name(name.partition("-")[0]), score, interval, examples]
            for name, score, interval, _, examples in _group_rows(evaluation, scores, summary.languages, str)
        ],
        "others": _others(evaluation, label),
    }


def _score(value: float, interval: Interval | None) -> list[str | None]:
    # One example, or examples with equal scores, give an interval of width zero, which says nothing.
    known = interval is not None and interval.low < interval.high
    return [f"{100 * value:.1f}", f"{100 * interval.low:.1f} – {100 * interval.high:.1f}" if known else None]


def _group_rows(
    evaluation: Evaluation, scores: Sequence[Score], groups: Sequence[GroupScore], group_of: Callable[[str], str]
) -> list[list[Any]]:
    """Rows of groups of languages; ``group_of`` gives the group of a language."""
    rows = []
    for group in groups:
        own = [score for score in scores if any(group_of(language) == group.name for language in languages_of(score))]
        examples = examples_of(evaluation, own)
        interval = bootstrap_interval(examples) if examples is not None else None
        if interval is not None and abs(interval.mean - group.macro) >= 1e-4:
            # The group's score is a mean of another kind.
            interval = None
        name = _CLASS_NAMES.get(group.name, group.name)
        rows.append([name, *_score(group.macro, interval), group.languages, group.examples])
    return rows


def _others(evaluation: Evaluation, label: str) -> list[list[Any]]:
    """The other models of the evaluation beside the release, over the tasks that all of them have."""
    scores = shared_scores(evaluation, dict.fromkeys([label, *finished_models(evaluation)]))
    if len(scores) < 2:
        return []
    parameters = {record.label: record.parameters for record in evaluation.models}
    means = {model: task_mean(own) for model, own in scores.items()}
    return [
        [code(model), parameters.get(model), scores[model][0].dimension or None, f"{100 * mean:.1f}"]
        for model, mean in sorted(means.items(), key=lambda each: -each[1])
    ]


def _truncation_facts(evaluation: Evaluation, label: str, width: int | None) -> dict[str, Any] | None:
    """Quality by width and precision; None if only one of each was scored.

    Returns:
        ``precisions``; ``rows`` of a width and, for each precision, bytes of a vector and score; ``share``, the percent
        of the full score at ``width``, if known.
    """
    points = {precision: dict(line) for precision, line in dimension_points(evaluation, label).items()}
    if sum(map(len, points.values())) < 2:
        return None
    widths = sorted({width for line in points.values() for width in line}, reverse=True)
    rows: list[list[Any]] = [[each] for each in widths]
    for row in rows:
        for precision, line in points.items():
            known = row[0] in line
            row += [bytes_per_vector(row[0], precision), f"{line[row[0]]:.1f}"] if known else [None, None]
    full, cut = (points.get("float32", {}).get(each) for each in (widths[0], width))
    share = f"{100 * cut / full:.0f}" if full and cut is not None else None
    return {"precisions": list(points), "rows": rows, "share": share}


def _limits_facts(release: ModelRelease, evaluation: Evaluation, label: str | None) -> dict[str, Any]:
    """Languages without scores, tasks that failed, and limits of lengths and weights."""
    scores = model_scores(evaluation, label) if label else []
    scored = {language.partition("-")[0] for score in scores for language in score.languages}
    trained = set(release.languages) - SPECIAL_LANGUAGES.keys()
    trained_length = max((stage.arguments.get("max_length") or 0 for stage in release.stages), default=0)
    prefix = f"{label}: "
    return {
        "untested": [code(each) for each in sorted(trained - scored)] if scored else [],
        "failures": [
            [code(key.removeprefix(prefix)), why] for key, why in evaluation.failures.items() if key.startswith(prefix)
        ],
        "held_out": any(score.task == TASK for score in scores),
        "trained_length": trained_length if 0 < trained_length < release.max_length else None,
        "rounded": release.trained_dtype not in (None, release.dtype),
    }
