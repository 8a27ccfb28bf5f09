"""Mine the hard negatives that a stage's data lacks, before the data is prepared."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import set_seed

from training.config.arguments import StageArguments
from training.data.manifest import MANIFEST, Source, load_manifest, require_local, select_sources, write_manifest
from training.data.mining.mining import mine
from training.data.mining.search import MiningOptions, bitext_sources
from training.data.published import PublishedFile
from training.models.encoders import Miner, find_miner
from training.models.rerankers import find_reranker, forget_reranker

# In the run's folder: the mined sources and their manifest.
MINED = "mined"


def mine_negatives(args: StageArguments, manifest: Path, data_dir: str | None = None) -> Path:
    """Mine for the stage's retrieval sources in which a row has fewer hard negatives than are drawn.

    Every process calls this, that which saves before the others: it mines, or finds what was mined. Rows keep their own
    negatives, and stay even if too few are found. Returns the manifest of the same sources in ``OUTPUT_DIR/mined``, or
    the one given if no source lacks negatives.
    """
    sources = load_manifest(manifest, data_dir, args.manifest_stage)
    selected = select_sources(sources, args.sources, args.task_types)
    drawn = args.num_hard_negatives["retrieval"]
    poor = [source for source in selected if source.task_type == "retrieval" and _lacks_negatives(source, drawn)]
    if not poor:
        return manifest
    require_local(sources)
    output = Path(args.output_dir) / MINED
    if args.should_save:
        mined = _mine(args, poor, sources, output, manifest)
        _write_manifest(output, sources, mined)
    # To load a model may draw: what follows must not depend on whether the negatives were mined or found.
    set_seed(args.seed)
    return output / MANIFEST


def _lacks_negatives(source: Source, drawn: int) -> bool:
    """Return whether a row of a source has fewer than ``drawn`` negatives."""
    for path in source.files:
        file = PublishedFile(path)
        if len(file.negatives) < drawn:
            return True
        for batch in file.record_batches():
            there = [np.asarray(batch.column(name).is_valid()) for name in file.negatives]
            if drawn and (np.sum(there, axis=0) < drawn).any():
                return True
    return False


def _mine(
    args: StageArguments, poor: Sequence[Source], sources: Sequence[Source], output: Path, manifest: Path
) -> Collection[str]:
    """Mine the sources that lack negatives, and return the names of those whose corpus is large enough."""
    own = max(len(PublishedFile(file).negatives) for source in poor for file in source.files)
    negatives = max(MiningOptions.negatives, args.num_hard_negatives["retrieval"], own)
    reranker = args.reranker and find_reranker(args.reranker, "key 'reranker'", dtype=_dtype(args))
    try:
        mined = mine(
            poor,
            _find_miner(args),
            output,
            MiningOptions(negatives=negatives, keep_short=True, fit=True),
            reranker=reranker,
            bitext=bitext_sources(sources),
            manifest=manifest,
        )
    finally:
        # Training needs its memory.
        forget_reranker()
    # The folder may hold sources of an earlier manifest.
    return mined["sources"].keys() & {source.name for source in poor}


def _dtype(args: StageArguments) -> str:
    return "bfloat16" if args.bf16 else "float32"


def _find_miner(args: StageArguments) -> Miner:
    if args.miner:
        return find_miner(args.miner, "key 'miner'", dtype=_dtype(args))
    # It reads of a text what it will read in training.
    return find_miner(args.model, "key 'model'", dtype=_dtype(args), max_length=args.max_length)


def _write_manifest(output: Path, sources: Sequence[Source], mined: Collection[str]) -> None:
    """Write the manifest of all sources in their order."""
    entries = []
    for source in sources:
        files = [os.path.relpath(Path(file).resolve(), output.resolve()) for file in source.files]
        files = [f"{source.name}.parquet"] if source.name in mined else files
        entries.append({**asdict(source), "files": files})
    write_manifest(output / MANIFEST, entries)
