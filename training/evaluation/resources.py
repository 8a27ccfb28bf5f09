"""How much of each language a model was trained on, and the classes that follow from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from training.data.manifest_file import read_manifest
from training.data.survey import SEVERAL, survey
from training.errors import UserError

__all__ = ["CLASSES", "SHARES", "resource_class", "training_rows"]

# Least share of all training rows. Of the 60 million rows published, 1 % are 600 000 and 0.1 % are 60 000; as shares
# they classify a run on little data, too.
SHARES = {"high": 0.01, "middle": 0.001, "low": 0.0}
CLASSES = (*SHARES, "none")


def resource_class(language: str, rows: Mapping[str, int]) -> str:
    """The class of a language.

    Args:
        language: ISO 639-3 code with or without script, ``deu-Latn``.
        rows: Training rows by language; with script where they tell scripts apart, else by code alone.

    Returns:
        ``high`` for 1 % of all rows or more, ``middle`` for 0.1 % or more, ``low`` for fewer, ``none`` for no row.
    """
    own = rows.get(language, rows.get(language.split("-")[0], 0))
    if own <= 0:
        return "none"
    share = own / sum(rows.values())
    return next(name for name, least in SHARES.items() if share >= least)


def training_rows(manifest: Path) -> dict[str, int]:
    """Rows by ISO 639-3 code that a run's manifest names, under its caps; as published where no file is there.

    Rows of sources in several languages belong to none of them.

    Raises:
        UserError: If the manifest is faulty or tells no language's rows.
    """
    found: Counter[str] = Counter()
    for collection in survey(manifest).collections:
        found += collection.rows_by_language(capped=True)
    rows = {code: count for code, count in found.items() if code != SEVERAL}
    if not rows:
        shares = read_manifest(manifest).published_shares
        rows = dict(shares.language_rows) if shares else {}
    if not rows:
        raise UserError(f"{manifest}: tells no language's rows; give its 'languages' and have its files in place")
    return rows
