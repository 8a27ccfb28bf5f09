"""What the READMEs tell a reader to run: commands parse, Python runs, links lead somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer

from modeling_f2llm import DEFAULT_PROMPTS, F2LLMConfig, F2LLMModel, build_sentence_transformer
from tests.hub_cards.library_calls import expected_calls, library_calls
from training.config.recipe import command_line_overrides, load_recipe
from training.data.manifest import load_manifest

ROOT = Path(__file__).parents[1]
_FOUND = [path for room in ("modeling_f2llm", "training", "hub_cards", "tests") for path in (ROOT / room).rglob("*.md")]
READMES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *_FOUND])
READMES.remove("hub_cards/examples/README.md")
README, MODELING = ROOT / "README.md", ROOT / "modeling_f2llm" / "README.md"
# A command of this project in a line of a shell, whatever starts it: python, another environment's, a launcher.
COMMAND = re.compile(r"(?:training|tests)/[\w/]+\.py")


def _snippets(language, path=README):
    text = path.read_text(encoding="utf-8")
    # A comment marks code that needs another library, or is not run.
    return re.findall(rf"(?<!-->\n)```{language}\n(.*?)```", text, flags=re.DOTALL)


def _lines(name):
    """Commands of a file's shell blocks, without comments."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from filter(None, (part.strip() for part in re.sub(r"\s#.*", "", line).split("&&")))


def _own_commands():
    for name in READMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        inline = re.findall(r"`(python (?:training|tests)/[^`]+)`", text)
        yield from (
            (name, line) for line in [*_lines(name), *inline] if COMMAND.search(line) and "-m pytest" not in line
        )


def _parse(line):
    words = shlex.split(line)
    script = next(word for word in words if COMMAND.fullmatch(word))
    assert (ROOT / script).is_file(), script
    given = [word for word in words[words.index(script) + 1 :] if word != "…"]
    if not given:
        # The name of a command alone, as in a table.
        return
    parser: argparse.ArgumentParser = import_module(script[:-3].replace("/", ".")).make_parser()
    if script == "training/run_stage.py":
        # Keys of a recipe follow the options of the command; as there, a first option means the default recipe.
        _, keys = parser.parse_known_args(["recipe.yaml", *given] if given[0].startswith("-") else given)
        command_line_overrides(keys)
    else:
        parser.parse_args([word.strip("[]") for word in given])


@pytest.mark.parametrize(("name", "line"), list(_own_commands()))
def test_commands_are_those_that_the_parsers_know(name, line):
    try:
        _parse(line)
    except SystemExit as error:
        # --help ends with 0.
        assert error.code == 0, f"{name}: {line}"


def test_all_make_targets_exist_and_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = {line.split()[1] for name in READMES for line in _lines(name) if line.startswith("make ")}
    assert named and named <= targets


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / name).parent.joinpath(link).exists()] == []


def test_other_libraries_are_given_the_query_prompt():
    expected = expected_calls("f2llm-v2-330m", DEFAULT_PROMPTS["query"], DEFAULT_PROMPTS["document"])
    assert library_calls(MODELING.read_text(encoding="utf-8")) == expected


def test_python_snippets_run(tmp_path, monkeypatch, capsys, tiny_config, tiny_tokenizer, sentences):
    config = F2LLMConfig(**{**tiny_config.to_dict(), "hidden_size": 320, "matryoshka_dimensions": None})
    model = build_sentence_transformer(F2LLMModel(config), deepcopy(tiny_tokenizer))
    model.save_pretrained(str(tmp_path / "f2llm-v2-330m"))
    pairs = {"query": sentences[:4], "passage": sentences[4:8], "negative_1": sentences[6:]}
    pq.write_table(pa.table(pairs), tmp_path / "my_pairs.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    namespace: dict = {}
    # The package's README goes on with the model of the first one.
    for snippet in [*_snippets("python"), *_snippets("python", MODELING)]:
        exec(snippet, namespace)
    # Files of the checkout are named from its root.
    (tmp_path / "training").symlink_to(ROOT / "training")
    others = [ROOT / name for name in READMES if ROOT / name not in (README, MODELING)]
    for path in others:
        own: dict = {}
        for snippet in _snippets("python", path):
            exec(snippet, own)
    assert namespace["queries"].shape == (1, 256)
    # Compared by the inner product.
    assert np.linalg.norm(namespace["full"], axis=1) == pytest.approx(np.ones(3))
    assert [path.name for path in Path("my-adapter").glob("*model*.safetensors")] == ["adapter_model.safetensors"]
    unadapted = SentenceTransformer("f2llm-v2-330m", trust_remote_code=True).encode(sentences)
    assert (namespace["adapted"].encode(sentences) == unadapted).all()
    namespace["adapted"].enable_adapters()
    assert abs(namespace["adapted"].encode(sentences) - unadapted).max() > 1e-5
    assert "tensor" in capsys.readouterr().out


def test_the_search_runs_on_a_model_narrower_than_its_shortlist_takes(tiny_model, tiny_tokenizer, capsys):
    pytest.importorskip("faiss")
    (snippet,) = [text for text in _snippets("python", MODELING) if "IndexBinaryFlat" in text]
    exec(snippet, {"model": build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer))})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_manifest_and_recipe_of_the_readme_are_valid(tmp_path):
    manifest, recipe = tmp_path / "manifest.yaml", tmp_path / "my_recipe.yaml"
    manifest.write_text(next(text for text in _snippets("yaml") if "sources:" in text))
    (tmp_path / "webfaq_kor.parquet").touch()
    assert load_manifest(manifest)[0].languages == ["kor"]
    recipe.write_text(next(text for text in _snippets("yaml") if "stages:" in text))
    (stage,) = load_recipe(recipe, {"use_cpu": True}).stages
    assert (stage.name, stage.arguments.output_dir) == ("finetune", "runs/mine/finetune")


def test_family_table_has_the_published_shapes():
    rows = re.findall(
        r"^\| (f2llm-v2-\S+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) / (\d+) ", README.read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    for name, *numbers in rows:
        config = F2LLMConfig.from_family(name)
        shape = (config.hidden_size, config.num_hidden_layers, config.intermediate_size)
        assert tuple(map(int, numbers)) == (*shape, config.num_attention_heads, config.num_key_value_heads)
