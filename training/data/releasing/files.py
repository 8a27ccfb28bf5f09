"""The files of a release: the rows of a source unchanged, in row groups that stream and files of a bounded size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import langcodes
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training.common.errors import UserError
from training.common.file_names import languages_in_name
from training.common.languages import SEVERAL
from training.data.manifest import Source
from training.data.parquet import ROW_GROUP_ROWS
from training.data.published import PublishedFile
from training.data.row_checks import find_faults, text_column

# A file is begun after another of this size: small enough to be fetched again when a download breaks off.
MAX_FILE_BYTES = 500_000_000
# Of a row group in memory: what a reader of a few rows has to fetch, before compression.
_ROW_GROUP_BYTES = 32 << 20
_LANGUAGE = "lang"


@dataclass(frozen=True)
class ReleasedSource:
    """What a release holds of one source.

    Attributes:
        source: As the manifest has it.
        files: Paths within the release, in reading order.
        columns: Names in order.
        negatives: Negative columns.
        rows: Rows of all files.
        faulty: Rows that preparation leaves out, such as those without a query.
        memory_bytes: Bytes of the rows as Arrow tables.
        file_bytes: Bytes of the files.
        languages: Rows by ISO 639-3 code; a pair of languages takes half each.
    """

    source: Source
    files: list[str]
    columns: list[str]
    negatives: int
    rows: int
    faulty: int
    memory_bytes: int
    file_bytes: int
    languages: Counter[str]


def copy_source(source: Source, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> ReleasedSource:
    """Writes the rows of a source, all columns and in order, as ``data/NAME.parquet`` or several files of that size.

    Some tens of megabytes of rows are in memory at a time, 2,500 rows if those are longer.

    Args:
        source: What to copy.
        folder: The release.
        max_file_bytes: Where a further file is begun; more than one are ``data/NAME/train-00000-of-00002.parquet``.

    Raises:
        UserError: If a file cannot be read, or the files of the source differ in their columns.
    """
    files = [PublishedFile(path) for path in source.files]
    parts = _Parts(folder / "data", source.name, _common_schema(source, files), max_file_bytes)
    rows = faulty = memory_bytes = 0
    tagged: Counter[str | None] = Counter()
    with parts:
        for batch in _batches(files, parts.schema):
            parts.write(batch)
            rows += len(batch)
            memory_bytes += batch.nbytes
            faulty += len({fault.row for fault in find_faults(batch, files[0].negatives, 0)})
            tagged.update(_tags(batch))
    paths = parts.publish()
    return ReleasedSource(
        source=source,
        files=[path.relative_to(folder).as_posix() for path in paths],
        columns=parts.schema.names,
        negatives=len(files[0].negatives),
        rows=rows,
        faulty=faulty,
        memory_bytes=memory_bytes,
        file_bytes=sum(path.stat().st_size for path in paths),
        languages=_languages(source, tagged),
    )


def _common_schema(source: Source, files: Sequence[PublishedFile]) -> pa.Schema:
    """The columns of all files of a source, as the first one orders them."""
    first = files[0].schema
    for file in files[1:]:
        if set(file.schema.names) != set(first.names):
            different = sorted(set(file.schema.names) ^ set(first.names))
            raise UserError(
                f"source {source.name!r}: {file.path} and {files[0].path} differ in {', '.join(different)}; files of "
                "one configuration need the same columns: make each a source of its own (`each_file: true`)"
            )
    try:
        unified = pa.unify_schemas([file.schema for file in files], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"source {source.name!r}: its files hold columns of different types ({error}); convert them, or make each "
            "a source of its own (`each_file: true`)"
        ) from None
    return pa.schema([unified.field(name) for name in first.names], metadata=first.metadata)


def _batches(files: Sequence[PublishedFile], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for file in files:
        # A part of a row group, so that groups come near to their full size.
        for batch in file.record_batches(min(file.batch_rows, ROW_GROUP_ROWS // 4), all_columns=True):
            batch = batch.select(schema.names).cast(schema)
            # A file that stores a long text once may hold it in every row.
            rows = max(1, len(batch) * _ROW_GROUP_BYTES // max(batch.nbytes, _ROW_GROUP_BYTES))
            yield from (batch.slice(start, rows) for start in range(0, len(batch), rows))


def _tags(batch: pa.RecordBatch) -> Counter[str | None]:
    """Rows by what the language column says; all under None if there is none."""
    if _LANGUAGE not in batch.schema.names:
        return Counter({None: len(batch)})
    try:
        column = text_column(batch, _LANGUAGE)
    except pa.ArrowException:
        # Something else by that name: no codes.
        return Counter({None: len(batch)})
    return Counter({each["values"]: each["counts"] for each in pc.value_counts(column).to_pylist()})


def _languages(source: Source, tagged: Counter[str | None]) -> Counter[str]:
    """Rows by ISO 639-3 code: by the pair that the name tells, else by row, else as the manifest says."""
    pair = languages_in_name(source.name, source.languages)
    counts: Counter[str] = Counter()
    for tag, rows in tagged.items():
        # The manifest knows codes that are too new for the tables of codes.
        code = tag if tag in source.languages else _code(tag)
        if len(pair) == 2:
            counts.update({pair[0]: rows - rows // 2, pair[1]: rows // 2})
        elif code is not None:
            counts[code] += rows
        else:
            counts[source.languages[0] if len(source.languages) == 1 else SEVERAL] += rows
    return counts


def _code(tag: str | None) -> str | None:
    if tag is None or not langcodes.tag_is_valid(tag):
        return None
    try:
        # As it is written: normalised, Tagalog is Filipino.
        return langcodes.Language.get(tag, normalize=False).to_alpha3()
    except LookupError:
        return None


class _Parts:
    """Files written one after the other, named once their number is known.

    Args:
        folder: Where they go; it is made.
        name: Of the source.
        schema: Of every batch.
        max_file_bytes: Where a further file is begun.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, max_file_bytes: int) -> None:
        self.schema = schema
        self._folder, self._name, self._max_file_bytes = folder, name, max_file_bytes
        self._waiting: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0
        self._written: list[Path] = []
        self._sink: pa.NativeFile | None = None
        self._writer: pq.ParquetWriter | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows, which are written once a row group is full."""
        if self._rows + len(batch) > ROW_GROUP_ROWS or self._bytes + batch.nbytes > _ROW_GROUP_BYTES:
            self._flush()
        self._waiting.append(batch)
        self._rows += len(batch)
        self._bytes += batch.nbytes

    def publish(self) -> list[Path]:
        """Gives the files their names and returns these."""
        if len(self._written) == 1:
            return [self._written[0].rename(self._folder / f"{self._name}.parquet")]
        (self._folder / self._name).mkdir()
        count = len(self._written)
        names = [f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]
        return [path.rename(self._folder / self._name / name) for path, name in zip(self._written, names, strict=True)]

    def _flush(self) -> None:
        """Writes what waits as a row group."""
        if not self._waiting:
            return
        if self._sink is not None and self._sink.tell() >= self._max_file_bytes:
            self._close()
        if self._writer is None:
            self._open()
        self._writer.write_table(pa.Table.from_batches(self._waiting, self.schema), row_group_size=ROW_GROUP_ROWS)
        self._waiting, self._rows, self._bytes = [], 0, 0

    def _open(self) -> None:
        path = self._folder / f".{self._name}.{len(self._written):05d}.partial"
        self._written.append(path)
        self._sink = pa.OSFile(str(path), "wb")
        # Pages cut by content: of a later release, stores that deduplicate take up only what changed.
        self._writer = pq.ParquetWriter(
            self._sink,
            self.schema,
            compression="zstd",
            write_page_checksum=True,
            write_page_index=True,
            use_content_defined_chunking=True,
        )

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._sink is not None:
            self._sink.close()
        self._writer = self._sink = None
