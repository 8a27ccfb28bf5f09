"""Teach a model a program that its training held out, by an adapter and whole, and measure both there and elsewhere.

python training/run_stage.py training/recipes/gettext/recipe.yaml
python training/examples/adaptation.py [--program DOMAIN] [--validate]

Each is trained on the program alone and with replayed rows of the source that the model was trained on. Choose settings
with ``--validate``, on other English texts than those of the reported figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a script from a checkout: the recipe is not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import yaml

from training.common.command import command_parser, run_command
from training.common.errors import UserError
from training.common.keyed import keyed_bits, text_key
from training.common.outputs import check_output, write_whole
from training.config.recipe import load_recipe
from training.data.cleaning.normalise import normalise
from training.evaluation.pairs import Pairs, encode_pairs, load_pairs, nearest, read_texts
from training.evaluation.significance import PairedTest, paired_test
from training.models.encoders import load_encoder
from training.models.model_ref import resolve
from training.stages.stage import run_stage

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "finetune" / "gettext.yaml"
_SPLIT, _NEGATIVE, _HALF = 51, 52, 53
_NEGATIVES = 4
_TEST_SHARE = 0.3
_COLUMNS = ("query", "passage", "lang", "script")


def split_program(held_out: Path, output: Path, program: str | None, replayed: Path) -> str:
    """Write the data of an adaptation and return the program (default: that with the most English texts).

    ``program.parquet`` has the messages of some of its English texts, drawn by key, ``train.parquet`` those of the
    others. The English texts of all other held-out programs are halved: ``elsewhere_validation.parquet`` to choose
    settings on, ``elsewhere.parquet`` to report. No English text is in two files. Stage ``alone`` of the manifest has
    the program, ``replay`` also ``replayed``, pairs that the model was trained on.
    """
    rows = pd.DataFrame(read_texts(held_out, [*_COLUMNS, "domain"]))
    sizes = rows.groupby("domain")["passage"].nunique()
    program = program or sizes.idxmax()
    if program not in sizes or len(sizes) < 2:
        raise UserError(f"{held_out}: holds {', '.join(sizes.index)}; name one of several with --program")
    own = rows[rows["domain"] == program]
    texts = np.array(sorted(set(own["passage"])), dtype=object)
    order = texts[np.argsort(_draws(_SPLIT, texts), kind="stable")]
    is_tested = own["passage"].isin(order[: round(_TEST_SHARE * len(order))])
    others = rows[(rows["domain"] != program) & ~rows["passage"].isin(texts)]
    half = _draws(_HALF, others["passage"]) & np.uint64(1)
    trained = own[~is_tested].copy()
    negatives = sorted(set(trained["passage"]))
    for number in range(_NEGATIVES):
        drawn = keyed_bits(_NEGATIVE, number, trained.index.to_numpy(np.uint64)) % np.uint64(max(len(negatives), 1))
        pairs = zip(drawn.tolist(), trained["passage"], strict=True)
        trained[f"negative_{number + 1}"] = [another(negatives, start, passage) for start, passage in pairs]
    files = {"train": trained, "program": own[is_tested]}
    files |= {"elsewhere_validation": others[half == 0], "elsewhere": others[half == 1]}
    output.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        if table.empty:
            raise UserError(f"{held_out}: no message is left for {name}; choose a larger program with --program")
        table.drop(columns="domain").to_parquet(output / f"{name}.parquet", index=False)
    shared = {"task_type": "retrieval", "symmetric": True, "instruction": "Retrieve the English translation."}
    shared |= {"languages": ["eng"], "licence": "each program's own"}
    sources = [
        {"name": program, "files": ["train.parquet"], "stages": ["alone", "replay"], **shared},
        {"name": "replayed", "files": [str(replayed.resolve())], "stages": ["replay"], **shared},
    ]
    write_whole(output / "manifest.yaml", yaml.safe_dump({"sources": sources}, sort_keys=False))
    return program


def _draws(purpose: int, texts: Iterable[str]) -> np.ndarray:
    return keyed_bits(purpose, np.array([text_key(text) for text in texts], dtype=np.uint64))


def another(texts: Sequence[str], start: int, passage: str) -> str:
    """Return the text at ``start``, or the nearest before it that is not a spelling of the passage."""
    around = (texts[start - back] for back in range(len(texts)))
    return next((text for text in around if normalise(text) != normalise(passage)), texts[start - 1])


def compare_by_text(after: np.ndarray, before: np.ndarray, labels: np.ndarray) -> PairedTest:
    """Test the difference of two accuracies, with an English text and all of its translations as one example.

    Each text counts by the linear part of what it adds to the mean over messages, a ratio of two sums (Cochran,
    Sampling Techniques, 1977, section 6.3). ``(n,)`` hits of both models, and numbers of the messages' texts.
    """
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)

    def influences(hits: np.ndarray) -> np.ndarray:
        mean = hits.mean()
        return mean + np.bincount(group, hits - mean) / counts.mean()

    return paired_test([influences(after)], [influences(before)])


def table(program: str, result: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the result in Markdown: accuracies, and changes from the first model in points with 95 % intervals."""
    lines = [f"| | {program} | change | elsewhere | change | weights saved |", "| --- " * 6 + "|"]
    for name, row in result.items():
        cells = [name]
        for score in (row.get("program", {}), row.get("elsewhere", {})):
            change = [100 * score[key] for key in ("change", "low", "high") if key in score]
            cells.append(f"{score['accuracy']:.3f}" if score else "not measured")
            cells.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*change) if change else "")
        lines.append(f"| {' | '.join(cells)} | {row['megabytes']:.2f} MB |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = command_parser("adaptation.py", __doc__)
    parser.add_argument("--data", type=Path, default=Path("runs/gettext/data"), help="the gettext build (%(default)s)")
    parser.add_argument("--model", default="runs/gettext/train/model", help="what was trained on it (%(default)s)")
    parser.add_argument("--program", help="domain of a held-out program (default: the largest)")
    parser.add_argument("--output", type=Path, default=Path("runs/adaptation"), help="folder to write (%(default)s)")
    parser.add_argument("--validate", action="store_true", help="measure elsewhere on its validation half, alone")
    return parser


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = make_parser().parse_args(words)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    data, output = arguments.output / "data", arguments.output
    keys = {"model": arguments.model, "manifest": str(data / "manifest.yaml"), "output_dir": str(output)}
    stages = [stage.name for stage in load_recipe(RECIPE, {"model": arguments.model}).stages]
    ours = ["data", "validation.json", "adaptation.json", *stages, ".*"]
    check_output(output, [arguments.data, Path(arguments.model)], ours)
    check_output(data, ours=["program.parquet", "train.parquet", "elsewhere*.parquet", "manifest.yaml", ".*"])
    replayed = arguments.data / "gettext_translation.parquet"
    program = split_program(arguments.data / "held_out.parquet", data, arguments.program, replayed)
    models = {"before": Path(arguments.model)}
    models |= {stage.name: run_stage(stage, resume=True) for stage in load_recipe(RECIPE, keys).stages}
    files, name = {"program": "program", "elsewhere": "elsewhere"}, "adaptation.json"
    if arguments.validate:
        files, name = {"elsewhere": "elsewhere_validation"}, "validation.json"
    candidates = arguments.data / "candidates.parquet"
    pairs = {where: load_pairs(data / f"{file}.parquet", candidates) for where, file in files.items()}
    result, counts = _measure(models, pairs), {where: len(each.queries) for where, each in pairs.items()}
    write_whole(output / name, json.dumps({"program": program, **counts, **result}, indent=2))
    sys.stdout.write(f"{counts}\n{table(program, result)}\n")


def _measure(models: Mapping[str, Path], pairs: Mapping[str, Pairs]) -> dict[str, dict[str, Any]]:
    """Return the size and accuracies of each model, with their changes from the first model."""
    result: dict[str, dict[str, Any]] = {}
    first: dict[str, np.ndarray] = {}
    for name, folder in models.items():
        model = load_encoder(resolve(str(folder), "--model"), "--model")
        result[name] = {"megabytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6}
        for where, each in pairs.items():
            encoded = encode_pairs(model, each)
            hits = each.hits(nearest(encoded.queries, encoded.candidates, encoded.queries.shape[1])).astype(np.float64)
            result[name][where] = {"accuracy": float(hits.mean())}
            if where in first:
                # A message with several English texts counts with the first of them.
                texts = np.array([own[0] for own in each.relevant])
                change = compare_by_text(hits, first[where], texts).difference
                result[name][where] |= {"change": change.mean, "low": change.low, "high": change.high}
            first.setdefault(where, hits)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
