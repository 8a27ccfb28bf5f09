"""Classification and clustering of texts that have labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict
from mteb.abstasks.abstask import AbsTask

from training.common.keyed import text_key
from training.evaluation.local.task_classes import SPLIT, UnfitError, make_task


def labels_of(where: object, texts: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """The label of each distinct text, in an order drawn by key; texts of several labels are left out.

    Neither order nor repetition of the rows has an influence.

    Args:
        where: What an error names.
        texts: ``n`` texts.
        labels: ``n`` labels.

    Raises:
        UnfitError: If there are fewer than two labels with two texts, the least to learn and to score.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for text, label in zip(texts, labels, strict=True):
        found[text].add(label)
    plain = {text: own.pop() for text, own in found.items() if len(own) == 1}
    if sum(len(own) >= 2 for own in _by_label(plain).values()) < 2:
        raise UnfitError(
            f"{where}: fewer than two labels have two texts, of {len(set(labels))} labels and {len(found)} texts; two "
            "are needed to classify"
        )
    return {text: plain[text] for text in sorted(plain, key=_key)}


def classification(name: str, place: Path, languages: Sequence[str], labels: Mapping[str, str]) -> AbsTask:
    """Telling the label of a text. Half of each label's texts train the classifier, one more where they are odd.

    Args:
        name: Its name.
        place: Where the data lie.
        languages: Codes such as ``deu-Latn``.
        labels: The label of each text, as :func:`labels_of` gives it.
    """
    # The texts are in drawn order, so that every second one is a draw.
    halves = [{text for texts in _by_label(labels).values() for text in texts[start::2]} for start in (0, 1)]
    data = {
        split: _dataset(labels, [text for text in labels if text in half], "text", "label")
        for split, half in zip(("train", SPLIT), halves, strict=True)
    }
    return make_task("Classification", name, place, languages, DatasetDict(data))


def clustering(name: str, place: Path, languages: Sequence[str], labels: Mapping[str, str]) -> AbsTask:
    """Grouping texts by label; the arguments are those of :func:`classification`."""
    data = {SPLIT: _dataset(labels, labels, "sentences", "labels")}
    return make_task("Clustering", name, place, languages, DatasetDict(data))


def _by_label(labels: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for text, label in labels.items():
        found[label].append(text)
    return found


def _dataset(labels: Mapping[str, str], texts: Iterable[str], text_column: str, label_column: str) -> Dataset:
    numbers = {label: number for number, label in enumerate(sorted(set(labels.values())))}
    texts = list(texts)
    return Dataset.from_dict({text_column: texts, label_column: [numbers[labels[text]] for text in texts]})


def _key(text: str) -> int:
    return text_key(f"order of labelled texts {text}")
