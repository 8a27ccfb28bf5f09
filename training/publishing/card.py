"""The card of a packed model, rendered from ``release.json`` and ``evaluation/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hub_cards.hub_terms import SPECIAL_LANGUAGES
from hub_cards.markdown import Markdown, code, link, plain, shell_json, shell_word
from hub_cards.render import render_model_card
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
from training.publishing.card_lineage import base_links, lineage_facts, model_metadata, origins, reference_text
from training.publishing.evaluation import EVALUATION, RESULTS, drawn_figures, own_label
from training.publishing.record import ModelRelease, load_release

CARD = "README.md"
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
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

    It shows the figures that were drawn before, and nothing that was not measured. The examples load ``repository``, by
    default the release's name. ``links`` are repositories on the Hub by the names of stages and models, ``datasets``
    those that the record does not have, ``collection`` that of the family, and ``members`` its other models by their
    repositories.
    """
    release = load_release(folder)
    evaluation = load_evaluation(folder / EVALUATION, missing_ok=True)
    label = own_label(evaluation, release.name)
    links = {**base_links(release), **(links or {})}
    last = release.stages[-1] if release.stages else None
    # A teacher that only finds false negatives is not learnt from.
    weights = last and [last.arguments.get(f"{kind}distillation_weight", not kind) for kind in ("", "score_")]
    # The width of the examples is the largest of at most half of the full one.
    full, *smaller = release.dimensions
    width = max([each for each in smaller if 2 * each <= full] or smaller, default=None)
    languages = sorted(set(release.languages) - SPECIAL_LANGUAGES.keys())
    content = render_model_card(
        {
            "metadata": model_metadata(release, evaluation, label, datasets=datasets),
            "release": release,
            "repository": repository or release.name,
            "known": all(stage.kind != "unknown" for stage in release.stages),
            "origins": [reference_text(each, links) for each in origins(release)],
            "adapter": _adapter_facts(release, links),
            "teacher": reference_text(last.teacher, links) if last and last.teacher and any(weights) else None,
            "collection": collection,
            "truncated": width,
            "prompt_names": {name: text for name, text in release.prompts.items() if text},
            "languages": [[each, language_name(each)] for each in languages],
            "servers": _server_facts(release, repository or release.name, width),
            "family": _family_rows(release, members) if members else None,
            "results": _results_facts(release, evaluation, label) if label else None,
            "truncation": _truncation_facts(evaluation, label, width) if label else None,
            "exits": _exit_facts(release, evaluation),
            "figures": drawn_figures(folder),
            "pairs_result": f"{EVALUATION}/{RESULTS}" if (folder / EVALUATION / RESULTS).is_file() else None,
            "lineage": lineage_facts(release, links),
            "limits": _limits_facts(release, evaluation, label),
        }
    )
    # A header that the Hub could not read is an error.
    return ModelCard(content).content


def _adapter_facts(release: ModelRelease, links: Mapping[str, str]) -> dict[str, Any] | None:
    adapter = release.adapter
    if adapter is None:
        return None
    base, shape = reference_text(adapter.base, links), None
    if adapter.rank is not None and adapter.alpha is not None:
        root = " (over the square root of the rank)" if adapter.rslora else ""
        targets = ", ".join(map(code, adapter.targets))
        shape = Markdown(f"rank {adapter.rank}, alpha {adapter.alpha:g}{root}, on {targets}")
    return {
        **vars(adapter),
        "kind": "DoRA" if adapter.dora else "LoRA",
        "base": base,
        "base_link": link(adapter.base.name) if adapter.base.kind == "hub" else base,
        "base_name": adapter.base.name,
        "size": f"{release.parameters * _BYTES[release.dtype] / 1e6:.3g} MB",
        "shape": shape,
    }


def _server_facts(release: ModelRelease, repository: str, width: int | None) -> dict[str, str]:
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


def _family_rows(release: ModelRelease, members: Mapping[str, ModelRelease]) -> list[list[Any]]:
    """Model, width, layers, MLP, heads and parameters of the models that are released together, the smallest first."""
    found = [(link(repository), member) for repository, member in members.items()]
    found.append((Markdown(f"**{plain(release.name)}** (this model)"), release))
    rows = []
    for name, each in sorted(found, key=lambda pair: pair[1].parameters):
        width, layers, mlp, heads, kv_heads = (each.shape.get(key) for key in _SHAPE)
        rows.append([name, width, layers, mlp, f"{heads} / {kv_heads}" if heads else None, each.parameters])
    return rows


def _results_facts(release: ModelRelease, evaluation: Evaluation, label: str) -> dict[str, Any]:
    summary = summarize(evaluation, label, release.language_rows or None)
    rows = partial(_group_rows, evaluation, model_scores(evaluation, label))
    means = [("tasks", summary.macro)] if len(summary.tasks) > 1 else []
    means += [("examples", summary.micro), ("languages", summary.language_macro)]
    by_script = sorted(summary.scripts, key=lambda group: (-group.languages, group.name))
    scripts = rows(by_script, lambda language: language.partition("-")[2] or "unknown")
    classes = rows(summary.classes, lambda language: resource_class(language, release.language_rows))
    groups = [
        {"title": "By script", "name": "script", "rows": scripts},
        {"title": "By training data", "name": "rows", "rows": [[_CLASS_NAMES[name], *row] for name, *row in classes]},
    ]
    languages = rows(summary.languages, str)
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
        "groups": [group for group in groups if group["rows"]],
        "languages": [
            [code(name), language_name(name.partition("-")[0]), score, interval, examples]
            for name, score, interval, _, examples in languages
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
    rows = []
    for group in groups:
        own = [score for score in scores if any(group_of(language) == group.name for language in languages_of(score))]
        examples = examples_of(evaluation, own)
        interval = bootstrap_interval(examples) if examples is not None else None
        # Otherwise the group's score is a mean of another kind.
        is_its_mean = interval is not None and abs(interval.mean - group.macro) < 1e-4
        rows.append(
            [group.name, *_score(group.macro, interval if is_its_mean else None), group.languages, group.examples]
        )
    return rows


def _others(evaluation: Evaluation, label: str) -> list[list[Any]]:
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
    """Bytes and score by width and precision, and ``share`` of the full score in percent; None if only one is known."""
    points = {precision: dict(line) for precision, line in dimension_points(evaluation, label).items()}
    if sum(map(len, points.values())) < 2:
        return None
    rows: list[list[Any]] = [
        [each] for each in sorted({each for line in points.values() for each in line}, reverse=True)
    ]
    for row, (precision, line) in product(rows, points.items()):
        is_known = row[0] in line
        row += [bytes_per_vector(row[0], precision), f"{line[row[0]]:.1f}"] if is_known else [None, None]
    full, cut = (points.get("float32", {}).get(each) for each in (rows[0][0], width))
    share = f"{100 * cut / full:.0f}" if full and cut is not None else None
    return {"precisions": list(points), "rows": rows, "share": share}


def _exit_facts(release: ModelRelease, evaluation: Evaluation) -> dict[str, Any] | None:
    """Numbers of layers that make models of their own, and what to choose for a budget; None without exits.

    ``rows`` are MB of weights, layers, dimensions, precision, bytes of a vector and score, those alone than which no
    other is better at no more of either cost, by size.
    """
    exits = release.shape.get("exit_layers")
    if not exits:
        return None
    found, byte = [], _BYTES[release.dtype]
    for record in evaluation.models:
        # A packed model has no factors of its token embeddings.
        if record.name == release.name and record.parameters and "rank" not in record.options:
            size, layers = record.parameters * byte / 1e6, record.layers or exits[-1]
            for precision, line in dimension_points(evaluation, record.label).items():
                found += [(size, layers, dim, precision, bytes_per_vector(dim, precision), s) for dim, s in line]
    # Of equal scores at equal cost, the first.
    found.sort(key=lambda each: (each[0], each[4], -each[5]))
    best = [each for n, each in enumerate(found) if all(o[4] > each[4] or o[5] < each[5] for o in found[:n])]
    rows = [[f"{size:.3g}", layers, dim, *more, f"{score:.1f}"] for size, layers, dim, *more, score in best]
    return {"layers": exits, "example": exits[(len(exits) - 1) // 2], "rows": rows}


def _limits_facts(release: ModelRelease, evaluation: Evaluation, label: str | None) -> dict[str, Any]:
    scores = model_scores(evaluation, label) if label else []
    scored = {language.partition("-")[0] for score in scores for language in score.languages}
    trained = set(release.languages) - SPECIAL_LANGUAGES.keys()
    trained_length = max((stage.arguments.get("max_length") or 0 for stage in release.stages), default=0)
    return {
        "untested": [code(each) for each in sorted(trained - scored)] if scored else [],
        "held_out": any(score.task == TASK for score in scores),
        "trained_length": trained_length if 0 < trained_length < release.max_length else None,
        "rounded": release.trained_dtype not in (None, release.dtype),
    }
