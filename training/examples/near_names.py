"""How much of a model's accuracy is left without the held-out names that differ from a training name by one character?

python training/examples/near_names.py [MODEL …] [--data runs/quickstart/data]
"""

from __future__ import annotations

import argparse
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from training.common.command import command_parser, run_command
from training.data.manifest import MANIFEST, load_manifest
from training.evaluation.pairs import TFIDF, encode_pairs, load_pairs, nearest_by_tfidf, read_texts
from training.models.encoders import load_encoder
from training.models.model_ref import resolve

MODELS = ["runs/quickstart/stage2/model", "runs/quickstart/student/model"]
# Stands for one character or for none; no text has it.
_ANY = "\0"


def _patterns(text: str) -> Iterator[str]:
    """Yield a text with each of its characters replaced by a placeholder, and with one put in at each place."""
    for place in range(len(text) + 1):
        yield text[:place] + _ANY + text[place:]
        yield text[:place] + _ANY + text[place + 1 :]


def within_one_edit(texts: Sequence[str], others: Iterable[str]) -> np.ndarray:
    """Return ``(n,)`` whether each text is one of the others but for at most one character (Levenshtein distance 1).

    Two texts are, if and only if they have a pattern in common. Case and compatibility forms make no difference.
    """
    positions: dict[str, set[int]] = defaultdict(set)
    for position, text in enumerate(texts):
        for pattern in _patterns(_folded(text)):
            positions[pattern].add(position)
    found = np.zeros(len(texts), dtype=bool)
    for other in {_folded(each) for each in others}:
        for pattern in _patterns(other):
            if pattern in positions:
                found[list(positions[pattern])] = True
    return found


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = command_parser("near_names.py", __doc__)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"folders, runs or Hub names ({' '.join(MODELS)})")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"), help="what a recipe built")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return run_command(partial(_run, make_parser().parse_args(words)))


def _run(arguments: argparse.Namespace) -> None:
    pairs = load_pairs(arguments.data / "held_out.parquet", arguments.data / "candidates.parquet")
    files = [file for source in load_manifest(arguments.data / MANIFEST) for file in source.files]
    training = (read_texts(file, ["query", "passage"]) for file in files)
    far = ~within_one_edit(pairs.queries, {text for columns in training for own in columns.values() for text in own})
    hits = {}
    for name in arguments.models:
        encoded = encode_pairs(load_encoder(resolve(name, "MODEL"), "MODEL"), pairs)
        hits[name] = encoded.hits(encoded.queries.shape[1])
    hits[TFIDF] = pairs.hits(nearest_by_tfidf(pairs.queries, pairs.candidates))
    lines = [f"| accuracy@1 | all {len(far):,} names | {far.sum():,} far from training names |", "| --- | --- | --- |"]
    lines += [f"| {name} | {own.mean():.3f} | {own[far].mean():.3f} |" for name, own in hits.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
