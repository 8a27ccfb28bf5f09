"""The command that checks a packed folder."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from training.publishing.verify import examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="packed folder; the code of its card is run")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run its code and that of its card, though not this checkout's"
    )
    parser.add_argument(
        "--base", metavar="FOLDER", type=Path, help="of an adapter: its base (default: as the Hub's cache has it)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for each fault and returns 1, or says what was checked and returns 0."""
    # Their warnings are about what the findings say better.
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    examination = examine(arguments.folder, base=arguments.base, trust=arguments.trust_remote_code)
    lines = [str(fault) for fault in examination.faults] + [f"note: {notice}" for notice in examination.notices]
    if not examination.faults:
        notes = " (see the notes)" if examination.notices else ""
        unrun = " (servers by their documents, not run)" if "servers" in examination.checked else ""
        lines.append(f"{arguments.folder}: no fault; checked{notes}: {', '.join(examination.checked)}{unrun}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if examination.faults else 0
