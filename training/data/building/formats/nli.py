"""Natural language inference: a premise looks for what it entails, past what it contradicts or leaves open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from training.data.building.formats.format import NUM_NEGATIVES, Format, Key, Row
from training.data.building.formats.labels import meaning
from training.data.building.raw import RawRows
from training.data.cleaning.normalise import normalise

_ENTAILMENT = "entailment"
# Negatives in this order: what is contradicted is surely wrong.
_NEGATIVES = ("contradiction", "neutral")
_MEANINGS = (_ENTAILMENT, *_NEGATIVES)
# The hypotheses of a premise by what they are to it; a dict keeps them distinct and in order.
_Hypotheses = dict[str, dict[str, None]]


def nli(raw: RawRows, *, labels: Mapping[Any, str | None], num_negatives: int) -> Iterator[Row]:
    """Yields one row for each premise and hypothesis it entails, its own negatives first; mining adds the others.

    All rows are held in memory, for the hypotheses of a premise may lie far apart.

    Args:
        raw: Columns ``premise``, ``hypothesis`` and ``label``; ``lang`` may name their language.
        labels: What each label means: entailment, neutral, contradiction, or None for rows to leave out.
        num_negatives: Negatives of a row at most.

    Raises:
        UserError: If a label has no meaning.
    """
    for (premise, lang), hypotheses in _by_premise(raw, labels).items():
        entailed = hypotheses[_ENTAILMENT]
        if not entailed:
            raw.dropped["premise entails no hypothesis"] += 1
            continue
        others = dict.fromkeys(chain.from_iterable(hypotheses[label] for label in _NEGATIVES))
        # Annotators disagree: what one of them found entailed is nothing to be pushed away.
        right = {normalise(text) for text in (*entailed, premise)}
        negatives = [text for text in others if normalise(text) not in right]
        raw.dropped["hypothesis is labelled entailed, or is the premise, and can be no negative"] += len(others) - len(
            negatives
        )
        for hypothesis in entailed:
            yield Row(premise, hypothesis, negatives[:num_negatives], lang)


def _by_premise(raw: RawRows, labels: Mapping[Any, str | None]) -> dict[tuple[str, str | None], _Hypotheses]:
    """The hypotheses of each premise, in the order of the premises' first rows."""
    grouped: dict[tuple[str, str | None], _Hypotheses] = {}
    for number, row in raw:
        label = meaning(raw, number, row["label"], labels, "labels")
        if label is None:
            continue
        premise, hypothesis = row["premise"], row["hypothesis"]
        if label == _ENTAILMENT and premise.strip() == hypothesis.strip():
            raw.dropped["query and passage are identical"] += 1
            continue
        hypotheses = grouped.setdefault((premise, row["lang"]), {meant: {} for meant in _MEANINGS})
        if hypothesis in hypotheses[label]:
            raw.dropped["row is repeated"] += 1
        hypotheses[label][hypothesis] = None
    return grouped


def _are_labels(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return _ENTAILMENT in value.values() and all(means in (*_MEANINGS, None) for means in value.values())


NLI = Format(
    nli,
    "retrieval",
    texts=("premise", "hypothesis"),
    values=("label",),
    keys={
        "labels": Key(
            f"a mapping of labels to {', '.join(_MEANINGS)} or null, with {_ENTAILMENT} among them",
            _are_labels,
            {label: label for label in _MEANINGS},
        ),
        "num_negatives": NUM_NEGATIVES,
    },
)
