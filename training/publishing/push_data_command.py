"""The command that uploads a dataset release."""

from __future__ import annotations

import argparse
import sys

from training.publishing.destination import add_destination_arguments, destination, preview
from training.publishing.hub import Hub
from training.publishing.push_data import data_files, push_data

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_destination_arguments(parser, "dataset", "folder of a dataset release")


def run(arguments: argparse.Namespace) -> None:
    """Uploads a release, or shows what would be uploaded."""
    place = destination(arguments, "dataset")
    hub = Hub()
    if arguments.dry_run:
        sys.stdout.write(preview(hub.address(place.repo, "dataset"), data_files(arguments.folder, place.repo)))
        return
    report = push_data(arguments.folder, place, hub, message=arguments.message)
    sys.stdout.write(f"{report}\n")
