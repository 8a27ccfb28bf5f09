"""Loading raw data: whatever ``datasets`` loads, with the texts of its files as they stand there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from glob import escape, glob
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from pandas.errors import ParserWarning

from training.common.errors import UserError, in_one_line
from training.data.building.json_rows import JsonRows

# The names by which `datasets` loads files that are not laid out as a data set.
FILE_KINDS = ("arrow", "csv", "json", "parquet", "text")


def load_raw(where: str, dataset: str, folder: Path, **options: Any) -> datasets.Dataset | JsonRows:
    """Loads one split of a data set; its rows stay on disk, memory-mapped.

    Args:
        where: What an error names.
        dataset: A name on the Hub, one of ``FILE_KINDS``, or a folder: of data files, or of ``Dataset.save_to_disk``.
        folder: What paths are relative to.
        **options: Arguments of ``datasets.load_dataset``.

    Raises:
        UserError: If it cannot be loaded.
    """
    split, path = options.pop("split"), folder / dataset
    if dataset in FILE_KINDS and "data_files" not in options:
        raise UserError(f"{where}: dataset {dataset!r} needs the files to read; name them in 'data_files'")
    try:
        if dataset not in FILE_KINDS and path.is_dir():
            # Of a folder beside the build file and a set on the Hub of one name, the folder is meant.
            dataset = str(path)
            folder = path
        if "data_files" in options and (dataset in FILE_KINDS or folder == path):
            options["data_files"] = _beside(folder, options["data_files"])
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(path, split)
        return _load(dataset, split, options)
    except UserError as error:
        raise UserError(f"{where}: cannot load split {split!r} of {dataset!r}: {error}") from None
    # Faulty files come out of the libraries as anything.
    except Exception as error:
        raise UserError(f"{where}: cannot load split {split!r} of {dataset!r} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """What went wrong and what to do, of an error of ``datasets``."""
    # "An error occurred while generating the dataset" has the reason in its cause.
    cause = error.__cause__ or error
    told = in_one_line(cause) or type(cause).__name__
    if isinstance(cause, StopIteration) or any(words in told for words in _NO_ROWS):
        return "there are no rows in its files; check 'data_files' and 'split', and write the files again"
    if "Dataset scripts are no longer supported" in told:
        return f"{told}: save its rows as parquet, jsonl or csv, and name these files"
    return f"{told}; check dataset, config, split, data_files and load_options"


# What `datasets` and pandas say of files without rows.
_NO_ROWS = ("corresponds to no data", "No columns to parse from file", "pass `features` or at least one example")


def _load(dataset: str, split: str, options: dict[str, Any]) -> datasets.Dataset | JsonRows:
    config = datasets.load_dataset_builder(dataset, **options).config
    if isinstance(config, JsonConfig):
        return _json_rows(config, split)
    if isinstance(config, CsvConfig) and config.features is None:
        # The types of a csv file's columns are guesses from their first rows. What is no text is read from texts.
        options = {"keep_default_na": False, "index_col": False, **options}
        with warnings.catch_warnings():
            # Of a row with more fields than the header, pandas would make an index or drop what is over.
            warnings.simplefilter("error", ParserWarning)
            names = datasets.load_dataset(dataset, split=split, **{**options, "nrows": 1}).column_names
            options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
            return datasets.load_dataset(dataset, split=split, **options)
    return datasets.load_dataset(dataset, split=split, **options)


def _json_rows(config: JsonConfig, split: str) -> JsonRows:
    text = {"encoding": config.encoding, "encoding_errors": config.encoding_errors}
    text["features"] = datasets.Features({"text": datasets.Value("string")})
    if split not in config.data_files:
        files = {part: [_literal(file) for file in named] for part, named in config.data_files.items()}
        return JsonRows([(split, datasets.load_dataset("text", data_files=files, split=split, **text))], config.field)
    files = [file for file in config.data_files[split] if not _is_empty(file)]
    if not files:
        raise StopIteration
    loaded = [datasets.load_dataset("text", data_files=[_literal(file)], split="train", **text) for file in files]
    return JsonRows(list(zip(map(str, files), loaded, strict=True)), config.field)


def _literal(file: str) -> str:
    """The pattern of one file that is found already."""
    return escape(file) if Path(file).is_file() else file


def _is_empty(file: str) -> bool:
    return Path(file).is_file() and not Path(file).stat().st_size


def _saved(path: Path, split: str) -> datasets.Dataset:
    """What ``save_to_disk`` left: one data set, or one for each split."""
    loaded = datasets.load_from_disk(path)
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split not in splits:
        raise UserError(f"there is no split {split!r} in {path}; it has {', '.join(splits)}")
    return splits[split]


def _beside(folder: Path, files: str | Sequence[str]) -> list[str]:
    """The files with relative paths taken from a folder; addresses stay as they are.

    Raises:
        UserError: If no file fits.
    """
    found = [file if "://" in file else str(folder / file) for file in ([files] if isinstance(files, str) else files)]
    for file in found:
        if "://" not in file and not glob(file, recursive=True):
            raise UserError(f"there is no file {file}; check data_files (a relative path starts at {folder})")
    return found
