"""Dataset releases: the rows of a manifest's sources as parquet files that stream, with a card for the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from hub_cards.render import render_dataset_card
from training.common.errors import UserError
from training.common.hub import Content
from training.common.languages import SEVERAL, iso639_3_as_written, languages_in_name
from training.common.outputs import check_output, locked, new_folder
from training.data.manifest import Manifest, Source, find_entry_files, load_manifest, read_manifest, select_sources
from training.data.published import ROW_GROUP_ROWS, PublishedFile, find_faults, text_column
from training.data.releasing.card import (
    ReleasedSource,
    card_facts,
    contamination_facts,
    language_rows,
    plot_languages,
    provenance_rows,
    read_contamination,
    read_records,
)
from training.data.storage import identity

logger = logging.getLogger("training")

CARD, MANIFEST, RECORD = "README.md", "manifest.yaml", "release.json"
# A source's next file starts at this size: small enough to be fetched again when a download breaks off.
MAX_FILE_BYTES = 500_000_000
# Size of a row group in memory: what a reader of a few rows has to fetch, before compression.
_ROW_GROUP_BYTES = 32 << 20
_LANGUAGE = "lang"
# Increase it when the same data gives another release than before.
_FORMAT = 3


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
    if max_file_bytes < 1:
        raise UserError(f"the size of a file must be at least 1 MB, got {max_file_bytes} bytes")
    chosen = select_sources(load_manifest(manifest.path, data_dir), sources)
    for source in chosen:
        if not re.fullmatch(r"[^\W_][\w.+ -]*", source.name):
            raise UserError(
                f"{manifest.path}: source {source.name!r} cannot be a configuration; use letters, digits and _ . + -"
            )
    files = [file for source in chosen for file in source.files if isinstance(file, Path)]
    check_output(output, [manifest.path, *files, *([] if contamination is None else [Path(contamination)])])
    report = None if contamination is None else read_contamination(Path(contamination))
    records = read_records(manifest.path.parent)
    options = {
        "name": name or output.name,
        "repository": repository or output.name,
        "licence": licence,
        "max_file_bytes": max_file_bytes,
    }
    entries = _entries(manifest, chosen)
    inputs = {
        "format": _FORMAT,
        "options": options,
        "sources": [entries, [[identity(file) for file in source.files] for source in chosen]],
        "records": records,
        "contamination": report,
    }
    made_of = {key: _hash(value) for key, value in inputs.items()}
    if _is_released(output, made_of):
        logger.info("%s: holds this release already", output)
        return output
    with locked(output):
        # Another command may have made it meanwhile.
        if _is_released(output, made_of):
            return output
        with new_folder(output) as partial:
            released = [_copy_source(source, partial, max_file_bytes) for source in chosen]
            facts = card_facts(
                released,
                name=options["name"],
                repository=options["repository"],
                licence=licence,
                origin=str(manifest.folder) if "://" in str(manifest.folder) else None,
                provenance=provenance_rows(records, [source.name for source in chosen]),
                contamination=None if report is None else contamination_facts(report, released),
            )
            (partial / CARD).write_text(render_dataset_card(facts), encoding="utf-8")
            plot_languages(language_rows(released), partial, options["name"])
            (partial / MANIFEST).write_text(_manifest(manifest, released, entries), encoding="utf-8")
            _write_record(partial, options["name"], released, made_of)
    logger.info("%s: %d sources, %d rows", output, len(released), sum(each.rows for each in released))
    return output


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_released(output: Path, made_of: Mapping[str, str]) -> bool:
    """Return whether the folder holds this release, or False if it is empty; refuse any other content."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        found, hashes = dict(record["made_of"]), dict(record.get("sha256") or {})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output}: exists and is no release; give another --output") from None
    changed = [key for key, value in made_of.items() if found.get(key) != value]
    if changed:
        raise UserError(f"{output}: holds a release of other {', '.join(changed)}; remove it or give another --output")
    for path, digest in hashes.items():
        if not (output / path).is_file() or Content(output / path).sha256 != digest:
            raise UserError(f"{output / path}: is missing or was changed since its release; remove {output} to go on")
    return True


def _entries(manifest: Manifest, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the sources as entries of a manifest; a source of a collection has the collection's stages."""
    by_source = {}
    for entry in manifest.entries:
        names = [entry.name]
        if entry.each_file:
            names = [file.stem for files in find_entry_files(manifest, entry).values() for file in files]
        by_source |= dict.fromkeys(names, entry)
    return [
        {**asdict(source), "files": [], "stages": entry.stages, "instruction_from": entry.instruction_from}
        for source, entry in ((source, by_source[source.name]) for source in sources)
    ]


def _manifest(manifest: Manifest, released: Sequence[ReleasedSource], entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the manifest of the release, whose published rows are those of its files."""
    caps = {cap: rows for cap, rows in manifest.stage_caps.items() if any(cap in entry["stages"] for entry in entries)}
    content: dict[str, Any] = {"stage_caps": caps} if caps else {}
    content["sources"] = []
    for each, entry in zip(released, entries, strict=True):
        # The manifest takes patterns.
        written = {**entry, "files": [escape(file) for file in each.files], "published_rows": each.rows}
        content["sources"].append({key: value for key, value in written.items() if value is not None and value != []})
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=119)


def _write_record(folder: Path, name: str, released: Sequence[ReleasedSource], made_of: Mapping[str, str]) -> None:
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


def _copy_source(source: Source, folder: Path, max_file_bytes: int) -> ReleasedSource:
    """Write all rows and columns of a source as ``data/NAME.parquet``, or as several files ``data/NAME/train-…``."""
    files = [PublishedFile(path) for path in source.files]
    negatives, schema = files[0].negatives, _common_schema(source, files)
    rows = faulty = memory_bytes = 0
    tags: Counter[str | None] = Counter()

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows, faulty, memory_bytes
        for batch in _batches(files, schema):
            rows += len(batch)
            memory_bytes += batch.nbytes
            faulty += len({fault.row for fault in find_faults(batch, negatives, 0)})
            tags.update(_language_tags(batch))
            yield batch

    paths = _write_files(_row_groups(counted()), schema, folder / "data", source.name, max_file_bytes)
    logger.info("%s: %d rows", source.name, rows)
    if faulty:
        logger.warning("%s: %d rows that preparation will leave out", source.name, faulty)
    return ReleasedSource(
        source=source,
        files=[path.relative_to(folder).as_posix() for path in paths],
        columns=schema.names,
        negatives=len(negatives),
        rows=rows,
        faulty=faulty,
        memory_bytes=memory_bytes,
        file_bytes=sum(path.stat().st_size for path in paths),
        languages=_languages(source, tags),
    )


def _common_schema(source: Source, files: Sequence[PublishedFile]) -> pa.Schema:
    """Return the columns of all files of a source, in the order of the first file."""
    first = files[0].schema
    for file in files[1:]:
        different = sorted({*file.schema.names} ^ {*first.names})
        if different:
            raise UserError(
                f"source {source.name!r}: {file.path} and {files[0].path} differ in {', '.join(different)}; files of "
                "one configuration need the same columns: make each file a source (`each_file: true`)"
            )
    try:
        unified = pa.unify_schemas([file.schema for file in files], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"source {source.name!r}: its files hold columns of different types ({error}); convert them, or make each "
            "file a source (`each_file: true`)"
        ) from None
    return pa.schema([unified.field(name) for name in first.names], metadata=first.metadata)


def _batches(files: Sequence[PublishedFile], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for file in files:
        # Parts of a row group, so that groups come near to their full size.
        for batch in file.record_batches(min(file.batch_rows, ROW_GROUP_ROWS // 4), all_columns=True):
            batch = batch.select(schema.names).cast(schema)
            # A file that stores a long text once may have it in every row.
            rows = max(1, len(batch) * _ROW_GROUP_BYTES // max(batch.nbytes, _ROW_GROUP_BYTES))
            yield from (batch.slice(start, rows) for start in range(0, len(batch), rows))


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if group and (rows + len(batch) > ROW_GROUP_ROWS or size + batch.nbytes > _ROW_GROUP_BYTES):
            yield group
            group, rows, size = [], 0, 0
        group.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
    if group:
        yield group


def _write_files(
    groups: Iterable[list[pa.RecordBatch]], schema: pa.Schema, folder: Path, name: str, max_file_bytes: int
) -> list[Path]:
    """Write row groups to files of bounded size, and return these, named now that their number is known."""
    folder.mkdir(exist_ok=True)
    written: list[Path] = []
    sink = None
    with ExitStack() as open_file:
        for group in groups:
            if sink is None or sink.tell() >= max_file_bytes:
                open_file.close()
                written.append(folder / f".{name}.{len(written):05d}.partial")
                sink = open_file.enter_context(pa.OSFile(str(written[-1]), "wb"))
                writer = open_file.enter_context(
                    pq.ParquetWriter(
                        sink,
                        schema,
                        compression="zstd",
                        write_page_checksum=True,
                        write_page_index=True,
                        # The pages of a later release that did not change are stored only once on the Hub.
                        use_content_defined_chunking=True,
                    )
                )
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=ROW_GROUP_ROWS)
    if len(written) == 1:
        return [written[0].rename(folder / f"{name}.parquet")]
    (folder / name).mkdir()
    names = [f"train-{number:05d}-of-{len(written):05d}.parquet" for number in range(len(written))]
    return [path.rename(folder / name / new) for path, new in zip(written, names, strict=True)]


def _language_tags(batch: pa.RecordBatch) -> Counter[str | None]:
    """Return rows by the value of the language column; all under None if there is no such column of text."""
    if _LANGUAGE not in batch.schema.names:
        return Counter({None: len(batch)})
    try:
        column = text_column(batch, _LANGUAGE)
    except pa.ArrowException:
        return Counter({None: len(batch)})
    return Counter({each["values"]: each["counts"] for each in pc.value_counts(column).to_pylist()})


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
