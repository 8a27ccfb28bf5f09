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

# Run as a script from a checkout: the repository is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.common.command import run_command

# What each command does, and the function that does it. Only that of the given command is imported: most load torch.
_COMMANDS = {
    "pack": ("turn a finished run into a folder that can be uploaded", "training.publishing.pack.run"),
    "verify": ("check a packed folder; exits with 1 and a list of faults", "training.publishing.verify.run"),
    "push": ("upload a packed folder", "training.publishing.hub.upload.run_push"),
    "push-data": ("upload a dataset release", "training.publishing.hub.upload.run_push_data"),
    "push-checkpoints": (
        "upload every checkpoint of a run as its own revision",
        "training.publishing.hub.checkpoints.run_push_checkpoints",
    ),
    "push-family": (
        "upload several models, with a collection and links between them",
        "training.publishing.hub.family.run_push_family",
    ),
}
# The arguments of the commands that upload, in the order of their help.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "folder": {"metavar": "FOLDER", "type": Path, "help": "packed folder, or folder of a dataset release"},
    "run_folder": {"metavar": "RUN", "type": Path, "help": "output_dir of a run, or of a recipe with several stages"},
    "folders": {
        **{"nargs": "+", "metavar": "FOLDER", "type": Path},
        "help": "packed folders, in the order of the collection",
    },
    "--repo": {"required": True, "metavar": "ORG/NAME", "help": "repository on the Hub, created if it does not exist"},
    "--org": {"required": True, "help": "user or organisation; each model goes to ORG/NAME, NAME as it was packed"},
    "--collection": {"default": "F2LLM-v2", "metavar": "TITLE", "help": "title of the collection (%(default)s)"},
    "--private": {"action": "store_true", "help": "make what is new on the Hub private"},
    "--tag": {"help": "tag the commit, such as v1.0"},
    "--revision": {"default": "main", "help": "branch to write to (%(default)s)"},
    "--message": {"help": "message of the commit"},
    "--stage-name": {"help": "what revisions are named after (default: the run's folder)"},
    "--data": {
        **{"action": "append", "default": [], "metavar": "ORG/NAME"},
        "help": "dataset on the Hub that the model was trained on, for its card; may be given several times",
    },
    "--replace": {
        "action": "store_true",
        "help": "even if the repository holds another model or dataset, the revision other weights, or the tag another "
        "commit",
    },
    "--no-verify": {"action": "store_true", "help": "upload a packed folder even if its checks find faults"},
    "--dry-run": {
        "action": "store_true",
        "help": "show what would be uploaded, and write the card beside the folder; needs no login",
    },
}
_TAKES = {
    "push": "folder --repo --private --tag --revision --message --data --replace --no-verify --dry-run",
    "push-data": "folder --repo --private --tag --revision --message --replace --dry-run",
    "push-checkpoints": "run_folder --repo --private --stage-name --replace --dry-run",
    "push-family": "folders --org --collection --private --tag --data --replace --no-verify --dry-run",
}


def make_parser(words: list[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser; for the ``words`` of a command line, only the arguments of their command are complete."""
    summary, _, example = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="publish.py",
        description=summary,
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, function) in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.set_defaults(run=function)
        for argument in _TAKES.get(name, "").split():
            command.add_argument(argument, **_ARGUMENTS[argument])
        if name not in _TAKES and (words is None or name in words[:1]):
            import_module(function.rpartition(".")[0]).add_arguments(command)
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if words is None else words
    arguments = make_parser(words).parse_args(words)
    return run_command(lambda: resolve_name(arguments.run)(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
