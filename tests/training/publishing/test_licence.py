"""The licence of a release follows from what the model was made of, or is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.training.publishing.packed import put_in_cache, rewrite_recipe
from training.data.cldr.sources import LICENCE as CLDR
from training.data.gettext_catalogs.sources import LICENCE as GETTEXT
from training.merge import main as merge
from training.publish import main
from training.publishing.pack import PERMISSIVE
from training.publishing.record import load_release
from training.stages.continuation import check_data, note_changes

pytestmark = pytest.mark.usefixtures("no_figures")


def pack(runs, stage="student", *words):
    return main(["pack", str(runs / stage), "--name", "tiny", "--output", str(runs.parent / "packed"), *words])


def relicense(runs, **licences):
    path = runs.parent / "data/manifest.yaml"
    content = yaml.safe_load(path.read_text())
    for source in content["sources"]:
        given = licences.get(source["task_type"], source.get("licence"))
        source.pop("licence", None) if given is None else source.update(licence=given)
    path.write_text(yaml.safe_dump(content))


def card(folder, named):
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{f'license: {named}' if named else 'tags: [a]'}\n---\n\n# A model\n")
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "given"),
    [("retrieval", "CC-BY-NC-4.0"), ("classification", GETTEXT), ("classification", None)],
)
def test_other_sources_are_asked_about(runs, capsys, kind, given):
    relicense(runs, **{kind: given})
    assert pack(runs) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and "--licence is missing" in told and "--licence-file" in told
    assert f"source tiny_{kind} ({given or 'no licence in the manifest'})" in told
    assert not (runs.parent / "packed").exists()
    assert CLDR.lower() in PERMISSIVE and GETTEXT.lower() not in PERMISSIVE
    relicense(runs, retrieval=CLDR, clustering="MIT", classification="CC0-1.0")
    assert pack(runs) == 0
    assert load_release(runs.parent / "packed").licence == "apache-2.0"


def test_a_collection_of_another_folder_tells_no_licence(runs, capsys):
    data = runs.parent / "data"
    content = yaml.safe_load((data / "manifest.yaml").read_text())
    (retrieval,) = (each for each in content["sources"] if each["task_type"] == "retrieval")
    content["sources"].remove(retrieval)
    other, source = data / "free/other.parquet", data / "bought/tiny_retrieval.parquet"
    for file, given in ((other, "MIT"), (source, "proprietary")):
        file.parent.mkdir()
        file.touch()
        name = file.parent.name
        collection = {"name": name, "files": [f"{name}/*.parquet"], "licence": given, "each_file": True}
        content["sources"].append({**retrieval, **collection})
    (data / "manifest.yaml").write_text(yaml.safe_dump(content))
    assert pack(runs) == 2
    assert "source tiny_retrieval (proprietary)" in capsys.readouterr().err
    # Nor does it when the files of both are gone, or the right entry is.
    for gone in (other, source):
        gone.unlink()
        assert pack(runs) == 2
        assert "source tiny_retrieval (" in capsys.readouterr().err
    other.touch()
    content["sources"].pop()
    (data / "manifest.yaml").write_text(yaml.safe_dump(content))
    assert pack(runs) == 2
    assert "source tiny_retrieval (no licence in the manifest)" in capsys.readouterr().err


def test_earlier_data_and_sources_of_an_earlier_stage_and_of_the_teacher_count(runs, capsys):
    # Stage 1 alone reads this source; the student has it from there and from its teacher.
    rewrite_recipe(runs / "student", sources="tiny_c*")
    relicense(runs, retrieval="proprietary")
    assert pack(runs) == 2
    assert "source tiny_retrieval (proprietary)" in capsys.readouterr().err
    # Neither recipe nor manifest names what was read before a change.
    relicense(runs, retrieval="MIT")
    note_changes(runs / "stage1", check_data(runs / "stage1/data.json", {"other": "0"}, True), None)
    assert pack(runs) == 2
    assert "the data of stage1 (changed while it was trained)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "named"), [("model", "mit"), ("model", None), ("teacher", "apache-2.0"), ("teacher", "llama3")]
)
def test_what_it_started_or_learnt_from_must_allow_it(runs, tmp_path, capsys, key, named):
    rewrite_recipe(runs / "stage1", **{key: card(tmp_path / "their-model", named)})
    assert pack(runs, "stage1") == (0 if named in PERMISSIVE else 2)
    refused = f"model their-model ({named or 'no licence on a card here'})" in capsys.readouterr().err
    assert refused == (named not in PERMISSIVE)


def test_a_start_on_the_hub_is_known_by_its_card_in_the_cache(runs, tmp_path, capsys, hub_cache):
    rewrite_recipe(runs / "stage1", model="org/tiny-base")
    assert pack(runs, "stage1") == 2
    assert "model org/tiny-base (no licence on a card here)" in capsys.readouterr().err
    put_in_cache(Path(card(tmp_path / "card", "apache-2.0")))
    assert pack(runs, "stage1") == 0


def test_a_merged_model_has_the_sources_of_its_parents(runs, capsys):
    assert merge([str(runs / "stage2"), "--output", str(runs / "soup")]) == 0
    assert pack(runs, "soup") == 0
    relicense(runs, clustering="proprietary")
    assert pack(runs, "soup") == 2
    assert "source tiny_clustering (proprietary)" in capsys.readouterr().err
    # Of a parent that is gone nothing is known.
    relicense(runs, clustering="MIT")
    (runs / "stage2/model/config.json").unlink()
    assert pack(runs, "soup") == 2
    assert "model stage2/model (no licence on a card here)" in capsys.readouterr().err
