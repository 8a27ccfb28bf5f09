"""Check a packed folder for faults that released models had in public, and find all of them at once."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from training.common.errors import UserError, in_one_line
from training.publishing.adapter import read_base
from training.publishing.card import CARD
from training.publishing.checks import card, files, settings
from training.publishing.checks.files import Finding, PackedFolder

Check = Callable[[PackedFolder], Iterator[Finding]]

# The group that loads the model, and runs the code of the folder and of its card.
RUN = "embeddings"
# Checks by what they look at, in order.
CHECKS: Mapping[str, Sequence[Check]] = {
    "contents": (files.check_contents,),
    "configuration": (settings.check_configuration,),
    "tokenizer": (settings.check_eos, settings.check_auto_tokenizer, settings.check_special_tokens),
    "modules": (settings.check_modules, settings.check_form),
    "weights": (files.check_record,),
    "remote code": (files.check_remote_code,),
    "servers": (settings.check_llama_cpp,),
    "card": (card.check_card,),
    RUN: (card.check_embeddings,),
}
# An adapter has no configuration or code of its own, and servers load whole models.
ADAPTER_CHECKS: Mapping[str, Sequence[Check]] = {
    **{name: CHECKS[name] for name in ("contents", "tokenizer", "modules", "weights")},
    "adapter": (files.check_base,),
    **{name: CHECKS[name] for name in ("card", RUN)},
}


class Examination(NamedTuple):
    """Faults, which prevent a release, other findings, and the names of the checks that were made."""

    faults: tuple[Finding, ...]
    notices: tuple[Finding, ...]
    checked: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``publish.py verify``."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="packed folder; the code of its card is run")
    what = "run the folder's code and that of its card even if it is not this checkout's"
    parser.add_argument("--trust-remote-code", action="store_true", help=what)
    what = "base of an adapter (default: the one in the Hub's cache)"
    parser.add_argument("--base", metavar="FOLDER", type=Path, help=what)


def run(arguments: argparse.Namespace) -> int:
    """Run ``publish.py verify``: print a line per finding, and return 1 if there are faults."""
    # The findings say better what their warnings are about.
    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    examination = examine(arguments.folder, base=arguments.base, trust=arguments.trust_remote_code)
    lines = [str(fault) for fault in examination.faults] + [f"note: {notice}" for notice in examination.notices]
    if not examination.faults:
        lines.append(f"{arguments.folder}: no fault; checked: {', '.join(examination.checked)}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 1 if examination.faults else 0


def checks_of(folder: Path) -> Mapping[str, Sequence[Check]]:
    """Return the checks of a folder: those of a whole model or of an adapter."""
    return ADAPTER_CHECKS if PackedFolder(folder.resolve()).is_adapter else CHECKS


def examine(
    folder: Path, checks: Mapping[str, Sequence[Check]] | None = None, base: Path | None = None, trust: bool = False
) -> Examination:
    """Check a packed folder.

    The code of the folder and of its card runs only if nothing else is at fault and all of it is this checkout's (or
    with ``trust``), in a separate process with neither network nor login. ``checks`` are all that apply by default, and
    ``base``, the folder of an adapter's base, is by default that in the Hub's cache.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that `publish.py pack` wrote")
    packed = PackedFolder(folder.resolve(), base)
    if base is not None and not packed.is_adapter:
        raise UserError(f"--base {base}: {folder} is not an adapter; leave it out")
    if base is not None:
        read_base(base)
    # Several checks may find the same damage.
    found: dict[Finding, None] = {}
    done = []
    for name, own in (checks_of(folder) if checks is None else checks).items():
        if name == RUN and (unrun := _unrun(packed, found, trust)):
            found[unrun] = None
            continue
        done.append(name)
        for check in own:
            found |= dict.fromkeys(_findings(packed, name, check))
    faults = tuple(finding for finding in found if finding.fault)
    return Examination(faults, tuple(finding for finding in found if not finding.fault), tuple(done))


def _findings(packed: PackedFolder, name: str, check: Check) -> Iterator[Finding]:
    try:
        yield from check(packed)
    except UserError as error:
        what = " ".join(error.what.split()).replace(f"{packed.path}/", "").replace(str(packed.path), "the folder")
        file, _, wrong = what.partition(": ")
        yield Finding(file, wrong.partition("; ")[0], *error.args[1:])
    # Damage that still parses, such as a text in the place of a number, can raise any exception.
    except Exception as error:
        yield Finding(name, f"{check.__name__} cannot be done ({type(error).__name__}: {in_one_line(error)})")


def _unrun(packed: PackedFolder, found: Iterable[Finding], trust: bool) -> Finding | None:
    if any(finding.fault for finding in found):
        wrong, remedy = "its examples were not run: the folder has faults", "mend them and verify it again"
    elif trust or not (foreign := [*files.foreign_code(packed), *card.foreign_examples(packed)]):
        return None
    else:
        wrong = f"its examples were not run: {foreign[0]} is not this checkout's"
        remedy = "read all code of the folder and give --trust-remote-code to run it"
    return Finding(CARD, wrong, remedy, fault=False)
