"""The licence of released weights, where it follows from what they were made of, and its text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from training.common.errors import UserError
from training.models.model_folder import user_error
from training.publishing.lineage import Lineage
from training.publishing.model_files import card_field
from training.publishing.record import StageRecord
from training.publishing.states import is_repository
from training.stages.continuation import CHANGED_DATA, read_changes

logger = logging.getLogger("training")

# The licence of this repository.
OWN_LICENCE = "apache-2.0"
# SPDX identifiers of licences that require at most a notice with copies and forbid no use. Whether a licence that
# requires more (attribution of adaptations, the same licence, no commercial use) allows a release is for a person to
# judge.
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
    """Return the licence of this repository if everything that a model was made of is permissive; refuse otherwise."""
    doubts = list(dict.fromkeys(_doubts(lineage, stages)))
    if not doubts:
        logger.info("licence: %s; the data, and what training started from, allow it", OWN_LICENCE)
        return OWN_LICENCE
    named = ", ".join(doubts[:_SHOWN]) + (f" and {len(doubts) - _SHOWN} more" if len(doubts) > _SHOWN else "")
    raise UserError(
        f"--licence is missing, and the licence of the weights does not follow from {named}; "
        f"give it as --licence, such as {OWN_LICENCE}, or cc-by-nc-4.0 with its text as --licence-file"
    )


def _doubts(lineage: Lineage, stages: Iterable[StageRecord]) -> Iterator[str]:
    """Sources and models whose licence is unknown or asks for more than a notice."""
    for stage in stages:
        if stage.kind == "unknown" or (stage.kind in _TRAINED and not stage.sources):
            yield f"the data of {stage.name} (not known)"
        for source in stage.sources:
            if not _is_permissive(source.licence):
                yield f"source {source.name} ({source.licence or 'no licence in the manifest'})"
    for name, state in lineage.states.items():
        # Neither recipe nor manifest names the first data any more.
        if any(CHANGED_DATA in note["keys"] for note in read_changes(state.run)):
            yield f"the data of {name} (changed while it was trained)"
    for name, path in lineage.outside:
        licence = _card_licence(path)
        if not _is_permissive(licence):
            yield f"model {name or path} ({licence or 'no licence on a card here'})"


def _is_permissive(licence: str | None) -> bool:
    return licence is not None and licence.strip().lower() in PERMISSIVE


def _card_licence(model: str) -> str | None:
    """The licence on the local card of a folder or Hub model; None if there is none."""
    card: object = Path(model) / "README.md"
    if not Path(model).is_dir():
        # The remains of a path are not the name of a repository.
        card = try_to_load_from_cache(model, "README.md") if is_repository(model) else None
    licence = card_field(Path(card), "license") if isinstance(card, str | Path) else None
    return licence if isinstance(licence, str) else None


def licence_text(licence: str, path: Path | None) -> str:
    """Return the text of a licence by its SPDX identifier: that in a file, or that of this checkout."""
    if path is None:
        if licence.lower() != OWN_LICENCE:
            raise UserError(f"--licence {licence}: its text is missing; give it with --licence-file")
        path = _ROOT / "LICENSE"
    with user_error(f"--licence-file {path}: cannot be read", "give the licence's text"):
        text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise UserError(f"--licence-file {path}: is empty; give the licence's text")
    return text
