"""Teaches a model a program that its training held out, by an adapter and whole, and measures both there and elsewhere.

python training/run_stage.py training/recipes/gettext/recipe.yaml
python training/evaluation/adaptation.py [--program DOMAIN]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from sentence_transformers import SentenceTransformer

from training.checkpoints import write_whole
from training.data.command import run_command
from training.errors import UserError
from training.evaluation.pairs import Pairs, encode_pairs, load_pairs, nearest, read_texts
from training.keyed import keyed_bits, text_key
from training.recipe import Recipe, load_recipe
from training.stage import run_stage

__all__ = ["main", "split_program", "table"]

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "finetune" / "gettext.yaml"
_SPLIT, _NEGATIVE = 51, 52
_NEGATIVES = 4
_TEST_SHARE = 0.3
_COLUMNS = ("query", "passage", "lang", "script")


def split_program(held_out: Path, output: Path, program: str | None, most_elsewhere: int = 5000) -> str:
    """Writes the data of an adaptation, and returns the program.

    The English texts of the program are divided by key; ``program.parquet`` has the messages of some of them, to be
    found afterwards, ``train.parquet`` with its manifest those of the others, and ``elsewhere.parquet`` messages of all
    other held-out programs. No English text of one file is in another.

    Args:
        held_out: ``held_out.parquet`` of a gettext build.
        output: The folder to write.
        program: Domain of the program; the one with most English texts if None.
        most_elsewhere: Messages of other programs at most.

    Raises:
        UserError: If there is no such program, or no other one.
    """
    columns = read_texts(held_out, [*_COLUMNS, "domain"])
    texts: dict[str, set[str]] = defaultdict(set)
    for domain, passage in zip(columns["domain"], columns["passage"], strict=True):
        texts[domain].add(passage)
    program = program or max(sorted(texts), key=lambda domain: len(texts[domain]))
    if program not in texts or len(texts) < 2:
        raise UserError(f"{held_out}: holds {', '.join(sorted(texts))}; name one of several with --program")
    passages = sorted(texts[program])
    draws = keyed_bits(_SPLIT, np.array([text_key(text) for text in passages], dtype=np.uint64))
    order = [passages[place] for place in np.argsort(draws, kind="stable").tolist()]
    tested = set(order[: round(_TEST_SHARE * len(order))])
    trained = sorted(set(order) - tested)
    domains, found = columns["domain"], columns["passage"]
    own = [row for row, domain in enumerate(domains) if domain == program]
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "program.parquet", columns, [row for row in own if found[row] in tested])
    others = [row for row, domain in enumerate(domains) if domain != program and found[row] not in texts[program]]
    every = max(-(-len(others) // most_elsewhere), 1)
    _write(output / "elsewhere.parquet", columns, others[::every])
    _write(output / "train.parquet", columns, [row for row in own if found[row] not in tested], trained)
    source = {"name": program, "files": ["train.parquet"], "task_type": "retrieval", "symmetric": True}
    source |= {"instruction": "Retrieve the English translation.", "languages": ["eng"], "licence": "the program's own"}
    write_whole(output / "manifest.yaml", yaml.safe_dump({"sources": [source]}, sort_keys=False))
    return program


def _write(path: Path, columns: Mapping[str, list[str]], rows: Sequence[int], negatives: Sequence[str] = ()) -> None:
    """Some rows of the columns; with the texts given, of which some are drawn as negatives of each row."""
    if not rows:
        raise UserError(f"{path}: no message is left for it; choose a larger program with --program")
    table = {name: [columns[name][row] for row in rows] for name in _COLUMNS}
    for number in range(_NEGATIVES if negatives else 0):
        places = keyed_bits(_NEGATIVE, number, np.array(rows, dtype=np.uint64)) % np.uint64(len(negatives))
        drawn = zip(places.tolist(), table["passage"], strict=True)
        table[f"negative_{number + 1}"] = [
            negatives[place] if negatives[place] != passage else negatives[place - 1] for place, passage in drawn
        ]
    pq.write_table(pa.table(table), path)


def _accuracy(model: SentenceTransformer, pairs: Pairs) -> float:
    encoded = encode_pairs(model, pairs)
    width = encoded.queries.shape[1]
    return float((nearest(encoded.queries, encoded.candidates, width) == pairs.labels).mean())


def table(program: str, result: Mapping[str, Mapping[str, Any]]) -> str:
    """The result in Markdown."""
    lines = [f"| | messages of {program} | of other held-out programs | weights saved |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {row['program']:.3f} | {row['elsewhere']:.3f} | {row['megabytes']:.2f} MB |"
        for name, row in result.items()
    ]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status, as :func:`~training.data.command.run_command` has it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("runs/gettext/data"), help="the gettext build (%(default)s)")
    parser.add_argument("--model", default="runs/gettext/train/model", help="what was trained on it (%(default)s)")
    parser.add_argument("--program", help="domain of a held-out program; the largest if left out")
    parser.add_argument("--output", type=Path, default=Path("runs/adaptation"), help="folder to write (%(default)s)")
    arguments = parser.parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    data = arguments.output / "data"
    program = split_program(arguments.data / "held_out.parquet", data, arguments.program)
    keys = {"model": arguments.model, "manifest": str(data / "manifest.yaml"), "output_dir": str(arguments.output)}
    recipe: Recipe = load_recipe(RECIPE, keys)
    models = {"before": Path(arguments.model)}
    models |= {stage.name: run_stage(stage, resume=True) for stage in recipe.stages}
    pairs = {
        name: load_pairs(data / f"{name}.parquet", arguments.data / "candidates.parquet")
        for name in ("program", "elsewhere")
    }
    result = {}
    for name, folder in models.items():
        model = SentenceTransformer(str(folder), trust_remote_code=True)
        result[name] = {where: _accuracy(model, each) for where, each in pairs.items()}
        result[name]["megabytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    counts = {name: len(each.queries) for name, each in pairs.items()}
    write_whole(arguments.output / "adaptation.json", json.dumps({"program": program, **counts, **result}, indent=2))
    sys.stdout.write(f"{counts}\n{table(program, result)}\n")


if __name__ == "__main__":
    raise SystemExit(main())
