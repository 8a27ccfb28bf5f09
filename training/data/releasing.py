"""Dataset releases: the rows of a manifest's sources as parquet files that stream, with a card for the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from hub_cards.hub_terms import SPECIAL_LANGUAGES, hub_languages, licence_metadata
from hub_cards.metadata import header
from hub_cards.render import render_dataset_card
from training.common.errors import UserError, in_one_line
from training.common.hub import Content
from training.common.languages import SEVERAL, iso639_3_as_written, language_name, languages_in_name
from training.common.outputs import check_output, locked, new_folder
from training.data.cleaning.decontamination import COUNTS
from training.data.manifest import (
    MANIFEST,
    TASK_TYPES,
    Source,
    load_manifest,
    read_manifest,
    select_sources,
    write_manifest,
)
from training.data.published import ROW_GROUP_ROWS, PublishedFile, find_faults, text_column
from training.data.storage import identity
from training.data.survey import divided

logger = logging.getLogger("training")

CARD, RECORD = "README.md", "release.json"
# A source's next file starts at this size: small enough to be fetched again when a download breaks off.
MAX_FILE_BYTES = 500_000_000
# What commands that made the data wrote beside its manifest.
_RECORDS = ("build.json", "mining.json")
# Increase it when the same data gives another release than before.
_FORMAT = 4
_TASK_CATEGORIES = {"retrieval": "text-retrieval", "similarity": "sentence-similarity"} | dict.fromkeys(
    TASK_TYPES[1:3], "text-classification"
)
_SIZES = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
# Columns of the published format, which the card describes.
_FORMAT_COLUMN = re.compile(r"query|passage|lang|(negative|positive)_\d+")
# Bars of the plot.
_SHOWN = 40
_NO_LANGUAGE = {SEVERAL: "several languages", "zxx": "programming languages"}


@dataclass(frozen=True)
class ReleasedSource:
    """A source in a release."""

    source: Source
    files: list[str]  # paths within the release, in reading order
    columns: list[str]
    negatives: int  # negative columns
    rows: int
    faulty: int  # rows that preparation leaves out, such as those without a query
    file_bytes: int
    languages: Counter[str]  # rows by ISO 639-3 code; each language of a pair gets half of them


def language_rows(released: Sequence[ReleasedSource]) -> Counter[str]:
    """Return the rows of a release by ISO 639-3 code."""
    return sum((each.languages for each in released), Counter())


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
    ``manifest.yaml`` (for training) and ``release.json`` (the card's numbers, and hashes of inputs and outputs). A
    folder with the same release is not touched.
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
    records = {path: read_json(path) for name in _RECORDS if (path := manifest.path.parent / name).is_file()}
    report = read_json(reports[0]) if reports else None
    name, repository = name or output.name, repository or output.name
    described = [{**asdict(source), "files": [identity(file) for file in source.files]} for source in chosen]
    inputs = [_FORMAT, name, repository, licence, max_file_bytes, described, list(records.values()), report]
    made_of = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    with locked(output):
        if _is_released(output, made_of):
            logger.info("%s: holds this release already", output)
            return output
        opened = {each.name: [PublishedFile(file, 0, each.task_type) for file in each.files] for each in chosen}
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
    files = {path.relative_to(folder).as_posix(): Content(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    sources = {}
    for each in released:
        languages = dict(sorted(each.languages.items()))
        sources[each.source.name] = {"rows": each.rows, "faulty": each.faulty, "languages": languages}
    record = {
        "name": name,
        "made_of": made_of,
        "rows": sum(each.rows for each in released),
        "languages": dict(sorted(language_rows(released).items())),
        "sources": sources,
        "files": {path: content.size for path, content in files.items()},
        "sha256": {path: content.sha256 for path, content in files.items()},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Rows


def _copy_source(source: Source, files: Sequence[PublishedFile], folder: Path, max_file_bytes: int) -> ReleasedSource:
    """Write all rows and columns of a source as ``data/NAME.parquet``, or as several files ``data/NAME/train-…``."""
    schema, written = _common_schema(source, files), []
    # Batches of some megabytes become row groups: what a reader of a few rows has to fetch.
    batches = (batch for file in files for batch in file.record_batches(ROW_GROUP_ROWS, all_columns=True))
    groups = (batch.select(schema.names).cast(schema) for batch in batches)
    for group in groups:
        written.append(folder / "data" / f".{source.name}.{len(written):05d}.partial")
        # The pages of a later release that did not change are stored only once on the Hub.
        options = {"write_page_checksum": True, "write_page_index": True, "use_content_defined_chunking": True}
        with (
            pa.OSFile(str(written[-1]), "wb") as sink,
            pq.ParquetWriter(sink, schema, compression="zstd", **options) as writer,
        ):
            writer.write_batch(group)
            while sink.tell() < max_file_bytes and (following := next(groups, None)) is not None:
                writer.write_batch(following)
    names = [f"data/{source.name}.parquet"]
    if len(written) > 1:
        (folder / "data" / source.name).mkdir()
        names = [f"data/{source.name}/train-{part:05d}-of-{len(written):05d}.parquet" for part in range(len(written))]
    paths = [path.rename(folder / name) for path, name in zip(written, names, strict=True)]
    tags, faulty = Counter(), 0
    tagged = "lang" in schema.names and not pa.types.is_nested(schema.field("lang").type)
    for path in paths:
        for batch in PublishedFile(path).record_batches(all_columns=True):
            faulty += len({fault.row for fault in find_faults(batch, 0, source.task_type)})
            tags.update(text_column(batch, "lang").to_pylist() if tagged else [None] * len(batch))
    logger.info("%s: %d rows", source.name, tags.total())
    if faulty:
        logger.warning("%s: %d rows that preparation will leave out", source.name, faulty)
    size = sum(path.stat().st_size for path in paths)
    columns, negatives = schema.names, len(files[0].negatives)
    return ReleasedSource(source, names, columns, negatives, tags.total(), faulty, size, _languages(source, tags))


def _common_schema(source: Source, files: Sequence[PublishedFile]) -> pa.Schema:
    """Return the columns of all files of a source, in the order of the first file."""
    first, *others = [file.schema for file in files]
    different = sorted({name for schema in others for name in {*first.names} ^ {*schema.names}})
    try:
        unified = pa.unify_schemas([first, *others], promote_options="permissive")
    except pa.ArrowException as error:
        different = [in_one_line(error)]
    if different:
        what = f"source {source.name!r}: its files differ in {', '.join(different)}"
        raise UserError(f"{what}; give them the same columns, or make each file a source (`each_file: true`)")
    return pa.schema([unified.field(name) for name in first.names], metadata=first.metadata)


def _languages(source: Source, tags: Counter[str | None]) -> Counter[str]:
    """Return rows by ISO 639-3 code: of the pair in the source's name, else of each row, else of the manifest."""
    pair, counts = languages_in_name(source.name, source.languages), Counter()
    if len(pair) == 2:
        return divided(tags.total(), pair, pair=True)
    for tag, rows in tags.items():
        # The manifest may have codes that are too new for the tables of codes.
        code = tag if tag is None or tag in source.languages else iso639_3_as_written(tag)
        counts += Counter({code: rows}) if code is not None else divided(rows, source.languages, pair=False)
    return counts


# The facts of the card


def card_facts(released: Sequence[ReleasedSource], name: str, licence: str | None) -> dict[str, Any]:
    """Return what the template of the card says of the files; ``licence`` is that of the release as a whole."""
    rows, languages = sum(each.rows for each in released), language_rows(released)
    columns = {column for each in released for column in each.columns if not _FORMAT_COLUMN.fullmatch(column)}
    size = sum(each.file_bytes for each in released)
    exponent, unit = next((each for each in ((9, "GB"), (6, "MB")) if size >= 10 ** each[0]), (3, "KB"))
    return {
        "metadata": _metadata(released, name, licence),
        "name": name,
        "rows": rows,
        "size": f"{size / 10**exponent:,.1f} {unit}",
        "language_count": len(languages.keys() - SPECIAL_LANGUAGES.keys()),
        "more_columns": sorted(columns),
        "several_positives": any(column.startswith("positive_") for each in released for column in each.columns),
        "sources": [{"name": each.source.name, "rows": each.rows} for each in released],
        "source_rows": [_source_row(each) for each in released],
        "task_types": _grouped(released, lambda each: each.source.task_type),
        "categories": _grouped(released, lambda each: each.source.category),
        "licences": [row[:3] for row in _grouped(released, lambda each: each.source.licence or "not stated")],
        "licence_note": f"The release as a whole is under {licence}." if licence else None,
        "languages": [
            [code, language_name(code), count, f"{100 * count / rows:.2f} %"] for code, count in _largest(languages)
        ],
        "faulty": [{"name": each.source.name, "rows": each.faulty} for each in released if each.faulty],
    }


def _metadata(released: Sequence[ReleasedSource], name: str, licence: str | None) -> str:
    """Return the YAML header of the card: one configuration per source, since their columns differ."""
    languages = hub_languages(language_rows(released))
    tasks = {_TASK_CATEGORIES[each.source.task_type] for each in released}
    configs = []
    for each in released:
        path = each.files[0] if len(each.files) == 1 else f"data/{each.source.name}/train-*.parquet"
        configs.append({"config_name": each.source.name, "data_files": [{"split": "train", "path": path}]})
    metadata = DatasetCardData(
        language=languages,
        **licence_metadata([licence] if licence else [each.source.licence for each in released]),
        multilinguality="multilingual" if len(languages) > 1 or "multilingual" in languages else "monolingual",
        size_categories=[size_category(sum(each.rows for each in released))],
        task_categories=sorted({"feature-extraction", "sentence-similarity", *tasks}),
        pretty_name=name,
        tags=["embeddings", "sentence-transformers"],
        configs=configs,
    )
    return header(metadata)


def size_category(rows: int) -> str:
    """Return the Hub's size category of a number of rows, such as ``10K<n<100K``."""
    power = len(str(rows)) - len("999")
    if power < 1:
        return f"n<{_SIZES[0]}"
    return f"{_SIZES[power - 1]}<n<{_SIZES[power]}" if power < len(_SIZES) else f"n>{_SIZES[-1]}"


def _source_row(each: ReleasedSource) -> list[Any]:
    source, codes = each.source, sorted(each.languages)
    languages = ", ".join(codes) if len(codes) < 5 else str(len(codes))
    described = [source.name, source.task_type, "yes" if source.symmetric else "no", languages, source.licence]
    return [*described, each.rows, each.negatives, source.instruction]


def _grouped(released: Sequence[ReleasedSource], key: Callable[[ReleasedSource], str | None]) -> list[list[Any]]:
    """Return group, sources, rows and share of rows, largest first, of the sources that have a group."""
    sources, rows = Counter(), Counter()
    for each in released:
        if (group := key(each)) is not None:
            sources[group] += 1
            rows[group] += each.rows
    return [[group, sources[group], count, f"{100 * count / rows.total():.1f} %"] for group, count in _largest(rows)]


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


# Provenance and contamination, from the files beside the data


def read_json(path: Path) -> dict[str, Any]:
    """Read the record of a step that made the data."""
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        what = f"{path}: not the record of a command of this project ({error!r})"
        raise UserError(f"{what}; give another one, or remove it") from None


def provenance_rows(records: Mapping[Path, Any], names: Sequence[str]) -> list[list[Any]]:
    """Return source, step, rows read, rows dropped and details, for each source that a record covers."""
    rows = []
    for name in names:
        for path, record in records.items():
            with _reading(path):
                if name in (record["rows"] if "options" in record else record["sources"]):
                    rows.append([name, *_step(record, name)])
    return rows


def _step(record: Mapping[str, Any], name: str) -> list[Any]:
    if "options" in record:
        kind = "message catalogs" if "locale_dirs" in record["options"] else "CLDR"
        # Folders of this machine are private.
        hidden = ("format", "languages", "locale_dirs")
        how = {key: value for key, value in record["options"].items() if key not in hidden}
        step = [f"built from {kind}", None, record.get("dropped", {}).get(name)]
    elif "model" not in (entry := record["sources"][name]):
        how = {reason: count for reason, count in entry["dropped"].items() if count}
        step = ["built from raw data", entry["read"], entry["read"] - entry["rows"]]
    else:
        # The path of a local model is private.
        model = Path(entry["model"]).name if Path(entry["model"]).is_absolute() else entry["model"]
        how = {"by": f"{model} at {entry['revision']}" if entry["revision"] else model, **entry["options"]}
        step = ["negatives mined", entry["rows"], entry["dropped"]]
    how = (f"{key} {value}" for key, value in how.items() if not isinstance(value, bool))
    return [*step, ", ".join(how)]


def contamination_facts(path: Path, report: Mapping[str, Any], released: Mapping[str, int]) -> dict[str, Any]:
    """Return the rows of the card's table, the evaluation sets, and the sources that the report does not cover.

    ``released`` are the rows by source.
    """
    with _reading(path):
        sets = [{"name": name, "texts": texts} for name, texts in report["evaluation_sets"].items()]
        checked = {source["name"]: [source[count] for count in COUNTS] for source in report["sources"]}
    rows = []
    for name in filter(checked.__contains__, released):
        looked_at, *found, removed = checked[name]
        # Either the checked rows are released, or those that were left of them.
        if released[name] not in (looked_at, looked_at - (removed or 0)):
            what = f"{path}: source {name!r} had {looked_at:,} rows, of which {removed or 0:,} were removed"
            raise UserError(f"{what}, but {released[name]:,} are released; check this very data")
        rows.append([name, looked_at, *found, 0 if removed and released[name] == looked_at else removed])
    if len(rows) > 1:
        _, *columns = ([count for count in column if count is not None] for column in zip(*rows, strict=True))
        rows.append(["all", *(sum(column) if column else None for column in columns)])
    return {"rows": rows, "sets": sets, "unchecked": [name for name in released if name not in checked]}


# Plot


def plot_languages(rows: Mapping[str, int], folder: Path, title: str) -> None:
    """Draw ``languages.svg`` and ``.png``: a bar for each of the largest languages, the others as a sum."""
    # Takes a second to import.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    total, ordered = sum(rows.values()), _largest(rows)
    codes, counts = zip(*ordered[:_SHOWN], strict=True)
    languages, rest = len(rows.keys() - _NO_LANGUAGE.keys()), ordered[_SHOWN:]
    # Titles may contain dollar signs, which are not formulas; the salt and the missing dates make the bytes repeat.
    with rc_context({"svg.hashsalt": "languages", "text.parse_math": False, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 1.3 + 0.2 * len(codes)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([_NO_LANGUAGE.get(code) or f"{language_name(code)} ({code})" for code in codes], counts)
        axes.bar_label(bars, [f"{count:,} ({count / total:.1%})" for count in counts], padding=3, fontsize=8)
        axes.set_ylim(len(codes) - 0.4, -0.6)
        axes.set_xlim(0, 1.22 * max(counts))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{title}: {languages} language{'s' * (languages != 1)}", fontsize=10, loc="left")
        others = sum(count for _, count in rest)
        note = f"; not shown: {len(rest)} more languages with {others:,} rows ({others / total:.1%})" if rest else ""
        axes.set_xlabel(f"rows{note}", fontsize=8)
        figure.savefig(folder / "languages.svg", metadata={"Date": None})
        figure.savefig(folder / "languages.png", dpi=130, metadata={"Software": None})
