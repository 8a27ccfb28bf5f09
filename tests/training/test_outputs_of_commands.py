"""No command writes where it reads, nor into a folder of something else: what was there stays, byte for byte."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.training.distributed_recipe import save_model
from tests.training.recipes import write_single_stage, write_sources
from training.build import main as build
from training.common.outputs import locked
from training.decontaminate import main as decontaminate
from training.evaluate import main as evaluate
from training.evaluation.records import Evaluation
from training.examples.adaptation import main as adaptation
from training.examples.claims import RECIPE as CLAIMS
from training.examples.claims import main as claims
from training.export import main as export
from training.merge import main as merge
from training.mine import main as mine
from training.prepare import main as prepare
from training.publish import main as publish
from training.release import main as release
from training.run_stage import main as run_stage


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_config, tiny_tokenizer):
    """A folder of a model, an adapter, data, raw data, a run, an evaluation, recipes and a thesis."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("model", "run/model"):
        save_model(folder / name, tiny_config, tiny_tokenizer)
    write_single_stage(folder, model=str(folder / "model"), model_config=None, tokenizer=None, instructions=None)
    write_sources(folder / "data")
    (folder / "adapter").mkdir()
    base = {"base_model_name_or_path": str(folder / "model")}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(base))
    (folder / "run/recipe.yaml").write_text(yaml.safe_dump({"output_dir": str(folder / "run"), "model": "org/base"}))
    (folder / "raw").mkdir()
    (folder / "raw/texts.jsonl").write_text('{"query": "a", "passage": "b"}\n')
    pairs = {"name": "texts", "dataset": "json", "data_files": "texts.jsonl", "format": "pairs", "instruction": "Find."}
    pairs["columns"] = {"query": "query", "passage": "passage"}
    (folder / "raw/build.yaml").write_text(yaml.safe_dump({"sources": [pairs]}))
    Evaluation().save(folder / "evaluation")
    (folder / "claims").mkdir()
    (folder / "claims/recipe.yaml").write_text(CLAIMS.read_text())
    (folder / "gettext/data").mkdir(parents=True)
    (folder / "gettext/data/train.parquet").write_text("of the build")
    (folder / "other").mkdir()
    (folder / "other/thesis.tex").write_text("mine")
    return folder


@pytest.fixture(scope="module")
def trained(places):
    """A trained adapter."""
    keys = {"lora": True, "max_steps": 1, "save_strategy": "no", "output_dir": str(places / "lora"), "lora_rank": 2}
    assert run_stage([str(places / "single.yaml"), *(f"--{key}={value}" for key, value in keys.items())]) == 0
    return places / "lora/model"


# Thresholds that keep nothing: what would be deleted is gone with exit status 2.
MINE = "--manifest {data}/manifest.yaml --model {model} --replace --max-score -1 --top 9 --skip 0 --negatives 1 "
DECONTAMINATE = "--manifest {data}/manifest.yaml --exact --remove "
TRAIN = "{places}/single.yaml --max_steps 1 "
TAUGHT = TRAIN + "--output_dir {places}/new --teacher {model} "
READ, FOREIGN = "which is read", "which this command did not write"


@pytest.mark.parametrize(
    ("main", "words", "part"),
    [
        (mine, MINE + "--output {data}", READ),
        (mine, MINE + "--output {model}/mined", READ),
        (mine, MINE + "--output {places}/mined --cache {model}", "is read; give another --cache"),
        (mine, MINE + "--output {other}", FOREIGN),
        (decontaminate, DECONTAMINATE + "--output {data}", READ),
        (decontaminate, DECONTAMINATE + "--output {other}", FOREIGN),
        (decontaminate, DECONTAMINATE + "--evaluation {raw}/texts.jsonl:query --output {raw}", READ),
        (build, "{raw}/build.yaml --output {raw}", READ),
        (build, "{raw}/build.yaml --output {other}", "holds something else"),
        (prepare, "--manifest {data}/manifest.yaml --tokenizer {model} --output {data}", READ),
        (prepare, "--manifest {data}/manifest.yaml --tokenizer {model} --output {model}", "is read"),
        (release, "--manifest {data}/manifest.yaml --output {data}", READ),
        (release, "--manifest {data}/manifest.yaml --output {other}", "is not this release"),
        (merge, "{model} {model} --output {model}", "is read"),
        (merge, "{model} {model} --output {model}/soup", READ),
        (merge, "{model} {model} --output {other}", "holds something else"),
        (merge, "{adapter} --output {model}", "is read"),
        (merge, "{adapter} --output {adapter}/merged", READ),
        (export, "{model} --backend onnx --output {model}/onnx", READ),
        (export, "{model} --backend onnx --output {other}", "holds something else"),
        (export, "{model} --backend gguf --output {model}/model.safetensors", READ),
        (export, "{model} --backend gguf --output {model}", "is read"),
        (export, "{model} --backend gguf --output {other}/thesis.tex", "not a GGUF file"),
        (evaluate, "{model} --local {data}/pairs.parquet --output {data}", READ),
        (evaluate, "{model} --local {data}/pairs.parquet --output {model}/evaluation", READ),
        (evaluate, "{model} --local {data}/pairs.parquet --output {other}", FOREIGN),
        (evaluate, "--report {evaluation} --output {other}", FOREIGN),
        (publish, "pack {run} --name tiny --licence-file {other}/thesis.tex --output {run}/model/packed", READ),
        (publish, "pack {run} --name tiny --output {other}", "is no packed model"),
        (run_stage, TRAIN + "--output_dir {model}", "is read; give another output_dir"),
        (run_stage, TRAIN + "--output_dir {model}/tuned", READ),
        (run_stage, TRAIN + "--output_dir {data}", "is the folder of"),
        (run_stage, TRAIN + "--output_dir {other}", "holds something else"),
        (run_stage, TRAIN + "--output_dir {places}/new --prepared_dir {data}", "give another prepared_dir"),
        (run_stage, TAUGHT + "--teacher_cache_dir {model}", "give another teacher_cache_dir"),
        (claims, "--recipe {places}/claims/recipe.yaml --output {places}/claims", READ),
        (claims, "--recipe {places}/claims/recipe.yaml --output {other}", FOREIGN),
        (adaptation, "--data {gettext}/data --model {model} --output {gettext}", READ),
        (adaptation, "--data {gettext}/data --model {model} --output {other}", FOREIGN),
    ],
)
def test_an_output_over_an_input_or_something_foreign_is_refused(places, capsys, main, words, part):
    before = {path: path.read_bytes() for path in places.rglob("*") if path.is_file()}
    named = {path.name: str(path) for path in places.iterdir()}
    assert main(words.format(places=places, **named).split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and part in error
    assert {path: path.read_bytes() for path in places.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (merge, "{model} {model} --output {output}"),
        (merge, "{trained} --output {output}"),
        (export, "{model} --backend gguf --output {output}"),
    ],
)
def test_two_commands_never_write_the_same_output(places, trained, tmp_path, caplog, main, words):
    if main is export:
        pytest.importorskip("gguf")
    caplog.set_level("INFO", logger="training")
    output = tmp_path / "output"
    given = words.format(model=places / "model", trained=trained, output=output).split()
    with ThreadPoolExecutor(1) as pool:
        with locked(output):
            ended = pool.submit(main, given)
            while "another command is writing it" not in caplog.text:
                assert not ended.done()
                time.sleep(0.01)
            assert not list(tmp_path.glob("output")) and not list(tmp_path.glob(".*.partial"))
        assert ended.result() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
