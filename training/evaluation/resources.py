"""How much of each language a model was trained on, and the classes that follow from it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
from langcodes import Language

from training.common.errors import UserError
from training.common.languages import SEVERAL, iso639_3
from training.data.manifest_file import read_manifest
from training.data.published import PublishedFile
from training.data.survey import SourceSurvey, divided, survey

logger = logging.getLogger("training")

# Least share of all training rows. Of the 60 million rows published, 1 % are 600 000 and 0.1 % are 60 000; as shares
# they classify a run on little data, too.
SHARES = {"high": 0.01, "middle": 0.001, "low": 0.0}
CLASSES = (*SHARES, "none")


def resource_class(language: str, rows: Mapping[str, int]) -> str:
    """The class of a language.

    Args:
        language: ISO 639-3 code with or without script, ``deu-Latn``.
        rows: Training rows by language, with script or by code alone; the latter count for each script.

    Returns:
        ``high`` for 1 % of all rows or more, ``middle`` for 0.1 % or more, ``low`` for fewer, ``none`` for no row.
    """
    code, _, script = language.partition("-")
    if script:
        own = rows.get(language, 0) + rows.get(code, 0)
    else:
        own = sum(count for name, count in rows.items() if name.split("-")[0] == code)
    if own <= 0:
        return "none"
    share = own / sum(rows.values())
    return next(name for name, least in SHARES.items() if share >= least)


def training_rows(manifest: Path) -> dict[str, int]:
    """Rows by language that a run's manifest names, under its caps; as published where no file is there.

    Languages are ISO 639-3 codes, with script where the files tell it: ``deu``, ``srp-Cyrl``. Rows of sources in
    several languages count for that of their query if the files have a column ``lang`` (and ``script``), else for none.
    Under a cap each language keeps its share.

    Raises:
        UserError: If the manifest is faulty or tells no language's rows, or a file names a language that is none.
    """
    found: Counter[str] = Counter()
    for collection in survey(manifest).collections:
        for source in collection.sources:
            found += _rows(source, pair=collection.entry.each_file)
    rows = {code: count for code, count in found.items() if code != SEVERAL}
    if not rows:
        shares = read_manifest(manifest).published_shares
        rows = dict(shares.language_rows) if shares else {}
    if not rows:
        raise UserError(f"{manifest}: tells no language's rows; give its 'languages' and have its files in place")
    return rows


def _rows(source: SourceSurvey, pair: bool) -> Counter[str]:
    if len(source.languages) == 1 or not source.files or not all(file.tells_language for file in source.files):
        return divided(source.kept, source.languages, pair)
    counts: Counter[str] = Counter()
    for file in source.files:
        counts += _counted(PublishedFile(file.name))
    # Rounded up: a language with a row is not one without.
    return Counter({code: -(-count * source.kept // counts.total()) for code, count in counts.items()})


def _counted(file: PublishedFile) -> Counter[str]:
    """Rows of a file by language, from the columns that name it alone."""
    names = [name for name in ("lang", "script") if name in file.schema.names]
    counts: Counter[tuple[str | None, ...]] = Counter()
    for batch in file.further_columns(names):
        grouped = pa.Table.from_batches([batch]).group_by(names).aggregate([([], "count_all")]).to_pydict()
        keys = zip(*(grouped[name] for name in names), strict=True)
        counts.update(dict(zip(keys, grouped["count_all"], strict=True)))
    found: Counter[str] = Counter()
    for told, count in counts.items():
        found[_code(file, *told)] += count
    return found


def _code(file: PublishedFile, tag: str | None, script: str | None = None) -> str:
    if tag is None:
        return SEVERAL
    try:
        code = iso639_3(tag)
    except ValueError as error:
        raise UserError(f"{file.path}: column 'lang' holds {tag!r}: {error}") from None
    script = script or Language.get(tag).script
    return f"{code}-{script}" if script else code


def known_rows(manifest: Path | None) -> dict[str, int] | None:
    """As :func:`training_rows`; None, with a notice, where the manifest is gone or does not tell."""
    if manifest is None:
        return None
    try:
        return training_rows(manifest)
    except UserError as error:
        logger.warning("no resource classes: %s", error)
        return None
