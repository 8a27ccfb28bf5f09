"""Makes a dataset release: the sources of a manifest as parquet files that stream, with a card for the Hub."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Run as a script from a checkout: the recipe is not an installed package. The folder of this script goes, for its
    # modules shall be found as training.data's alone.
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent.parent), *(path for path in sys.path if path != str(_HERE))]

from training.common.command import require, run_command

if __name__ == "__main__":
    require("jinja2", "publish")

import yaml

from hub_cards.render import render_dataset_card
from training.common.content import Content
from training.common.errors import UserError
from training.common.outputs import check_output, locked, new_folder
from training.data.manifest import Source, find_entry_files, load_manifest, select_sources
from training.data.manifest_file import Manifest, read_manifest
from training.data.releasing.card import card_facts
from training.data.releasing.files import MAX_FILE_BYTES, ReleasedSource, copy_source
from training.data.releasing.plot import plot_languages
from training.data.releasing.records import contamination_facts, provenance_rows, read_contamination, read_records
from training.data.storage import identity

logger = logging.getLogger("training")

CARD, MANIFEST, RECORD = "README.md", "manifest.yaml", "release.json"
# Raise it when the same data would be released otherwise than before.
_FORMAT = 3


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    parser = argparse.ArgumentParser(prog="release.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--manifest", type=Path, required=True, help="sources in the published format")
    parser.add_argument("--output", type=Path, required=True, help="folder of the release; it is made")
    parser.add_argument("--data-dir", help="folder or address of the files, instead of the manifest's")
    parser.add_argument("--sources", nargs="+", help="release these only (`*` as in file names)")
    parser.add_argument("--name", help="title of the card (default: name of the output folder)")
    parser.add_argument("--repository", help="what the card's examples load (default: name of the output folder)")
    parser.add_argument("--licence", help="of the release as a whole (default: those of the sources)")
    parser.add_argument("--contamination", type=Path, help="contamination.json of this data")
    parser.add_argument("--max-file-mb", type=int, default=MAX_FILE_BYTES // 10**6, help="of a file (%(default)s)")
    arguments = parser.parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    release(
        arguments.manifest,
        arguments.output,
        data_dir=arguments.data_dir,
        sources=arguments.sources,
        name=arguments.name,
        repository=arguments.repository,
        licence=arguments.licence,
        contamination=arguments.contamination,
        max_file_bytes=arguments.max_file_mb * 10**6,
    )


def release(
    manifest: Path | str,
    output: Path | str,
    *,
    data_dir: Path | str | None = None,
    sources: Sequence[str] | None = None,
    name: str | None = None,
    repository: str | None = None,
    licence: str | None = None,
    contamination: Path | str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Writes a folder that ``datasets.load_dataset`` and the Hub read; it appears whole or not at all.

    It holds ``data/`` (the rows of each source, unchanged), ``README.md`` (the card), ``languages.svg`` and ``.png``,
    ``manifest.yaml`` (for training) and ``release.json`` (the card's numbers, and what the release was made of). The
    same inputs give the same bytes.

    Args:
        manifest: The sources. ``build.json`` and ``mining.json`` beside it tell the card how they came about.
        output: The folder. If it holds the same release, nothing is done.
        data_dir: Folder or address of the files, instead of the manifest's.
        sources: Names or patterns of the sources to release; all if None.
        name: Title of the card; the name of the folder if None.
        repository: What the card's examples load; the name of the folder if None.
        licence: Of the release as a whole; those of the sources if None.
        contamination: The ``contamination.json`` of this data; without it the card says that nobody looked.
        max_file_bytes: A source's further file is begun when one has this size.

    Returns:
        ``output``.

    Raises:
        UserError: If an input is missing or faulty, or the folder holds anything but the same release; nothing in it
            is touched.
    """
    manifest, output = read_manifest(manifest, data_dir), Path(output).absolute()
    if max_file_bytes < 1:
        raise UserError(f"the size of a file must be at least 1 MB, got {max_file_bytes} bytes")
    chosen = select_sources(load_manifest(manifest.path, data_dir), sources)
    _check_names(manifest, chosen)
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
    made_of = {
        "format": _hash(_FORMAT),
        "options": _hash(options),
        "sources": _hash([entries, [[identity(file) for file in source.files] for source in chosen]]),
        "records": _hash(records),
        "contamination": _hash(report),
    }
    if _is_released(output, made_of):
        logger.info("%s: holds this release already", output)
        return output
    with locked(output):
        # Another command may have made it meanwhile.
        if _is_released(output, made_of):
            return output
        with new_folder(output) as partial:
            released = _copy(chosen, partial, max_file_bytes)
            _describe(manifest, released, entries, partial, options, records, report)
            _record(partial, options["name"], released, made_of)
    logger.info("%s: %d sources, %d rows", output, len(released), sum(each.rows for each in released))
    return output


def _check_names(manifest: Manifest, sources: Sequence[Source]) -> None:
    """A source's name becomes that of a file and of a configuration."""
    for source in sources:
        if not re.fullmatch(r"[^\W_][\w.+ -]*", source.name):
            raise UserError(
                f"{manifest.path}: source {source.name!r} cannot be a configuration; use letters, digits and _ . + -"
            )


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_released(output: Path, made_of: Mapping[str, str]) -> bool:
    """Whether the folder holds this release; a folder that is missing or empty does not.

    Raises:
        UserError: If it holds anything else.
    """
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


def _copy(sources: Sequence[Source], folder: Path, max_file_bytes: int) -> list[ReleasedSource]:
    released = []
    for source in sources:
        each = copy_source(source, folder, max_file_bytes)
        logger.info("%s: %d rows", source.name, each.rows)
        if each.faulty:
            logger.warning("%s: %d rows that preparation will leave out", source.name, each.faulty)
        released.append(each)
    return released


def _describe(
    manifest: Manifest,
    released: Sequence[ReleasedSource],
    entries: Sequence[Mapping[str, Any]],
    folder: Path,
    options: Mapping[str, Any],
    records: Mapping[str, Any],
    report: Mapping[str, Any] | None,
) -> None:
    """Writes the card, the plot and the manifest."""
    facts = card_facts(
        released,
        name=options["name"],
        repository=options["repository"],
        licence=options["licence"],
        origin=str(manifest.folder) if "://" in str(manifest.folder) else None,
        provenance=provenance_rows(records, [each.source.name for each in released]),
        contamination=None if report is None else contamination_facts(report, released),
    )
    (folder / CARD).write_text(render_dataset_card(facts), encoding="utf-8")
    plot_languages(_language_rows(released), folder, options["name"])
    (folder / MANIFEST).write_text(_manifest(manifest, released, entries), encoding="utf-8")


def _language_rows(released: Sequence[ReleasedSource]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in released:
        for code, rows in each.languages.items():
            total[code] = total.get(code, 0) + rows
    return total


def _entries(manifest: Manifest, sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What the manifest says of each source; one of a collection has the collection's stages."""
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
    """The manifest of the release, its rows being those published."""
    content: dict[str, Any] = {"sources": []}
    for each, entry in zip(released, entries, strict=True):
        # The manifest takes patterns.
        written = {**entry, "files": [escape(file) for file in each.files], "published_rows": each.rows}
        content["sources"].append({key: value for key, value in written.items() if value is not None and value != []})
    stages = {stage for entry in entries for stage in entry["stages"]}
    caps = {stage: cap for stage, cap in manifest.stage_caps.items() if stage in stages}
    return yaml.safe_dump(
        ({"stage_caps": caps} if caps else {}) | content,
        sort_keys=False,
        default_flow_style=None,
        allow_unicode=True,
        width=119,
    )


def _record(folder: Path, name: str, released: Sequence[ReleasedSource], made_of: Mapping[str, str]) -> None:
    """Says last, and alone, that the folder holds a release, and of what."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): Content(path) for path in paths}
    record = {
        "name": name,
        "made_of": made_of,
        "rows": sum(each.rows for each in released),
        "languages": dict(sorted(_language_rows(released).items())),
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


if __name__ == "__main__":
    raise SystemExit(main())
