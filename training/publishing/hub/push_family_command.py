"""The command that uploads a family of packed folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from difflib import unified_diff
from pathlib import Path

from training.common.errors import UserError
from training.common.hub_names import check_revision
from training.publishing.hub.destination import Destination
from training.publishing.hub.family import Family, FamilyReport, load_family, push_family
from training.publishing.hub.hub import Hub
from training.publishing.hub.preview import CHECKED, UNCHECKED, file_list, summary, text_of, upload_rows, write_card
from training.publishing.hub.push import CARD
from training.publishing.hub.push_command import add_data_argument, data_sets

_TITLE = "F2LLM-v2"
# Characters of a title that the Hub takes.
_LONGEST_TITLE = 60
# Stands for the end of the collection's address, which the Hub chooses when it is made.
_UNKNOWN = "NOT-MADE-YET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", type=Path, help="packed folders, in the order of the collection"
    )
    parser.add_argument(
        "--org", required=True, help="user or organisation; each model goes to ORG/NAME, NAME as it was packed"
    )
    parser.add_argument("--collection", default=_TITLE, metavar="TITLE", help="of the collection (%(default)s)")
    parser.add_argument("--private", action="store_true", help="make new repositories and the collection private")
    parser.add_argument("--tag", help="tag the commits, such as v1.0")
    add_data_argument(parser)
    parser.add_argument(
        "--replace", action="store_true", help="even if a repository holds another model, or the tag another commit"
    )
    parser.add_argument("--no-verify", action="store_true", help="upload them even if their checks find faults")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be uploaded and what changes in the cards; no login"
    )


def run(arguments: argparse.Namespace) -> int:
    """Uploads a family, or shows what would be uploaded; 1 if a member is missing in the end."""
    title = arguments.collection.strip()
    if not 0 < len(title) <= _LONGEST_TITLE:
        raise UserError(f"--collection {arguments.collection!r}: give a title of 1 to {_LONGEST_TITLE} characters")
    tag = None if arguments.tag is None else check_revision("--tag", arguments.tag)
    family = load_family(arguments.folders, arguments.org, title, data_sets(arguments))
    hub, check = Hub(), not arguments.no_verify
    private = arguments.private or None
    places = {
        repository: Destination(repository, "model", tag=tag, private=private, replace=arguments.replace)
        for repository in family.folders
    }
    if arguments.dry_run:
        sys.stdout.writelines(_preview(family, hub, places, check))
        return 0
    report = push_family(family, hub, places, check=check)
    sys.stdout.writelines(_lines(report, hub))
    return 1 if report.missing else 0


def _preview(family: Family, hub: Hub, places: Mapping[str, Destination], check: bool) -> Iterator[str]:
    rows = []
    for repository, folder in family.folders.items():
        files = family.files(repository, f"{family.organisation}/{_UNKNOWN}", check)
        before, after = (folder / CARD).read_text(encoding="utf-8").splitlines(), text_of(files).splitlines()
        yield f"{repository}:\n{file_list(files)}\n"
        yield from (f"{line}\n" for line in unified_diff(before, after, CARD, f"{repository}/{CARD}", lineterm=""))
        yield "\n"
        rows += upload_rows(hub.address(repository), places[repository], files)
        rows.append(("card", str(write_card(folder, text_of(files)))))
    yield f"collection {family.title!r} of {family.organisation}:\n"
    yield from (f"{number}. {repository}\n" for number, repository in enumerate(family.folders, start=1))
    yield summary([*rows, ("checks", CHECKED if check else UNCHECKED)])


def _lines(report: FamilyReport, hub: Hub) -> Iterator[str]:
    yield from (f"{line}\n" for line in report.done)
    changed = "updated" if report.arranged else "nothing to change"
    yield f"{hub.api.endpoint}/collections/{report.collection}: {changed}\n"
    if report.missing:
        yield "missing, run the same command again to complete them:\n"
        yield from (f"{repository}: {reason}\n" for repository, reason in report.missing.items())
