"""The offline default data: names from Unicode CLDR in the published format, with names held out for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import babel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from training.common.errors import UserError
from training.data.build_folder import build_folder
from training.data.cldr import classes, relations, translation
from training.data.cldr.names import CldrNames, read_names
from training.data.cldr.source import Source

LICENCE = "Unicode-3.0"
MANIFEST = "manifest.yaml"
# Raise it when the same options would build other data than before.
_FORMAT = 2
_ROW_GROUP_ROWS = 10_000


def build_cldr(
    output_dir: Path | str,
    *,
    seed: int = 0,
    held_out_share: float = 0.1,
    num_negatives: int = 24,
    languages: Sequence[str] | None = None,
) -> Path:
    """Builds the training sources, the manifest and the held-out names from the CLDR data in ``babel``.

    The folder appears whole or not at all. It holds ``manifest.yaml``, one parquet file a source (sorted by language),
    ``held_out.parquet`` (query, passage, lang, script, kind), ``candidates.parquet`` (passage: every distinct English
    name) and ``build.json``. No held-out text occurs in any source.

    Args:
        output_dir: The folder to write. If it already holds the same build, nothing is done.
        seed: The seed of every draw.
        held_out_share: The share of names to propose for holding out, in [0, 1); those whose text stays in training
            under another concept or language are not held out, so the share that results is smaller.
        num_negatives: Negatives a row of the retrieval and clustering sources; classification has one.
        languages: CLDR identifiers of the languages to build besides English, or None for all with enough names.

    Returns:
        ``output_dir``.

    Raises:
        UserError: An option is out of range, a language is unknown, or ``output_dir`` holds anything but the same
            build; nothing in it is touched.

    Example:
        >>> folder = build_cldr("data/cldr", languages=["de", "sw"])  # doctest: +SKIP
    """
    output_dir = Path(output_dir)
    if not 0 <= held_out_share < 1:
        raise UserError(f"held_out_share is {held_out_share}; it must be at least 0 and below 1")
    if num_negatives < 1:
        raise UserError(f"num_negatives is {num_negatives}; it must be at least 1")
    options = {
        "format": _FORMAT,
        "babel": babel.__version__,
        "seed": seed,
        "held_out_share": held_out_share,
        "num_negatives": num_negatives,
        "languages": None if languages is None else sorted(set(languages)),
    }
    return build_folder(output_dir, "CLDR", options, lambda folder: _write_build(folder, options, languages))


def build_sources(names: CldrNames, rows: NDArray[np.intp], num_negatives: int) -> Iterator[Source]:
    """Builds every source from the given rows of the names, one after the other to hold no more than one in memory.

    Args:
        names: All names.
        rows: The rows that may appear in training.
        num_negatives: Negatives a row of the retrieval and clustering sources.

    Yields:
        The sources, in the order of the manifest.
    """
    yield translation.translation(names, rows, num_negatives)
    yield translation.translation_pairs(names, rows, num_negatives)
    yield relations.territory_currency(names, rows, num_negatives)
    yield relations.territory_language(names, rows, num_negatives)
    yield classes.kind(names, rows, num_negatives)
    yield classes.same_language(names, rows, num_negatives)
    yield classes.is_territory(names, rows)


def _write_build(folder: Path, options: dict[str, Any], languages: Sequence[str] | None) -> dict[str, Any]:
    """Writes every file of the build into an empty folder, and returns its counts."""
    names = read_names(int(options["seed"]), languages)
    held_out = names.held_out(float(options["held_out_share"]))
    entries, rows, dropped = [], {}, {}
    for source in build_sources(names, np.flatnonzero(~held_out), int(options["num_negatives"])):
        file_name = f"{source.name}.parquet"
        _write_parquet(source.table, folder / file_name)
        rows[source.name], dropped[source.name] = source.table.num_rows, source.dropped
        entries.append(
            {
                "name": source.name,
                "files": [file_name],
                "task_type": source.task_type,
                "symmetric": source.symmetric,
                "instruction": source.instruction,
                "languages": list(source.languages),
                "licence": LICENCE,
            }
        )
    (folder / MANIFEST).write_text(
        yaml.safe_dump({"sources": entries}, sort_keys=False, default_flow_style=None, width=119), encoding="utf-8"
    )
    _write_parquet(_held_out_table(names, np.flatnonzero(held_out)), folder / "held_out.parquet")
    candidates = dict.fromkeys(names.texts[row] for row in names.english.tolist())
    _write_parquet(pa.table({"passage": pa.array(candidates, type=pa.string())}), folder / "candidates.parquet")
    return {
        "names": len(names.texts),
        "languages": len(names.languages),
        "held_out": int(held_out.sum()),
        "rows": rows,
        "dropped": dropped,
    }


def _held_out_table(names: CldrNames, rows: NDArray[np.intp]) -> pa.Table:
    """Returns the held-out names with their English name, language, script and kind."""
    concept, language = names.concept[rows].tolist(), names.language[rows].tolist()
    columns = {
        "query": [names.texts[row] for row in rows.tolist()],
        "passage": [names.texts[row] for row in names.english[concept].tolist()],
        "lang": [names.codes[position] for position in language],
        "script": [names.scripts[position] for position in language],
        "kind": [names.concepts[position][0] for position in concept],
    }
    return pa.table({name: pa.array(values, type=pa.string()) for name, values in columns.items()})


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP_ROWS)
