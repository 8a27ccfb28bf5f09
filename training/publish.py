"""Publishes models, data and intermediate checkpoints: packs and verifies folders, and uploads them to the Hub.

python training/publish.py pack runs/my-run --name my-model
python training/publish.py verify runs/packed/my-model
python training/publish.py push runs/packed/my-model --repo my-org/my-model --tag v1.0
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this repository is not an installed package

from training.common.command import command_parser, run_command

# What each command does, the function that does it, and the arguments of those that upload, as named in _ARGUMENTS.
# Only the function of the given command is imported: most load torch.
_HUB, _UPLOAD = "training.publishing.hub", "--repo --tag --revision --message --private --replace --dry-run"
_COMMANDS = {
    "pack": ("turn a finished run into a folder that can be uploaded", "training.publishing.pack.run", ""),
    "verify": ("check a packed folder; exits with 1 and a list of faults", "training.publishing.verify.run", ""),
    "push": ("upload a packed folder", f"{_HUB}.upload.run_push", f"folder {_UPLOAD} --data --no-verify"),
    "push-data": ("upload a dataset release", f"{_HUB}.upload.run_push_data", f"folder {_UPLOAD}"),
    "push-checkpoints": (
        "upload every checkpoint of a run as its own revision",
        f"{_HUB}.checkpoints.run_push_checkpoints",
        "run_folder --repo --private --stage-name --replace --dry-run",
    ),
    "push-family": (
        "upload several models, with a collection and links between them",
        f"{_HUB}.upload.run_push_family",
        "folders --org --collection --private --tag --data --replace --no-verify --dry-run",
    ),
}
_FLAG = {"action": "store_true"}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "folder": {"metavar": "FOLDER", "type": Path, "help": "packed folder, or folder of a dataset release"},
    "run_folder": {"metavar": "RUN", "type": Path, "help": "output_dir of a run, or of a recipe with several stages"},
    "folders": {"metavar": "FOLDER", "type": Path, "nargs": "+", "help": "packed, in the order of the collection"},
    "--repo": {"required": True, "metavar": "ORG/NAME", "help": "repository on the Hub, created if it does not exist"},
    "--org": {"required": True, "help": "user or organisation; each model goes to ORG/NAME, NAME as it was packed"},
    "--collection": {"default": "F2LLM-v2", "metavar": "TITLE", "help": "title of the collection (%(default)s)"},
    "--private": {**_FLAG, "help": "make what is new on the Hub private"},
    "--tag": {"help": "tag the commit, such as v1.0"},
    "--revision": {"default": "main", "help": "branch to write to (%(default)s)"},
    "--message": {"help": "message of the commit"},
    "--stage-name": {"help": "what revisions are named after (default: the run's folder)"},
    "--data": {
        "action": "append",
        "default": [],
        "metavar": "ORG/NAME",
        "help": "training data, for the card; repeatable",
    },
    "--replace": {**_FLAG, "help": "replace another model, dataset, tag or revision of other weights"},
    "--no-verify": {**_FLAG, "help": "upload a packed folder even if its checks find faults"},
    "--dry-run": {**_FLAG, "help": "show what would be uploaded, and write the card beside the folder; needs no login"},
}


def make_parser(words: list[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser; for the ``words`` of a command line, only the arguments of their command are complete."""
    parser = command_parser("publish.py", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, function, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.set_defaults(run=function)
        for argument in arguments.split():
            command.add_argument(argument, **_ARGUMENTS[argument])
        if not arguments and (words is None or name in words[:1]):
            import_module(function.rpartition(".")[0]).add_arguments(command)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if words is None else words
    arguments = make_parser(words).parse_args(words)
    return run_command(lambda: resolve_name(arguments.run)(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
