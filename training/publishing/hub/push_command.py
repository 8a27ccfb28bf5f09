"""The command that uploads a packed folder."""

from __future__ import annotations

import argparse
import sys

from training.common.hub_names import check_repository
from training.publishing.hub.destination import add_destination_arguments, destination
from training.publishing.hub.hub import Hub
from training.publishing.hub.preview import CHECKED, UNCHECKED, file_list, summary, text_of, upload_rows, write_card
from training.publishing.hub.push import packed_files, push_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_destination_arguments(parser, "model", "packed folder")
    add_data_argument(parser)
    parser.add_argument("--no-verify", action="store_true", help="upload it even if its checks find faults")


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names data sets on the Hub for the card."""
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="ORG/NAME",
        help="data set on the Hub that the model was trained on, for its card; may be given several times",
    )


def data_sets(arguments: argparse.Namespace) -> list[str]:
    """The data sets that a command line names.

    Raises:
        UserError: If a name is none.
    """
    return [check_repository(name, "--data") for name in arguments.data]


def run(arguments: argparse.Namespace) -> None:
    """Uploads a packed folder, or shows what would be uploaded."""
    place, check = destination(arguments, "model"), not arguments.no_verify
    datasets = data_sets(arguments)
    hub = Hub()
    if arguments.dry_run:
        files = packed_files(arguments.folder, place.repo, datasets=datasets, check=check)
        card = write_card(arguments.folder, text_of(files))
        rows = upload_rows(hub.address(place.repo), place, files)
        rows += [("checks", CHECKED if check else UNCHECKED), ("card", str(card))]
        sys.stdout.write(file_list(files) + summary(rows))
        return
    message = arguments.message
    report = push_model(arguments.folder, place, hub, message=message, datasets=datasets, check=check)
    sys.stdout.write(f"{report}\n")
