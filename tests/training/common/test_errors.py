"""What to do is said in the words of the command that says it."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from tests.training.recipes import write_recipe, write_single_stage
from training import prepare as prepare_command
from training.common.command import run_command
from training.common.errors import InterruptedTrainingError, OutputError, StoppedError, UserError
from training.data.published import Fault, bad_row
from training.examples import claims
from training.run_stage import main


def test_another_command_puts_its_own_remedy_in_the_place() -> None:
    error = OutputError("there: holds another run", "add --resume")
    assert str(error) == "there: holds another run; add --resume" and error.what == "there: holds another run"
    other = error.advising("give another --output")
    assert str(other) == "there: holds another run; give another --output" and type(other) is OutputError
    # A remedy that is the same everywhere stays.
    assert str(UserError("no such file; check the path").advising("x")) == "no such file; check the path"


@pytest.mark.parametrize(
    "error",
    [UserError("a", "b"), UserError("a"), StoppedError("a", "b"), InterruptedTrainingError("a", "b", signal.SIGTERM)],
)
def test_errors_come_out_of_other_processes_as_they_are(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_a_command_says_itself_how_to_go_on(capsys: pytest.CaptureFixture) -> None:
    def stop() -> None:
        raise StoppedError("a/checkpoint-1: could not be written", "Mend that and run the same command with --resume")

    assert run_command(stop) == 1
    line = "stopped: a/checkpoint-1: could not be written. To go on, run the same command again\n"
    assert capsys.readouterr().err == line


def _spoil(folder: Path) -> None:
    path = folder / "data/retrieval.parquet"
    columns = pq.read_table(path).to_pydict()
    columns["query"][3] = " "
    pq.write_table(pa.table(columns), path)


def test_bad_rows_are_put_aside_only_where_that_can_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert str(bad_row("a.parquet", 2, Fault(1, "query", "is null"))).endswith("is null; correct or drop the row")
    tokenizer, manifest = str(tmp_path / "tokenizer"), str(tmp_path / "data/manifest.yaml")
    tiny_tokenizer.save_pretrained(tokenizer)
    recipe = write_single_stage(tmp_path, tokenizer=tokenizer)
    _spoil(tmp_path)
    assert main([str(recipe), "--dry-run"]) == 2
    assert "put bad rows aside with on_bad_row: quarantine" in capsys.readouterr().err
    words = ["--manifest", manifest, "--tokenizer", tokenizer, "--output", str(tmp_path / "prepared")]
    words += ["--sources", "tiny_retrieval", "--num-hard-negatives-retrieval", "3"]
    assert prepare_command.main(words) == 2
    assert "put bad rows aside with --on-bad-row quarantine" in capsys.readouterr().err
    assert prepare_command.main([*words, "--max-length", "0"]) == 2
    assert "--max-length must be at least 1" in capsys.readouterr().err
    assert prepare_command.main([*words, "--sources", "nothing"]) == 2
    assert "no source fits 'nothing'; there are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("max_length is 0", "--max-length is 0"),
        ("lower key 'max_length'", "lower --max-length"),
        ("write 'max_length: 4', or less", "write --max-length 4, or less"),
        ("/data/max_length/a.parquet: no such file", "/data/max_length/a.parquet: no such file"),
        ("key 'sources' must list at least one source", "key 'sources' must list at least one source"),
    ],
)
def test_keys_are_written_as_options_where_they_are_options(message: str, expected: str) -> None:
    assert prepare_command._with_options(message, ["max_length", "sources"]) == expected


def test_a_command_that_runs_recipes_does_not_advise_options_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses
) -> None:
    def refuse(stage: object, resume: bool) -> None:
        raise OutputError("run: the recipe changed", "add --accept-changes to go on regardless")

    monkeypatch.setattr(claims, "run_stage", refuse)
    with refuses("run: the recipe changed; mend or undo that, or give another --output"):
        claims.run_seed(write_recipe(tmp_path), 0, tmp_path, tmp_path / "data/manifest.yaml", None)
