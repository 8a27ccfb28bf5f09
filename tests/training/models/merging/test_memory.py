from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


def _growth(*words: object) -> float:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("memory_worker.py"), *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a part of the work")
def test_a_merge_holds_one_shard(save_model, tmp_path):
    small = save_model("small")
    parents = [save_model(f"m{seed}", seed=seed, **SHAPE) for seed in range(3)]
    size = (parents[0] / "model.safetensors").stat().st_size / 2**20
    assert size > 200
    whole = _growth(tmp_path / "whole", "5GB", small, *parents)
    sharded = _growth(tmp_path / "sharded", "20MB", small, *parents)
    assert len(list((tmp_path / "sharded").glob("model-*"))) > 10
    # A shard of the average, and a tensor of it and of a parent.
    assert sharded < 60 < 0.9 * size < whole
