"""The command that uploads a dataset release."""

from __future__ import annotations

import argparse
import sys

from training.publishing.hub.destination import add_destination_arguments, destination
from training.publishing.hub.hub import Hub
from training.publishing.hub.preview import file_list, summary, text_of, upload_rows, write_card
from training.publishing.hub.push_data import RECORD, data_files, push_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_destination_arguments(parser, "dataset", "folder of a dataset release")


def run(arguments: argparse.Namespace) -> None:
    """Uploads a release, or shows what would be uploaded."""
    place = destination(arguments, "dataset")
    hub = Hub()
    if arguments.dry_run:
        files = data_files(arguments.folder, place.repo)
        card = write_card(arguments.folder, text_of(files))
        rows = upload_rows(hub.address(place.repo, "dataset"), place, files)
        rows += [("checks", f"the files are those that {RECORD} lists"), ("card", str(card))]
        sys.stdout.write(file_list(files) + summary(rows))
        return
    report = push_data(arguments.folder, place, hub, message=arguments.message)
    sys.stdout.write(f"{report}\n")
