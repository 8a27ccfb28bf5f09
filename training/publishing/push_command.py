"""The command that uploads a packed folder."""

from __future__ import annotations

import argparse
import sys

from training.publishing.destination import add_destination_arguments, destination, preview
from training.publishing.hub import Hub
from training.publishing.push import packed_files, push_model

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    add_destination_arguments(parser, "model", "packed folder")
    parser.add_argument("--no-verify", action="store_true", help="upload it even if its checks find faults")


def run(arguments: argparse.Namespace) -> None:
    """Uploads a packed folder, or shows what would be uploaded."""
    place, check = destination(arguments, "model"), not arguments.no_verify
    hub = Hub()
    if arguments.dry_run:
        files = packed_files(arguments.folder, place.repo, check=check)
        sys.stdout.write(preview(hub.address(place.repo), files))
        return
    report = push_model(arguments.folder, place, hub, message=arguments.message, check=check)
    sys.stdout.write(f"{report}\n")
