"""The command that uploads a packed folder."""

from __future__ import annotations

import argparse
import sys

from training.publishing.destination import add_destination_arguments, destination, preview
from training.publishing.hub import Hub
from training.publishing.push import model_files, push_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_destination_arguments(parser, "model", "packed folder")


def run(arguments: argparse.Namespace) -> None:
    """Uploads a packed folder, or shows what would be uploaded."""
    place = destination(arguments, "model")
    hub = Hub()
    if arguments.dry_run:
        sys.stdout.write(preview(hub.address(place.repo), model_files(arguments.folder, place.repo)))
        return
    sys.stdout.write(push_model(arguments.folder, place, hub, arguments.message) + "\n")
