"""Publishes models, data and intermediate checkpoints: packs and verifies folders, and pushes them to the Hub."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.common.command import run_command

# What each command does, and the module that does it: ``add_arguments(parser)`` and ``run(arguments)``, whose result is
# the exit status, or None for success. Only the module of the command that was given is imported.
_COMMANDS = {
    "pack": ("turn a finished run into a folder that can be uploaded as it is", "pack_command"),
    "verify": ("check a packed folder; exits with 1 and a list of what is wrong", "verify_command"),
    "push": ("upload a packed folder", "hub.push_command"),
    "push-data": ("upload a dataset release", "hub.push_data_command"),
    "push-checkpoints": ("upload every checkpoint of a run as a revision of its own", "hub.push_checkpoints_command"),
    "push-family": ("upload several models, with a collection and links between them", "hub.push_family_command"),
}


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="publish.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, module) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in words[:1]:
            work = import_module(f"training.publishing.{module}")
            work.add_arguments(command)
            command.set_defaults(run=work.run)
    arguments = parser.parse_args(words)
    return run_command(lambda: arguments.run(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
