"""Cuts a random checkpoint of the 0.6B shape to the three smaller sizes, and writes what stock transformers finds.

``pruning_worker.py FOLDER`` writes ``found.json``: parameters and seconds of each, and the process's peak in MiB.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModel

from modeling_f2llm import F2LLMConfig, F2LLMModel
from tests.benchmarks.common import process_memory, random_model
from training.pruning.importance import calibrate
from training.pruning.plan import pruned_config
from training.pruning.pruning import prune

PRUNED = ("f2llm-v2-80m", "f2llm-v2-160m", "f2llm-v2-330m")


def main(folder):
    torch.set_num_threads(1)
    random_model(F2LLMConfig.from_family("f2llm-v2-0.6b")).save_pretrained(folder / "whole")
    model = F2LLMModel.from_pretrained(folder / "whole").eval()
    ids = torch.arange(1000, 1128)[None]
    importance = calibrate(model, [(ids, [96, 32])])
    parameters, seconds = {}, {}
    for name in PRUNED:
        start = time.perf_counter()
        prune(model, pruned_config(model.config, {"family": name}), importance).save_pretrained(folder / name)
        seconds[name] = time.perf_counter() - start
        parameters[name] = AutoModel.from_pretrained(folder / name).num_parameters()
    found = {"parameters": parameters, "seconds": seconds, "peak_mib": process_memory("VmHWM")}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
