"""Merges an adapter into its base: a complete model with the same embeddings that needs no peft."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training.common.command import run_command
from training.common.errors import UserError
from training.models.adapter_folder import MERGED_ADAPTER, find_adapter
from training.models.adapter_merging import merge_adapter


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.common.command.run_command` has it."""
    parser = argparse.ArgumentParser(prog="merge_adapter.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("adapter", help="folder or Hub name of the adapter")
    parser.add_argument("--output", required=True, type=Path, help="folder of the merged model, in fp32")
    parser.add_argument("--base", help="where its base is now, if not where the adapter says")
    parser.add_argument(
        "--accept-other-base", action="store_true", help="merge although the base may not be what the adapter adapts"
    )
    arguments = parser.parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    adapter = find_adapter(arguments.adapter)
    if adapter is None:
        raise UserError(
            f"{arguments.adapter}: no adapter (it lacks adapter_config.json); give the model/ folder of a stage with "
            "'lora: true', or a Hub name"
        )
    merge_adapter(adapter, arguments.output, arguments.base, arguments.accept_other_base)
    sys.stdout.write(f"{arguments.output} ({MERGED_ADAPTER} says of what)\n")


if __name__ == "__main__":
    raise SystemExit(main())
