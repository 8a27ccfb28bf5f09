"""Dataset releases: the rows of a manifest's sources as parquet files that stream, with a card for the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hub_cards.render import render_dataset_card
from training.common.errors import UserError, in_one_line
from training.common.hub import Content
from training.common.languages import SEVERAL, iso639_3_as_written, languages_in_name
from training.common.outputs import check_output, locked, new_folder
from training.data.manifest import (
    MANIFEST,
    Source,
    load_manifest,
    read_manifest,
    select_sources,
    write_manifest,
)
from training.data.published import ROW_GROUP_ROWS, PublishedFile, find_faults, text_column
from training.data.releasing.card import (
    ReleasedSource,
    card_facts,
    contamination_facts,
    language_rows,
    plot_languages,
    provenance_rows,
    read_json,
)
from training.data.storage import identity

logger = logging.getLogger("training")

CARD, RECORD = "README.md", "release.json"
# A source's next file starts at this size: small enough to be fetched again when a download breaks off.
MAX_FILE_BYTES = 500_000_000
# What commands that made the data wrote beside its manifest.
_RECORDS = ("build.json", "mining.json")
# Size of a row group in memory: what a reader of a few rows has to fetch, before compression.
_ROW_GROUP_BYTES = 32 << 20
_LANGUAGE = "lang"
# Increase it when the same data gives another release than before.
_FORMAT = 4


def release(
    manifest: Path | str,
    output: Path | str,
    *,
    data_dir: Path | str | None = None,  # of the files, instead of the manifest's
    sources: Sequence[str] | None = None,  # names or patterns; all if None
    name: str | None = None,  # title of the card; the name of the folder if None
    repository: str | None = None,  # in the card's examples; the name of the folder if None
    licence: str | None = None,  # of the release as a whole; those of the sources if None
    contamination: Path | str | None = None,  # contamination.json of this data; if None, the card says "not checked"
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a folder that ``datasets.load_dataset`` and the Hub read, and return it; it is complete or absent.

    It holds ``data/`` (the rows of each source, unchanged), ``README.md`` (the card), ``languages.svg`` and ``.png``,
    ``manifest.yaml`` (for training) and ``release.json`` (the card's numbers, and hashes of inputs and outputs). The
    same inputs give the same bytes; a folder with the same release is not touched. The card takes the provenance from
    ``build.json`` and ``mining.json`` beside the manifest.
    """
    manifest, output = read_manifest(manifest, data_dir), Path(output).absolute()
    chosen = select_sources(load_manifest(manifest.path, data_dir), sources)
    for source in chosen:
        if not re.fullmatch(r"[^\W_][\w.+ -]*", source.name):
            what = f"{manifest.path}: source {source.name!r} cannot be a configuration"
            raise UserError(f"{what}; use letters, digits and _ . + -")
    files = [file for source in chosen for file in source.files if isinstance(file, Path)]
    reports = [Path(contamination)] if contamination else []
    check_output(output, [manifest.path, *files, *reports])
    beside = [manifest.path.parent / record for record in _RECORDS]
    records = {path: read_json(path) for path in beside if path.is_file()}
    report = read_json(reports[0]) if reports else None
    name, repository = name or output.name, repository or output.name
    described = [{**asdict(source), "files": [identity(file) for file in source.files]} for source in chosen]
    inputs = [_FORMAT, name, repository, licence, max_file_bytes, described, list(records.values()), report]
    made_of = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    with locked(output):
        if _is_released(output, made_of):
            logger.info("%s: holds this release already", output)
            return output
        opened = {source.name: [PublishedFile(file) for file in source.files] for source in chosen}
        rows = {source: sum(file.num_rows for file in files) for source, files in opened.items()}
        facts = {
            "repository": repository,
            "origin": str(manifest.folder) if "://" in str(manifest.folder) else None,
            "provenance": provenance_rows(records, list(rows)),
            "contamination": contamination_facts(reports[0], report, rows) if reports else None,
        }
        with new_folder(output) as partial:
            (partial / "data").mkdir()
            released = [_copy_source(source, opened[source.name], partial, max_file_bytes) for source in chosen]
            facts |= card_facts(released, name, licence)
            (partial / CARD).write_text(render_dataset_card(facts), encoding="utf-8")
            plot_languages(language_rows(released), partial, name)
            entries = [{**asdict(each.source), "files": each.files, "published_rows": each.rows} for each in released]
            write_manifest(partial / MANIFEST, entries, stage_caps=manifest.stage_caps)
            _write_record(partial, name, released, made_of)
    logger.info("%s: %d sources, %d rows", output, len(released), sum(each.rows for each in released))
    return output


def _is_released(output: Path, made_of: str) -> bool:
    """Return whether the folder holds this release, or False if it is empty; refuse any other content."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if output.is_dir() and (output / RECORD).is_file() and read_json(output / RECORD).get("made_of") == made_of:
        return True
    raise UserError(f"{output}: exists and is not this release; remove it or give another --output")


def _write_record(folder: Path, name: str, released: Sequence[ReleasedSource], made_of: str) -> None:
    """Write the record last: it alone says that the folder holds a release."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): Content(path) for path in paths}
    record = {
        "name": name,
        "made_of": made_of,
        "rows": sum(each.rows for each in released),
        "languages": dict(sorted(language_rows(released).items())),
        "sources": {
            each.source.name: {
                "rows": each.rows,
                "faulty": each.faulty,
                "languages": dict(sorted(each.languages.items())),
            }
            for each in released
        },
        "files": {path: content.size for path, content in files.items()},
        "sha256": {path: content.sha256 for path, content in files.items()},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Rows


def _copy_source(source: Source, files: Sequence[PublishedFile], folder: Path, max_file_bytes: int) -> ReleasedSource:
    """Write all rows and columns of a source as ``data/NAME.parquet``, or as several files ``data/NAME/train-…``."""
    schema, written = _common_schema(source, files), []
    groups = _row_groups(files, schema)
    for group in groups:
        written.append(folder / "data" / f".{source.name}.{len(written):05d}.partial")
        # The pages of a later release that did not change are stored only once on the Hub.
        options = {"write_page_checksum": True, "write_page_index": True, "use_content_defined_chunking": True}
        with (
            pa.OSFile(str(written[-1]), "wb") as sink,
            pq.ParquetWriter(sink, schema, compression="zstd", **options) as writer,
        ):
            writer.write_table(group)
            while sink.tell() < max_file_bytes and (following := next(groups, None)) is not None:
                writer.write_table(following)
    names = [f"data/{source.name}.parquet"]
    if len(written) > 1:
        (folder / "data" / source.name).mkdir()
        count = len(written)
        names = [f"data/{source.name}/train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
    paths = [path.rename(folder / name) for path, name in zip(written, names, strict=True)]
    tags: Counter[str | None] = Counter()
    faulty = 0
    for path in paths:
        for batch in PublishedFile(path).record_batches(all_columns=True):
            faulty += len({fault.row for fault in find_faults(batch, files[0].negatives, 0)})
            tags.update(_tags(batch))
    logger.info("%s: %d rows", source.name, tags.total())
    if faulty:
        logger.warning("%s: %d rows that preparation will leave out", source.name, faulty)
    return ReleasedSource(
        source=source,
        files=names,
        columns=schema.names,
        negatives=len(files[0].negatives),
        rows=tags.total(),
        faulty=faulty,
        file_bytes=sum(path.stat().st_size for path in paths),
        languages=_languages(source, tags),
    )


def _tags(batch: pa.RecordBatch) -> list[str | None]:
    """Return the language of each row as the file says it."""
    told = _LANGUAGE in batch.schema.names and not pa.types.is_nested(batch.schema.field(_LANGUAGE).type)
    return text_column(batch, _LANGUAGE).to_pylist() if told else [None] * len(batch)


def _common_schema(source: Source, files: Sequence[PublishedFile]) -> pa.Schema:
    """Return the columns of all files of a source, in the order of the first file."""
    names = [set(file.schema.names) for file in files]
    different = sorted(set.union(*names) - set.intersection(*names))
    try:
        unified = pa.unify_schemas([file.schema for file in files], promote_options="permissive")
    except pa.ArrowException as error:
        different = [in_one_line(error)]
    if different:
        what = f"source {source.name!r}: its files differ in {', '.join(different)}"
        raise UserError(f"{what}; give them the same columns, or make each file a source (`each_file: true`)")
    first = files[0].schema
    return pa.schema([unified.field(name) for name in first.names], metadata=first.metadata)


def _row_groups(files: Sequence[PublishedFile], schema: pa.Schema) -> Iterator[pa.Table]:
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for file in files:
        # Parts of a row group, so that groups come near to their full size.
        for batch in file.record_batches(min(file.batch_rows, ROW_GROUP_ROWS // 4), all_columns=True):
            batch = batch.select(schema.names).cast(schema)
            # A file that stores a long text once may have it in every row.
            step = max(1, len(batch) * _ROW_GROUP_BYTES // max(batch.nbytes, _ROW_GROUP_BYTES))
            for part in (batch.slice(start, step) for start in range(0, len(batch), step)):
                if group and (rows + len(part) > ROW_GROUP_ROWS or size + part.nbytes > _ROW_GROUP_BYTES):
                    yield pa.Table.from_batches(group, schema)
                    group, rows, size = [], 0, 0
                group.append(part)
                rows, size = rows + len(part), size + part.nbytes
    if group:
        yield pa.Table.from_batches(group, schema)


def _languages(source: Source, tags: Counter[str | None]) -> Counter[str]:
    """Return rows by ISO 639-3 code: of the pair in the source's name, else of each row, else of the manifest."""
    pair = languages_in_name(source.name, source.languages)
    counts: Counter[str] = Counter()
    for tag, rows in tags.items():
        # The manifest may have codes that are too new for the tables of codes.
        code = tag if tag is None or tag in source.languages else iso639_3_as_written(tag)
        if len(pair) == 2:
            counts.update({pair[0]: rows - rows // 2, pair[1]: rows // 2})
        elif code is not None:
            counts[code] += rows
        else:
            counts[source.languages[0] if len(source.languages) == 1 else SEVERAL] += rows
    return counts
