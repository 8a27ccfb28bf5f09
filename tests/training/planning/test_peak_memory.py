"""Memory follows the token budget, not the batch."""

from __future__ import annotations

import sys

import pytest

from tests.training.processes import ROOT, run_bounded

WORKER = ROOT / "tests/training/peak_memory_worker.py"


def _chunks_and_peak(rows: int, max_tokens: int) -> tuple[int, float]:
    # Blocks that are freed go back to the system at once: what is measured is what the step holds, not how the C
    # library keeps holes of odd sizes for later.
    command = ["env", "MALLOC_MMAP_THRESHOLD_=65536", sys.executable, str(WORKER), str(rows), str(max_tokens)]
    ended = run_bounded(command, seconds=900)
    assert ended.returncode == 0, ended.stdout
    chunks, peak = ended.stdout.split()[-2:]
    return int(chunks), float(peak)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_batch_512_needs_the_memory_of_batch_32() -> None:
    chunks, small = _chunks_and_peak(32, 1024)
    assert chunks == 4
    chunks, large = _chunks_and_peak(512, 1024)
    assert chunks == 60
    assert large <= 1.1 * small
