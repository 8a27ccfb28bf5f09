"""The card of a packed model: its facts from ``release.json`` and ``evaluation/``, rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hub_cards.hub_terms import SPECIAL_LANGUAGES
from hub_cards.render import render_model_card
from training.common.languages import language_name
from training.evaluation.records import Evaluation, load_evaluation
from training.publishing.evaluation import EVALUATION, RESULTS
from training.publishing.facts.adapter import adapter_facts
from training.publishing.facts.family import family_rows
from training.publishing.facts.limits import limits_facts
from training.publishing.facts.lineage import lineage_facts
from training.publishing.facts.metadata import model_metadata
from training.publishing.facts.references import base_links, origins, reference_text
from training.publishing.facts.results import own_label, results_facts, truncation_facts
from training.publishing.facts.servers import server_facts
from training.publishing.figures import drawn_figures
from training.publishing.record import ModelRelease, load_release

CARD = "README.md"


def model_card(
    folder: Path,
    repository: str | None = None,
    *,
    links: Mapping[str, str] | None = None,
    datasets: Sequence[str] = (),
    collection: str | None = None,
    members: Mapping[str, ModelRelease] | None = None,
) -> str:
    """The card of a packed folder, the same for the same folder.

    Figures are shown as far as they are there: draw them first. What was not measured is not on the card.

    Args:
        folder: The packed folder.
        repository: Name on the Hub, which the examples load; the release's own name if None.
        links: Repositories on the Hub by the names of stages and models, for the family's table and the lineage.
        datasets: Data sets on the Hub that it was trained on, besides those of its record.
        collection: The family's collection on the Hub.
        members: The other models of the family, by their repositories on the Hub.

    Raises:
        UserError: If the folder has no whole record or evaluation.
    """
    release = load_release(folder)
    evaluation = load_evaluation(folder / EVALUATION, missing_ok=True)
    label = own_label(evaluation, release.name)
    links = {**base_links(release), **(links or {})}
    content = render_model_card(
        {
            "metadata": model_metadata(release, evaluation, label, datasets=datasets),
            "repository": repository or release.name,
            "servers": server_facts(release, repository or release.name, _truncated(release.dimensions)),
            "collection": collection,
            **_facts(release, evaluation, label, links),
            "family": family_rows(release, links, members),
            "figures": drawn_figures(folder),
            "pairs_result": f"{EVALUATION}/{RESULTS}" if (folder / EVALUATION / RESULTS).is_file() else None,
        }
    )
    # Fails on a header that the Hub could not read.
    return ModelCard(content).content


def _facts(
    release: ModelRelease, evaluation: Evaluation, label: str | None, links: Mapping[str, str]
) -> dict[str, Any]:
    last = release.stages[-1] if release.stages else None
    width = _truncated(release.dimensions)
    languages = sorted(set(release.languages) - SPECIAL_LANGUAGES.keys())
    return {
        "release": release,
        "known": all(stage.kind != "unknown" for stage in release.stages),
        "adapter": adapter_facts(release, links),
        "origins": [reference_text(each, links) for each in origins(release)],
        "teacher": reference_text(last.teacher, links) if last and last.teacher else None,
        "truncated": width,
        "prompt_names": {name: text for name, text in release.prompts.items() if text},
        "languages": [[code, language_name(code)] for code in languages],
        "results": results_facts(release, evaluation, label) if label else None,
        "truncation": truncation_facts(evaluation, label, width) if label else None,
        "lineage": lineage_facts(release, links),
        "limits": limits_facts(release, evaluation, label),
    }


def _truncated(dimensions: Sequence[int]) -> int | None:
    """The width of the examples: the largest that is half of the full one or less; None for one width alone."""
    smaller = [dim for dim in dimensions if 2 * dim <= dimensions[0]] or list(dimensions[1:])
    return max(smaller, default=None)
