"""Training on a user's own files: their build, replay against forgetting, and the model before and after."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from hashlib import blake2b
from itertools import chain
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.common.outputs import locked, write_whole
from training.common.run_folder import FINAL_MODEL
from training.config.arguments import StageArguments
from training.data.builders import build
from training.data.manifest import MANIFEST, load_manifest, read_manifest, write_manifest
from training.data.mining.corpus import save_arrays
from training.data.published import PublishedFile
from training.evaluation import comparison
from training.evaluation.comparison import HeldOut, Part, Scores, read_held_out, score, sentence, summary, table
from training.models.encoders import load_encoder
from training.models.model_ref import ModelRef, resolve

if TYPE_CHECKING:
    from training.data.building.build_file import RawSource

logger = logging.getLogger("training")

# In the run's folder: own data, other data to score on, names of CLDR, data to replay, and what is mixed of them.
OWN, ELSEWHERE, CLDR, REPLAY, MIXED = "data", "elsewhere", "cldr", "replay", "mixed"
_BEFORE, _RESULT, _MADE_BY = "before.npz", "comparison.json", "made by"
REPORT = "build.json"
OWN_NAMES = (OWN, ELSEWHERE, CLDR, REPLAY, MIXED, _BEFORE, _RESULT)
# Queries of a set that are scored, a sample of more.
_MOST_QUERIES = 2000
# Languages of many scripts and regions: all 246 take a minute to build.
_LANGUAGES = "ar de el es fa fi fr he hi id ja ko pl ru sw th tr uk vi zh".split()
NONE = "none"


@cache
def _sources(names: tuple[str, ...], columns: tuple[str, ...], **keys: Any) -> tuple[int, list[RawSource]]:
    """Recognise data once in a command, which says what it is."""
    # 🤗 `datasets` takes seconds to load, and trainings on a manifest need not have it.
    from datasets import disable_progress_bars

    from training.data.building.recognise import own_sources

    disable_progress_bars()
    return own_sources(names, columns, **keys)


def _builds(args: StageArguments) -> dict[str, tuple[int, list[RawSource]]]:
    """Return what is to be built of files, by the folder in the run's."""
    columns, bad = tuple(args.columns or ()), args.on_bad_row
    builds = {OWN: _sources(tuple(args.data), columns, held_out_share=args.held_out_share, on_bad_row=bad)}
    if args.elsewhere not in (None, NONE):
        builds[ELSEWHERE] = _sources((args.elsewhere,), (), held_out_share=1, on_bad_row=bad)
    if args.replay and args.replay_data:
        builds[REPLAY] = _sources(tuple(args.replay_data), (), on_bad_row=bad)
    return builds


def check_own_data(args: StageArguments) -> None:
    """Read all rows of a stage's files and raise the error of the first faulty one, before anything is written."""
    if not args.data:
        return
    # Loads 🤗 `datasets`.
    from training.data.building.build_file import check_source, load_source

    builds = _builds(args)
    held_out = _held_out(builds)
    for seed, sources in builds.values():
        for source in sources:
            check_source(source, seed, load_source(source, Path()), held_out)


def _held_out(builds: Mapping[str, tuple[int, Sequence[RawSource]]]) -> frozenset[str]:
    """Return the queries that are held out of any of the files, and must not be trained on from another one."""
    from training.data.building.build_file import held_out_forms

    return frozenset().union(*(held_out_forms(seed, sources, Path()) for seed, sources in builds.values()))


def build_own_data(args: StageArguments) -> Path:
    """Build the stage's files below its folder, or find them built, and return the manifest of those to train on."""
    # Loads 🤗 `datasets`.
    from training.data.building.build_file import build_sources

    folder, builds = Path(args.output_dir), _builds(args)
    held_out = _held_out(builds)
    for name, (seed, sources) in builds.items():
        build_sources(seed, sources, Path(), folder / name, held_out=held_out)
    if args.elsewhere is None or (args.replay and not args.replay_data):
        build("cldr", folder / CLDR, args.seed, {"languages": _LANGUAGES})
    return folder / OWN / MANIFEST


def add_replay(args: StageArguments, manifest: Path) -> Path:
    """Return a manifest with the sources to replay as well, capped so that these have their share of the rows."""
    folder, mixed = Path(args.output_dir), Path(args.output_dir) / MIXED
    other = folder / (REPLAY if args.replay_data else CLDR) / MANIFEST
    own, replayed = read_manifest(manifest).entries, read_manifest(other).entries
    rows = sum(PublishedFile(file).num_rows for source in load_manifest(manifest) for file in source.files)
    cap = max(1, round(rows * args.replay / (1 - args.replay) / len(replayed)))
    entries = []
    for path, listed, most in ((manifest, own, None), (other, replayed, cap)):
        for entry in listed:
            files = [relpath(path.parent / file, mixed) for file in entry.files]
            entries.append({**asdict(entry), "files": files, **({"cap": most} if most else {})})
    # The other processes find it.
    if args.should_save:
        mixed.mkdir(exist_ok=True)
        write_manifest(mixed / MANIFEST, entries)
    return mixed / MANIFEST


def held_out_sets(args: StageArguments) -> dict[str, list[HeldOut]]:
    """Return the sets to score a stage's model on, by the name of the part of the answer."""
    folder = Path(args.output_dir)
    parts: dict[str, list[HeldOut]] = {}
    for name, (_, sources) in _builds(args).items():
        for source in sources if name != REPLAY else ():
            queries, candidates = (
                folder / name / f"{source.name}.{kind}.parquet" for kind in ("held_out", "candidates")
            )
            held_out = read_held_out(source.name, queries, candidates, _MOST_QUERIES, args.seed)
            part = comparison.YOURS if name == OWN else comparison.ELSEWHERE
            # A correlation has no mean with scores of queries.
            part += " (graded pairs)" * (held_out.grades is not None)
            parts.setdefault(part, []).append(held_out)
    if args.elsewhere is None:
        queries, candidates = (folder / CLDR / f"{kind}.parquet" for kind in ("held_out", "candidates"))
        parts[comparison.ELSEWHERE] = [
            read_held_out("names of Unicode CLDR", queries, candidates, _MOST_QUERIES, args.seed)
        ]
    return parts


def _scores(model: ModelRef, key: str, args: StageArguments, sets: dict[str, list[HeldOut]]) -> dict[str, list[Scores]]:
    encoder = load_encoder(model, key)
    width = encoder.get_embedding_dimension()
    dims = args.train_dims(width) or [width]
    return {part: [score(encoder, each, dims) for each in own] for part, own in sets.items()}


def compares(args: StageArguments) -> bool:
    """Return whether a stage's model is compared with its start."""
    return bool(args.data and args.model and args.held_out_share and not args.prunes)


def score_start(args: StageArguments) -> None:
    """Score the start model on the sets, unless that was done."""
    path, start = Path(args.output_dir) / _BEFORE, resolve(args.model, "key 'model'")
    made_by = _made_by(args, start.identity)
    if path.exists() and np.load(path)[_MADE_BY] == made_by:
        return
    sets = held_out_sets(args)
    for held_out in chain.from_iterable(sets.values()):
        logger.info("scored before and after: %s", held_out)
    arrays = {
        json.dumps([part, number, *key]): values
        for part, own in _scores(start, "key 'model'", args, sets).items()
        for number, each in enumerate(own)
        for key, values in each.items()
    }
    with locked(path):
        save_arrays(path, **arrays, **{_MADE_BY: np.array(made_by)})


def _made_by(args: StageArguments, identity: str) -> str:
    """Return what the scores of the start depend on, as text."""
    reports = [Path(args.output_dir) / name / REPORT for name in (OWN, ELSEWHERE, CLDR)]
    described = [args.elsewhere, *(path.read_text(encoding="utf-8") for path in reports if path.exists())]
    return blake2b(json.dumps([identity, args.seed, args.matryoshka_dimensions, *described]).encode()).hexdigest()


def answer(args: StageArguments) -> dict[str, Any]:
    """Score the finished model, compare it with the start, write ``comparison.json`` and print the answer."""
    folder = Path(args.output_dir)
    sets, model = held_out_sets(args), resolve(str(folder / FINAL_MODEL), "output_dir")
    before: dict[str, list[Scores]] = {part: [{} for _ in own] for part, own in sets.items()}
    with np.load(folder / _BEFORE) as arrays:
        for name in {*arrays.files} - {_MADE_BY}:
            part, number, metric, dim = json.loads(name)
            before[part][number][metric, dim] = arrays[name]
    after = _scores(model, "output_dir", args, sets)
    parts = [Part(name, own, before[name], after[name]) for name, own in sets.items()]
    dims = sorted({dim for scores in after.values() for each in scores for _, dim in each}, reverse=True)
    result = summary(parts, dims)
    content = {
        "start": args.model,
        "model": model.identity,
        "sets": {name: list(map(str, own)) for name, own in sets.items()},
    }
    write_whole(folder / _RESULT, json.dumps(content | {"scores": result}, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.write(f"\n{table(result)}\n\n{sentence(result)}\n\n{folder / _RESULT}\n")
    return result
