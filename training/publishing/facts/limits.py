"""What a model's numbers do not say, as sentences of its card."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hub_cards.hub_terms import SPECIAL_LANGUAGES
from hub_cards.markdown import code
from training.evaluation.finished_stage import TASK
from training.evaluation.records import Evaluation
from training.evaluation.selection import model_scores
from training.evaluation.summary import languages_of
from training.publishing.record import ModelRelease

# Of fewer examples, one more or less that is found changes a score by more than three points.
_FEW = 30


def limits_facts(release: ModelRelease, evaluation: Evaluation, label: str | None) -> dict[str, Any]:
    """Languages without scores, tasks that failed, and what the lengths and the weights are.

    Args:
        release: The model.
        evaluation: Its scores.
        label: Its label among them; None if it has none.
    """
    scores = model_scores(evaluation, label) if label else []
    spoken = {language.partition("-")[0] for score in scores for language in score.languages}
    examples: Counter[str] = Counter()
    for score in scores:
        examples.update(dict.fromkeys(languages_of(score), score.examples))
    trained = set(release.languages) - SPECIAL_LANGUAGES.keys()
    trained_length = max((stage.arguments.get("max_length") or 0 for stage in release.stages), default=0)
    prefix = f"{label}: "
    return {
        "untested": [code(each) for each in sorted(trained - spoken)] if spoken else [],
        "untrained": [code(each) for each in sorted(spoken - trained)] if trained else [],
        "few_examples": sum(count < _FEW for count in examples.values()),
        "scored": len(examples),
        "few": _FEW,
        "failures": [
            [code(key.removeprefix(prefix)), why]
            for key, why in evaluation.failures.items()
            if label and key.startswith(prefix)
        ],
        "held_out": any(score.task == TASK for score in scores),
        "held_out_only": bool(scores) and all(score.task == TASK for score in scores),
        "trained_length": trained_length if 0 < trained_length < release.max_length else None,
        "rounded": release.trained_dtype not in (None, release.dtype),
    }
