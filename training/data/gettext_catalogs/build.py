"""Translation data from the message catalogs that are installed with programs, in the published format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from training.common.errors import UserError
from training.common.keyed import keyed_bits
from training.data.build_folder import build_folder
from training.data.cldr.draws import for_purpose
from training.data.gettext_catalogs.catalogs import LOCALE_DIRS
from training.data.gettext_catalogs.corpus import Corpus, read_corpus
from training.data.gettext_catalogs.negatives import Negatives
from training.data.parquet import ROW_GROUP_ROWS, rows_table, write_parquet

# Programs translate under their own licences, most of them the GPL or the LGPL.
LICENCE = "each program's own"
# Raise it when the same options would build other data than before.
_FORMAT = 2
_ROWS_AT_ONCE = 5 * ROW_GROUP_ROWS
# Other languages drawn for a message before it is given up.
_PASSAGES_DRAWN = 8
_INSTRUCTIONS = {
    "gettext_translation": "Retrieve the English translation.",
    "gettext_pairs": "Retrieve the translation into another language.",
}


def build_gettext(
    output_dir: Path | str,
    *,
    seed: int = 0,
    locale_dirs: Sequence[str] = LOCALE_DIRS,
    held_out_share: float = 0.1,
    num_negatives: int = 8,
    rows_per_language: int = 10_000,
    pairs_per_language: int = 2_000,
    held_out_per_language: int = 200,
) -> Path:
    """Builds the training sources, the manifest and the messages of held-out programs from installed catalogs.

    The folder appears whole or not at all. It holds ``manifest.yaml``; ``gettext_translation.parquet`` (a message and
    its English source) and ``gettext_pairs.parquet`` (a message in two other languages), sorted by language, with
    columns ``lang``, ``script`` and ``domain``; ``held_out.parquet`` (query, passage, lang, script, domain) from whole
    programs that no source has; ``candidates.parquet`` (passage: every English text of these programs); and
    ``build.json``, which counts what was read and skipped. No held-out text occurs in any source.

    A finished build stays as it is when catalogs are installed or removed later.

    Args:
        output_dir: The folder to write. If it already holds a build with these options, nothing is done.
        seed: The seed of every draw.
        locale_dirs: Folders of catalogs, ``FOLDER/LOCALE/LC_MESSAGES/DOMAIN.mo``.
        held_out_share: Share of the programs to hold out, between 0 and 1; at least one is.
        num_negatives: Negatives of a row.
        rows_per_language: Rows of a language in the first source at most, drawn evenly over programs.
        pairs_per_language: Rows of a language in the second source at most.
        held_out_per_language: Held-out messages of a language at most, drawn evenly over programs.

    Returns:
        ``output_dir``.

    Raises:
        UserError: An option is out of range, there are too few catalogs, or ``output_dir`` holds anything but the same
            build; nothing in it is touched.

    Example:
        >>> folder = build_gettext("data/gettext", locale_dirs=["/usr/share/locale"])  # doctest: +SKIP
    """
    if not 0 < held_out_share < 1:
        raise UserError(f"held_out_share is {held_out_share}; it must lie between 0 and 1")
    options = {
        "format": _FORMAT,
        "seed": seed,
        "locale_dirs": [str(folder) for folder in locale_dirs],
        "held_out_share": held_out_share,
        "num_negatives": num_negatives,
        "rows_per_language": rows_per_language,
        "pairs_per_language": pairs_per_language,
        "held_out_per_language": held_out_per_language,
    }
    for name, value in list(options.items())[4:]:
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    return build_folder(Path(output_dir), "gettext", options, lambda folder: _write_build(folder, options))


def _write_build(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Writes every file of the build into an empty folder, and returns its counts."""
    corpus = read_corpus(options["locale_dirs"], options["seed"], options["held_out_share"])
    training, held_out = corpus.training_rows(), corpus.held_out_rows()
    if not len(training) or not len(held_out):
        raise UserError(
            f"{', '.join(options['locale_dirs'])}: {len(training)} messages to train on and {len(held_out)} to hold "
            "out; install more programs and language packs, or name more folders in 'locale_dirs'"
        )
    negatives = Negatives(corpus, training, options["num_negatives"])
    entries, rows = [], {}
    for name, tables, languages in (
        _translation(corpus, _evenly(corpus, training, options["rows_per_language"]), negatives),
        _pairs(corpus, training, _evenly(corpus, training, options["pairs_per_language"]), negatives),
    ):
        if not len(languages):
            continue
        rows[name] = write_parquet(folder / f"{name}.parquet", tables)
        entries.append(
            {
                "name": name,
                "files": [f"{name}.parquet"],
                "task_type": "retrieval",
                "symmetric": True,
                "instruction": _INSTRUCTIONS[name],
                "languages": languages,
                "licence": LICENCE,
            }
        )
    if not entries:
        raise UserError(
            f"{', '.join(options['locale_dirs'])}: no message has {options['num_negatives']} others beside it; lower "
            "'num_negatives', install more programs, or name more folders in 'locale_dirs'"
        )
    (folder / "manifest.yaml").write_text(
        yaml.safe_dump({"sources": entries}, sort_keys=False, default_flow_style=None, width=119), encoding="utf-8"
    )
    chosen = _evenly(corpus, held_out, options["held_out_per_language"])
    english = [corpus.english[concept] for concept in corpus.concept[chosen].tolist()]
    write_parquet(folder / "held_out.parquet", [rows_table(_texts(corpus, chosen), english, **_origin(corpus, chosen))])
    candidates = [corpus.english[concept] for concept in np.unique(corpus.concept[held_out]).tolist()]
    write_parquet(folder / "candidates.parquet", [pa.table({"passage": pa.array(candidates, type=pa.string())})])
    return {
        **corpus.counts,
        "english_texts": len(corpus.english),
        "translations": len(corpus.texts),
        "languages": len({code for code, _ in corpus.languages}),
        "domains": len(corpus.domains),
        "held_out_domains": [corpus.domains[domain] for domain in np.flatnonzero(corpus.held_out_domains).tolist()],
        "training_rows": len(training),
        "rows": rows,
        "held_out": len(chosen),
        "candidates": len(candidates),
    }


Built = tuple[str, Iterator[pa.Table], list[str]]


def _translation(corpus: Corpus, rows: NDArray[np.intp], negatives: Negatives) -> Built:
    """A message to its English source; the negatives are English."""
    drawn = negatives.english(rows)
    rows, drawn = rows[drawn[:, 0] >= 0], drawn[drawn[:, 0] >= 0]

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            english = [corpus.english[concept] for concept in corpus.concept[part].tolist()]
            columns = [
                [corpus.english[concept] for concept in column.tolist()]
                for column in drawn[start : start + _ROWS_AT_ONCE].T
            ]
            yield rows_table(_texts(corpus, part), english, columns, **_origin(corpus, part))

    codes = {corpus.languages[language][0] for language in np.unique(corpus.language[rows]).tolist()}
    return "gettext_translation", tables(), sorted({*codes, "eng"} if codes else codes)


def _pairs(corpus: Corpus, pool: NDArray[np.intp], rows: NDArray[np.intp], negatives: Negatives) -> Built:
    """A message to the same message in another language, drawn from ``pool``; the negatives are in that language."""
    passages = _in_another_language(corpus, pool, rows)
    rows, passages = rows[passages >= 0], passages[passages >= 0]
    drawn = negatives.same_language(rows, passages)
    kept = drawn[:, 0] >= 0
    rows, passages, drawn = rows[kept], passages[kept], drawn[kept]

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part, others = (each[start : start + _ROWS_AT_ONCE] for each in (rows, passages))
            columns = [_texts(corpus, column) for column in drawn[start : start + _ROWS_AT_ONCE].T]
            yield rows_table(_texts(corpus, part), _texts(corpus, others), columns, **_origin(corpus, part))

    languages = np.unique(corpus.language[np.concatenate((rows, passages))])
    return "gettext_pairs", tables(), sorted({corpus.languages[language][0] for language in languages.tolist()})


def _in_another_language(corpus: Corpus, pool: NDArray[np.intp], rows: NDArray[np.intp]) -> NDArray[np.intp]:
    """``(rows,)`` rows of the same concepts in other languages and words, -1 where several draws find none."""
    ordered = pool[np.argsort(corpus.concept[pool], kind="stable")]
    start = np.searchsorted(corpus.concept[ordered], corpus.concept[rows])
    size = np.searchsorted(corpus.concept[ordered], corpus.concept[rows], side="right") - start
    draws = keyed_bits(for_purpose(corpus.key[rows], "passage")[:, None], np.arange(_PASSAGES_DRAWN))
    found = ordered[start[:, None] + (draws % size[:, None].astype(np.uint64)).astype(np.intp)]
    other = corpus.language[found] != corpus.language[rows][:, None]
    other &= corpus.text[found] != corpus.text[rows][:, None]
    first = np.take_along_axis(found, other.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(other.any(axis=1), first, -1)


def _evenly(corpus: Corpus, rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """At most so many rows of each language, in order: the first drawn of each domain, then the second, and so on.

    Programs differ in size by a factor of a thousand; a draw over all rows would be one of few programs.
    """
    language, domain, key = corpus.language[rows], corpus.domain[rows], corpus.key[rows]
    nth = _rank(np.lexsort((key, domain, language)), language * len(corpus.domains) + domain)
    return rows[_rank(np.lexsort((key, nth, language)), language) < most]


def _rank(order: NDArray[np.intp], groups: NDArray[np.intp]) -> NDArray[np.intp]:
    """The place of each row in its group, given an order in which groups lie together."""
    ordered = groups[order]
    new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    rank = np.empty(len(order), dtype=np.intp)
    rank[order] = np.arange(len(order)) - start
    return rank


def _texts(corpus: Corpus, rows: NDArray[np.intp]) -> list[str]:
    return [corpus.texts[row] for row in rows.tolist()]


def _origin(corpus: Corpus, rows: NDArray[np.intp]) -> dict[str, list[str]]:
    """Language, script and domain of rows."""
    languages = [corpus.languages[language] for language in corpus.language[rows].tolist()]
    return {
        "lang": [code for code, _ in languages],
        "script": [script for _, script in languages],
        "domain": [corpus.domains[domain] for domain in corpus.domain[rows].tolist()],
    }
