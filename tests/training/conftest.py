"""What the tests of the recipe share: a small tokenizer, sources on disk, and a check of error messages."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests.training.recipes import killed, write_single_stage
from training.common.errors import UserError
from training.data.manifest import Source
from training.data.preparation.pipeline import prepare
from training.data.preparation.plan import PreparationOptions
from training.models.loading import train_tokenizer
from training.run_stage import main

NUM_HARD_NEGATIVES = {"retrieval": 2, "clustering": 3, "classification": 1}
_WORDS = "river größer 東京 ответ lamp čaj window שלום sugar नमस्ते seven orbit paper quiet".split()


def _text(kind, number, words=4):
    chosen = [_WORDS[(number * 5 + i * (number % 7 + 1)) % len(_WORDS)] for i in range(words)]
    return f"{kind} {number} {' '.join(chosen)}"


def _columns(name, rows, negatives):
    """Queries are distinct, passages and negatives repeat, every tenth passage is long."""
    ks = range(1, negatives + 1)
    return {
        "query": [_text(f"{name} question", row) for row in rows],
        "passage": [_text(f"{name} answer", row % 61, 60 if row % 10 == 0 else 4) for row in rows],
        **{f"negative_{k}": [_text(f"{name} negative", (row * 3 + k * 17) % 97) for row in rows] for k in ks},
    }


def _write_source(folder, name="source", rows=100, negatives=4, **fields):
    """A source of as many files as there are counts of ``negatives``, between which the rows are divided."""
    counts = [negatives] if isinstance(negatives, int) else negatives
    files = []
    for number, count in enumerate(counts):
        own = range(rows * number // len(counts), rows * (number + 1) // len(counts))
        files.append(folder / f"{name}_{number}.parquet")
        pq.write_table(pa.table(_columns(name, own, count)), files[-1])
    return Source(name, files, **{"task_type": "retrieval", "instruction": f"Answer from {name}.", **fields})


@pytest.fixture(scope="session")
def small_tokenizer():
    """Byte-level BPE with Qwen's pre-tokenization; its merges span the end of a prompt and the text that follows."""
    texts = [_text(kind, number) for number in range(100) for kind in ("question", "Query: answer", "negative")]
    return train_tokenizer(iter(texts), vocab_size=400)


@pytest.fixture
def write_source(tmp_path):
    return partial(_write_source, tmp_path)


@pytest.fixture(scope="session")
def options():
    return PreparationOptions(max_length=48, num_hard_negatives=tuple(NUM_HARD_NEGATIVES.items()))


@pytest.fixture(scope="session")
def prepared_sources(tmp_path_factory, small_tokenizer, options):
    """One prepared source of each task type; the files of the first have 2 and 5 negatives."""
    folder = tmp_path_factory.mktemp("sources")
    sources = [
        _write_source(folder, "qa", rows=90, negatives=(2, 5)),
        _write_source(folder, "topics", rows=40, negatives=6, task_type="clustering", symmetric=True),
        _write_source(folder, "polarity", rows=17, negatives=1, task_type="classification"),
    ]
    return prepare(sources, small_tokenizer, folder / "prepared", options)


@pytest.fixture(scope="session")
def num_hard_negatives():
    return dict(NUM_HARD_NEGATIVES)


@pytest.fixture(scope="session")
def refuses():
    """A block that must end in a :class:`UserError` of one line that names all the parts given."""

    @contextmanager
    def refuse(*parts):
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert len(message.splitlines()) == 1, message
        for part in parts:
            assert str(part) in message

    return refuse


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A folder in which the single tiny stage ran to its end without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([str(write_single_stage(folder))]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def check_same_weights(uninterrupted):
    """``check_same_weights(run)``: the finished model of a run has bit for bit the weights of the uninterrupted one."""

    def check(run, expected=uninterrupted, model=None):
        weights = load_file((model or expected / "model") / "model.safetensors")
        resumed = load_file(run / "model/model.safetensors")
        assert resumed.keys() == weights.keys()
        assert not [name for name, tensor in weights.items() if not torch.equal(resumed[name], tensor)]

    return check


@pytest.fixture(scope="session")
def stopped_at_4(tmp_path_factory):
    """A folder of a run of ten steps that was killed after its fourth, with checkpoints of the second and fourth."""
    folder = tmp_path_factory.mktemp("stopped_at_4")
    killed(write_single_stage(folder, save_steps=2), 4)
    return folder


@pytest.fixture
def write_stopped(stopped_at_4, tmp_path):
    """Copies that run to the test's folder and writes its recipe with other keys."""
    shutil.copytree(stopped_at_4 / "run", tmp_path / "run")
    manifest = str(stopped_at_4 / "data/manifest.yaml")
    return lambda **keys: write_single_stage(tmp_path, **{"save_steps": 2, "manifest": manifest, **keys})


@pytest.fixture
def resumes_exactly(tmp_path, check_same_weights):
    """``resumes_exactly(recipe)``: the run below the test's folder goes on to the weights of the uninterrupted one."""

    def check(recipe, *words):
        assert main([str(recipe), "--resume", *words]) == 0
        check_same_weights(tmp_path / "run")

    return check
