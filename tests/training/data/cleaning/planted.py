"""Sources of generated rows in which repeats and leaks can be planted."""

from __future__ import annotations

import numpy as np
import yaml

from training.common.executor import Executor
from training.data.published import rows_table, write_parquet

# In this process: nothing to start.
HERE = Executor(workers=1)

_SYLLABLES = "ka lo mi ter nu so vi ran del po qui sha yem bro fil gus han jor wex zut".split()
# Characters that stand next to one another without a space; consonants only in Thai.
_HAN = [chr(0x4E00 + 7 * i) for i in range(2000)]
_THAI = [chr(0x0E01 + i) for i in range(46)]


def sentence(rng, count, script="Latn"):
    if script == "Latn":
        return " ".join("".join(rng.choice(_SYLLABLES, size=3)) for _ in range(count))
    return "".join(rng.choice(_HAN if script == "Hani" else _THAI, size=count))


def clean_rows(seed, count=60):
    """Queries and passages of all lengths, with the questions of a long passage and of a short answer among them."""
    rng = np.random.default_rng(seed)
    rows = [[sentence(rng, 4 + i % 9), sentence(rng, 6 + 5 * (i % 15))] for i in range(count)]
    for script in ("Hani", "Thai"):
        rows += [[sentence(rng, 8, script), sentence(rng, 80, script)] for _ in range(5)]
    paragraph = sentence(rng, 120)
    rows += [[sentence(rng, 6), paragraph] for _ in range(5)]
    rows += [[sentence(rng, 6), "yes"] for _ in range(5)]
    # One word makes another question of a short one.
    return [*rows, ["what is the capital of Peru", "a city"], ["what is the capital of Mali", "a city"]]


def write_manifest(folder, sources, **fields):
    """One source a key, one file an item; rows have a negative and a column that is not text for training."""
    entries = []
    for name, files in sources.items():
        paths = []
        for number, rows in enumerate(files):
            path = folder / f"{name}_{number}.parquet"
            queries, passages = zip(*rows, strict=True)
            negatives = [[f"negative {i}" if i % 7 else None for i in range(len(rows))]]
            write_parquet(path, [rows_table(queries, passages, negatives, lang=["und"] * len(rows))])
            paths.append(path.name)
        entries.append({"name": name, "files": paths, "task_type": "retrieval", "instruction": "Answer.", **fields})
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"sources": entries}), encoding="utf-8")
    return manifest
