"""Raw rows: one split of a data set that ``datasets`` finds, as dicts of the columns that a build file names.

``datasets`` gives a column one type, which turns a number among texts, or a text that looks like a number or a date,
into something else. Values of csv files are therefore read as texts, and each row of a JSON file is decoded alone.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from pandas.errors import ParserWarning

from training.common.errors import UserError, in_one_line

# The names by which `datasets` loads files that are not laid out as a data set.
FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")

LocatedRows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class RawData:
    """Rows on disk, which can be read any number of times."""

    column_names: list[str]
    num_rows: int
    fingerprint: Any  # a JSON value that changes with the rows
    read: Callable[[list[str]], LocatedRows]  # yields where each row is in its file, and at least these columns of it
    documents: Callable[[], Iterable[str]] = tuple  # gives passages that may belong to no row


def load_raw(where: str, dataset: str, folder: Path, *, split: str, **options: Any) -> RawData:
    """Load one split of a data set with the arguments of ``datasets.load_dataset``; ``where`` begins an error message.

    ``dataset`` is a name on the Hub, one of ``FILE_KINDS``, or a folder of data files or of ``Dataset.save_to_disk``.
    Paths are relative to ``folder``.
    """
    path, is_kind = folder / dataset, dataset in FILE_KINDS
    # A folder takes precedence over a data set of the same name on the Hub.
    is_folder = not is_kind and path.is_dir()
    if is_folder:
        dataset, folder = str(path), path
    try:
        if is_folder or is_kind:
            options |= _found_files(options.get("data_files"), folder, is_kind)
        if is_folder and is_beir(path):
            return _from_beir(path, split)
        if is_folder and is_saved(path):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise UserError(f"it has the splits {', '.join(splits)}; name one")
            return from_dataset(splits[split])
        config = datasets.load_dataset_builder(dataset, **options).config
        if isinstance(config, JsonConfig):
            return _from_json(config, split)
        if isinstance(config, CsvConfig):
            return from_dataset(_load_csv(dataset, split, options))
        return from_dataset(datasets.load_dataset(dataset, split=split, **options))
    except UserError as error:
        reason = str(error)
    except UnicodeDecodeError as error:
        reason = f"it is not {error.encoding} text ({error.reason} at byte {error.start}); save it as UTF-8"
    except Exception as error:  # `datasets` can raise any on a corrupt file; some name the reason in their cause only
        cause = error.__cause__ or error
        reason = f"{in_one_line(cause) or type(cause).__name__}; check dataset, config, split, data_files, load_options"
    raise UserError(f"{where}: cannot load split {split!r} of {dataset!r}: {reason}")


def _found_files(named: str | list[str] | None, folder: Path, needed: bool) -> dict[str, list[str]]:
    """Return the argument ``data_files`` with paths that start at a folder, all of which exist."""
    if not named:
        if needed:
            raise UserError("name the files to read in 'data_files'")
        return {}
    files = [each if "://" in each else str(folder / each) for each in ([named] if isinstance(named, str) else named)]
    # `datasets` leaves out a pattern that fits no file.
    for file in files:
        if "://" not in file and not glob(file, recursive=True):
            raise UserError(f"there is no file {file}; check data_files (a relative path starts at {folder})")
    return {"data_files": files}


def is_saved(folder: Path) -> bool:
    """Return whether a folder was written by ``Dataset.save_to_disk``."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_splits(folder: Path) -> list[str]:
    """Return the splits in a folder that was written by ``save_to_disk``."""
    if (folder / "dataset_dict.json").is_file():
        return list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    return [json.loads((folder / "state.json").read_text(encoding="utf-8"))["_split"] or "train"]


def is_beir(folder: Path) -> bool:
    """Return whether a folder is laid out as BEIR's data sets are."""
    return all((folder / name).exists() for name in ("corpus.jsonl", "queries.jsonl", "qrels"))


def from_dataset(dataset: datasets.Dataset) -> RawData:
    """Return the rows of a data set, which stay memory-mapped."""

    def read(columns: list[str]) -> LocatedRows:
        # The default format decodes values by the features, which may differ from what is in the file.
        for number, row in enumerate(dataset.select_columns(columns).with_format(None)):
            yield f"row {number}", row

    # Private, but the key of the cache of `datasets`: depends on a file's time, or the revision of a set on the Hub.
    return RawData(dataset.column_names, len(dataset), [dataset._fingerprint, len(dataset)], read)


def _load_csv(dataset: str, split: str, options: dict[str, Any]) -> datasets.Dataset:
    options = {"keep_default_na": False, "index_col": False, **options}
    with warnings.catch_warnings():
        # For a row with more fields than the header, pandas would make an index or drop the rest.
        warnings.simplefilter("error", ParserWarning)
        names = datasets.load_dataset(dataset, split=split, **{**options, "nrows": 1}).column_names
        options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
        return datasets.load_dataset(dataset, split=split, **options)


def _from_json(config: JsonConfig, split: str) -> RawData:
    """Decode every row now, to report a faulty one before any work."""
    name = split.partition("[")[0]
    if name not in config.data_files:
        raise UserError(f"json files have the splits {', '.join(config.data_files)}; name one, or a part of it")
    files, manager = config.data_files[name], datasets.DownloadManager()
    paths = {file: manager.download_and_extract(file) for file in files}
    number, columns = 0, {}
    for _, row in _json_rows(config, paths):
        number += 1
        columns |= dict.fromkeys(row)
    # A part of a split, such as "train[:10]".
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: number})
    number = len(range(number)[part.from_ : part.to])
    if not columns or not number:
        raise UserError("there are no rows in its files; check 'data_files' and 'split'")
    made_of = [split, config.field, config.encoding, config.encoding_errors, *files, *files.origin_metadata]
    return RawData([*columns], number, made_of, lambda _: islice(_json_rows(config, paths), part.from_, part.to))


def _json_rows(config: JsonConfig, paths: Mapping[str, str]) -> LocatedRows:
    """Yield the rows of files with one object per line, or with one list of objects, in the order of the files."""
    # The encoding "utf-8-sig" is UTF-8 without the byte order mark that Windows writes.
    encoding = "utf-8-sig" if config.encoding == "utf-8" else config.encoding
    for name, path in paths.items():
        with open(path, encoding=encoding, errors=config.encoding_errors) as file:
            first = next((line for line in file if line.strip()), "").strip()
            file.seek(0)
            if not first:
                continue
            if config.field is None and not first.startswith("[") and first != "{":
                lines = ((f"{name}: line {number}", line) for number, line in enumerate(file, start=1))
                rows = ((where, _decoded(where, line)) for where, line in lines if line.strip())
            else:
                content = _decoded(name, file.read())
                if config.field is not None:
                    content = content.get(config.field) if isinstance(content, dict) else None
                if not isinstance(content, list):
                    raise UserError(f"{name}: expected a list of JSON objects; write one, or one object per line")
                rows = ((f"{name}: item {number}", item) for number, item in enumerate(content, start=1))
            for where, row in rows:
                if not isinstance(row, dict):
                    raise UserError(f"{where} is {str(row)[:100]!r}, not a JSON object; correct it")
                yield where, row


def _from_beir(folder: Path, split: str) -> RawData:
    """Return a row per judged query: its passages, of a grade above 0, and as negatives those that are judged wrong."""
    files = [path for path in sorted((folder / "qrels").glob("*.tsv")) if path.stem == split]
    if not files:
        known = ", ".join(sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))) or "none"
        raise UserError(f"its judgements have the splits {known}; give one of them")
    judged: dict[str, dict[str, float]] = {}
    lines: dict[tuple[str, str], str] = {}
    for where, (query, document, grade) in _judgements(files[0]):
        judged.setdefault(query, {})[document] = grade
        lines[query, document] = where
    wanted = {document for grades in judged.values() for document in grades}
    texts = {str(row.get("_id")): row for row in _lines(folder / "corpus.jsonl") if str(row.get("_id")) in wanted}
    queries = {str(row.get("_id")): row.get("text") for row in _lines(folder / "queries.jsonl")}
    for (query, document), where in lines.items():
        for name, value, known in (("queries", query, queries), ("corpus", document, texts)):
            if value not in known:
                raise UserError(f"{where}: {value!r} is not in {folder / name}.jsonl; correct or drop the line")
    rows = []
    for query, grades in judged.items():
        documents = [{**texts[each], "score": grade} for each, grade in sorted(grades.items(), key=lambda one: -one[1])]
        right = [each for each in documents if each["score"] > 0]
        if right:
            row = {"query": queries[query], "passage": right, "negative": documents[len(right) :]}
            rows.append((f"{folder}: query {query!r}", row))
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in (*folder.glob("*.jsonl"), *files)]
    made_of = [str(folder), split, *map(list, stats)]

    def documents() -> Iterator[str]:
        for row in _lines(folder / "corpus.jsonl"):
            texts = (as_text(row.get(name)) or "" for name in ("title", "text"))
            yield " ".join(text for text in texts if text.strip())

    return RawData(["query", "passage", "negative"], len(rows), made_of, lambda _: iter(rows), documents)


def _judgements(path: Path) -> Iterator[tuple[str, tuple[str, str, float]]]:
    """Yield place, query, document and grade of each line of a file of judgements."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            parts = line.rstrip("\r\n").split("\t")
            if (number == 1 and parts[-1] == "score") or not line.strip():
                continue
            try:
                query, document, grade = parts
                yield f"{path}: line {number}", (query, document, float(grade))
            except ValueError:
                fault = "expected query-id, corpus-id and a grade, separated by tabs; correct it"
                raise UserError(f"{path}: line {number} is {line.strip()[:100]!r}; {fault}") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    config = JsonConfig()
    return (row for _, row in _json_rows(config, {str(path): str(path)}))


def _decoded(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({in_one_line(error)}); correct it") from None


def is_text(value: Any) -> bool:
    """Return whether a value is a text that can be encoded as UTF-8; half a surrogate pair of JSON cannot."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def as_text(value: Any) -> str | None:
    """Return a text, a number or a truth value as text; None for anything else.

    Integers are written as digits, numbers with a fraction as Python does, without a fraction of zero, truth values as
    ``true`` and ``false``. NaN, by which tables mark a missing value, is the empty text.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return "" if value != value else re.sub(r"\.0$", "", str(value))
    return value if is_text(value) else None
