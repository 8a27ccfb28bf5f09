"""Pairs of texts with their languages, read from a parquet file in batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mteb.languages import check_language_code

from training.common.errors import UserError
from training.common.languages import iso639_3, usual_script
from training.data.published import PublishedFile


@dataclass(frozen=True)
class PairRows:
    """Rows of a file, column by column.

    Attributes:
        queries: ``n`` texts, without instructions.
        passages: ``n`` texts.
        negatives: ``n`` lists of texts, as many as a row has.
        languages: ``n`` codes such as ``deu-Latn``, those of the queries; None where the file does not tell.
        passage_languages: ``n`` codes, those of the passages; None where nothing tells.
    """

    queries: list[str]
    passages: list[str]
    negatives: list[list[str]]
    languages: list[str] | None
    passage_languages: list[str] | None


def read_pairs(path: Path, passage_language: str | None = None) -> PairRows:
    """Reads a file in the published format, with ``lang``, ``script``, ``passage_lang``, ``passage_script``.

    Args:
        path: The file.
        passage_language: The language of all passages, such as ``eng-Latn``, if the file does not tell.

    Raises:
        UserError: If the file cannot be read, lacks a column, or a row is bad.
    """
    file = PublishedFile(path)
    queries, passages, negatives = [], [], []
    # Passages and negatives repeat: one object for each text.
    texts: dict[str, str] = {}
    for batch in file.batches(raw=True):
        queries += batch.columns["query"]
        passages += [texts.setdefault(text, text) for text in batch.columns["passage"]]
        columns = [batch.columns[name] for name in file.negatives]
        for row in range(len(batch)):
            negatives.append([texts.setdefault(text, text) for column in columns if (text := column[row]) is not None])
    languages = _languages(file, "lang", "script")
    told = _languages(file, "passage_lang", "passage_script")
    if told is None and passage_language is not None:
        told = [passage_language] * len(passages)
    return PairRows(queries, passages, negatives, languages, told)


def _languages(file: PublishedFile, language: str, script: str) -> list[str] | None:
    """The code of each row; None if the file has no such column."""
    names = [name for name in (language, script) if name in file.schema.names]
    if language not in names:
        return None
    found: list[str] = []
    codes: dict[tuple[str | None, ...], str] = {}
    for batch in file.further_columns(names):
        for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
            if row not in codes:
                codes[row] = _code(file, len(found), dict(zip(names, row, strict=True)), language, script)
            found.append(codes[row])
    return found


def _code(file: PublishedFile, row: int, told: dict[str, str | None], language: str, script: str) -> str:
    for name, value in told.items():
        if value is None or not value.strip():
            raise UserError(f"{file.path}: row {row}, column {name!r} is no text; correct or drop the row")
    try:
        return language_code(told[language], told.get(script))
    except ValueError as error:
        values = ", ".join(f"{name} {value!r}" for name, value in told.items())
        raise UserError(f"{file.path}: row {row}: {values} names no language ({error})") from None


def language_code(tag: str, script: str | None = None) -> str:
    """Language and script as mteb writes them: ``deu-Latn``.

    Args:
        tag: A BCP 47 tag.
        script: ISO 15924 code; if None, the one in the tag, or the one that the language is usually written in.

    Raises:
        ValueError: If mteb knows no such language or script.
    """
    code = iso639_3(tag)
    script = script or usual_script(tag)
    check_language_code(f"{code}-{script}")
    return f"{code}-{script}"
