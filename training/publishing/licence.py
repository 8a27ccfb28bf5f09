"""The licence of released weights, where it follows from what they were made of; a text that goes with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import ModelCard, try_to_load_from_cache

from training.common.errors import UserError, in_one_line
from training.publishing.lineage import Lineage
from training.publishing.record import StageRecord
from training.stages.continuation import CHANGED_DATA, read_changes

logger = logging.getLogger("training")

# The licence of this repository; its text lies at the top of the checkout.
OWN_LICENCE = "apache-2.0"
# SPDX identifiers of licences that ask at most for a notice with copies, and forbid no use. Those that ask for more
# (naming the authors of adaptations, the same licence, no commerce) are whoever releases weights to judge.
PERMISSIVE = frozenset(
    """
    0bsd apache-2.0 bsd-2-clause bsd-3-clause bsl-1.0 cc0-1.0 cdla-permissive-2.0 isc mit mit-0 pddl pddl-1.0
    unicode-3.0 unicode-dfs-2016 unlicense zlib
    """.split()
)
_TRAINED = ("training", "adapter", "merged_adapter")
_SHOWN = 3
_ROOT = Path(__file__).resolve().parents[2]


def licence_of(lineage: Lineage, stages: Iterable[StageRecord]) -> str:
    """The licence of a model: that of this repository, if all that it was made of is permissive.

    Args:
        lineage: The stages behind the model, and what they started and learnt from.
        stages: The same, as a release tells them.

    Raises:
        UserError: If it does not follow: a source, a start or a teacher has another licence, or none that is known, or
            the data was changed while a stage was trained.
    """
    doubts = [*_doubtful_sources(stages), *_changed_data(lineage), *_doubtful_models(lineage)]
    if not doubts:
        logger.info("licence: %s; the data, and what training started from, allow it", OWN_LICENCE)
        return OWN_LICENCE
    more = f" and {len(doubts) - _SHOWN} more" if len(doubts) > _SHOWN else ""
    named = f"{', '.join(doubts[:_SHOWN])}{more}"
    raise UserError(
        f"--licence is missing, and the licence of the weights does not follow from {named}; "
        f"give it as --licence, such as {OWN_LICENCE}, or cc-by-nc-4.0 with its text as --licence-file"
    )


def _doubtful_sources(stages: Iterable[StageRecord]) -> Iterator[str]:
    told = set()
    for stage in stages:
        if stage.kind == "unknown" or (stage.kind in _TRAINED and not stage.sources):
            yield f"the data of {stage.name} (not known)"
        for source in stage.sources:
            if not _is_permissive(source.licence) and source.name not in told:
                told.add(source.name)
                yield f"source {source.name} ({source.licence or 'no licence in the manifest'})"


def _changed_data(lineage: Lineage) -> Iterator[str]:
    """Stages that learnt from something else first, of which neither their recipe nor their manifest tells any more."""
    for name, state in lineage.states.items():
        if any(CHANGED_DATA in note["keys"] for note in read_changes(state.run)):
            yield f"the data of {name} (changed while it was trained)"


def _doubtful_models(lineage: Lineage) -> Iterator[str]:
    for name, place in lineage.outside():
        licence = card_licence(place)
        if not _is_permissive(licence):
            yield f"model {name or place} ({licence or 'no licence on a card here'})"


def _is_permissive(licence: str | None) -> bool:
    return licence is not None and licence.strip().lower() in PERMISSIVE


def card_licence(place: str) -> str | None:
    """The licence that the card of a model names; None if there is no card on this machine, or it names none.

    Args:
        place: Folder, or name on the Hub of a model whose card is in the client's cache; may be empty.
    """
    if not place:
        return None
    path = Path(place) / "README.md" if Path(place).is_dir() else _cached_card(place)
    if path is None or not path.is_file():
        return None
    try:
        licence = ModelCard.load(path, ignore_metadata_errors=True).data.license
    # YAML's errors and huggingface_hub's own share no class.
    except Exception as error:
        logger.debug("%s: names no licence (%s)", path, in_one_line(error))
        return None
    return licence if isinstance(licence, str) else None


def _cached_card(name: str) -> Path | None:
    try:
        found = try_to_load_from_cache(name, "README.md")
    # No name on the Hub.
    except ValueError:
        return None
    return Path(found) if isinstance(found, str) else None


def licence_text(licence: str, path: Path | None) -> str:
    """The text of a licence.

    Args:
        licence: Its SPDX identifier.
        path: The file that holds it; that of this checkout if None.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    if path is None:
        if licence.lower() != OWN_LICENCE:
            raise UserError(f"--licence {licence}: its text is missing; give it with --licence-file")
        path = _ROOT / "LICENSE"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--licence-file {path}: cannot be read ({error}); give the licence's text") from None
    if not text.strip():
        raise UserError(f"--licence-file {path}: is empty; give the licence's text")
    return text
