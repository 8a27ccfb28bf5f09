"""Checks a packed folder for what others got wrong in public; every fault is found in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.common.errors import UserError, in_one_line
from training.publishing.adapter_base import read_base
from training.publishing.checks import (
    adapter,
    card,
    configuration,
    contents,
    embeddings,
    modules,
    remote_code,
    servers,
    tokenization,
    weights,
)
from training.publishing.checks.packed import CARD, Finding, PackedFolder, UnreadableError

Check = Callable[[PackedFolder], Iterator[Finding]]

# The group that loads the model, and runs the code of the folder and of its card.
RUN = "embeddings"
# By what they look at, in the order in which they are told.
CHECKS: Mapping[str, Sequence[Check]] = {
    "contents": (contents.check_needed, contents.check_foreign, contents.check_listed),
    "configuration": (
        *(configuration.check_configuration, configuration.check_validity, configuration.check_matryoshka),
        *(configuration.check_release, configuration.check_lengths),
    ),
    "tokenizer": (
        *(tokenization.check_eos, tokenization.check_auto_tokenizer, tokenization.check_special_tokens),
        tokenization.check_vocabulary,
    ),
    "modules": (modules.check_modules, modules.check_pooling, modules.check_prompts),
    "weights": (
        *(weights.check_pickles, weights.check_shards, weights.check_index, weights.check_tensors),
        *(weights.check_dtype, weights.check_finite),
    ),
    "remote code": (remote_code.check_auto_map, remote_code.check_imports, remote_code.check_version),
    "servers": (
        *(servers.check_text_embeddings_inference, servers.check_rotary),
        *(servers.check_sentence_transformers_files, servers.check_llama_cpp),
    ),
    "card": (card.check_metadata, card.check_links, card.check_facts, card.check_results, card.check_snippets),
    RUN: (embeddings.check_embeddings,),
}

# An adapter has no weights, no configuration and no code of its own; servers load whole models.
ADAPTER_CHECKS: Mapping[str, Sequence[Check]] = {
    **{name: CHECKS[name] for name in ("contents", "tokenizer", "modules")},
    "adapter": (
        *(adapter.check_base, adapter.check_adapter_configuration, adapter.check_adapter_tensors),
        *(adapter.check_code, weights.check_pickles, weights.check_finite),
    ),
    "older readers": (servers.check_sentence_transformers_files,),
    **{name: CHECKS[name] for name in ("card", RUN)},
}


@dataclass(frozen=True)
class Examination:
    """What an examination of a folder found.

    Attributes:
        faults: What keeps the folder from being released.
        notices: What is worth knowing besides.
        checked: What was looked at, by the names of :data:`CHECKS`.
    """

    faults: tuple[Finding, ...]
    notices: tuple[Finding, ...]
    checked: tuple[str, ...] = ()


def verify(folder: Path, base: Path | None = None) -> list[str]:
    """Checks a packed folder.

    The code of its card and its remote code are run if nothing was found before and both are those of this checkout, in
    a process of their own with neither network nor login.

    Args:
        folder: The folder.
        base: As for :func:`examine`.

    Returns:
        A line for each fault: the file, what is wrong, what to do. Empty if there is none.

    Raises:
        UserError: If there is no such folder.
    """
    return [str(fault) for fault in examine(folder, base=base).faults]


def checks_of(folder: Path) -> Mapping[str, Sequence[Check]]:
    """The checks of a folder: those of a whole model or of an adapter."""
    return ADAPTER_CHECKS if PackedFolder(folder.resolve()).is_adapter else CHECKS


def examine(
    folder: Path, checks: Mapping[str, Sequence[Check]] | None = None, base: Path | None = None, trust: bool = False
) -> Examination:
    """Does what :func:`verify` does, and keeps notices.

    Args:
        folder: The folder.
        checks: What to check, by what it looks at; all that belongs to such a folder if None.
        base: Folder of the model that an adapter adapts; in the Hub's cache if None.
        trust: Whether code is run that is not this checkout's.

    Raises:
        UserError: If there is no such folder, or no such model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that `publish.py pack` wrote")
    packed = PackedFolder(folder.resolve(), base)
    if base is not None:
        _check_base(packed, base)
    checks = dict(checks_of(folder) if checks is None else checks)
    run = checks.pop(RUN, None)
    found = _findings(packed, checks)
    if run is not None:
        # First all that runs nothing: what that finds faulty is not run.
        unrun = _unrun(packed, any(finding.fault for finding in found), trust)
        found += _findings(packed, {RUN: run}) if unrun is None else [unrun]
        checks |= {RUN: run} if unrun is None else {}
    found = list(dict.fromkeys(found))
    return Examination(
        tuple(finding for finding in found if finding.fault),
        tuple(finding for finding in found if not finding.fault),
        tuple(checks),
    )


def _findings(packed: PackedFolder, checks: Mapping[str, Sequence[Check]]) -> list[Finding]:
    """What checks find; a damaged file is named once, with the groups of checks that it hinders."""
    found: list[Finding] = []
    hindered: dict[str, tuple[str, list[str]]] = {}
    for name, own in checks.items():
        for check in own:
            try:
                found += check(packed)
            except UnreadableError as error:
                why, names = hindered.setdefault(error.file, (error.why, []))
                names += [name] * (name not in names)
            # Damage that still parses, such as a text where a number belongs, can surface anywhere.
            except Exception as error:
                wrong = (
                    f"{check.__name__.replace('_', ' ')} cannot be done ({type(error).__name__}: {in_one_line(error)})"
                )
                found.append(Finding(name, wrong, "look for damage in what is named here and pack the run again"))
    for file, (why, names) in hindered.items():
        found = [finding for finding in found if (finding.file, finding.wrong) != (file, why)]
        found.append(Finding(file, why, f"pack the run again (not checked for it, or not in full: {', '.join(names)})"))
    return found


def _unrun(packed: PackedFolder, faulty: bool, trust: bool) -> Finding | None:
    """Why nothing of a folder is run; None if it is."""
    if faulty:
        wrong, remedy = "its examples were not run: the folder has faults", "mend them and verify it again"
    elif trust or not (foreign := [*remote_code.foreign_code(packed), *card.foreign_examples(packed)]):
        return None
    else:
        wrong = f"its examples were not run: {foreign[0]} is not this checkout's"
        remedy = "read all code of the folder and give --trust-remote-code to run it"
    return Finding(CARD, wrong, remedy, fault=False)


def _check_base(packed: PackedFolder, base: Path) -> None:
    if not packed.is_adapter:
        raise UserError(f"--base {base}: {packed.path} is no adapter; leave it out")
    try:
        read_base(base)
    except UserError as error:
        raise UserError(f"--base: {error}; give the folder of the model that the adapter adapts") from None
