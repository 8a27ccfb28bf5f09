"""Print the growth of peak memory by a merge, in MiB: ``merging_worker.py OUTPUT SHARD_SIZE SMALL PARENT …``.

The first merge, of a small model, takes the memory of interpreter and libraries, which does not count.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.benchmarks.common import process_memory
from training.models.merging import merge

output, shard_size, small, *parents = sys.argv[1:]
torch.set_num_threads(1)
merge([small], Path(f"{output}-small"))
# The kernel forgets the peak of the process that started this one.
Path("/proc/self/clear_refs").write_text("5")
before = process_memory("VmHWM")
merge(parents, Path(output), max_shard_size=shard_size)
sys.stdout.write(f"{process_memory('VmHWM') - before:.1f}\n")
