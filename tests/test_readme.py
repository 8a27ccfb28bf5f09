"""What the README tells a newcomer to run, run."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerBase

from modeling_f2llm import DEFAULT_PROMPTS, F2LLMConfig, F2LLMModel, build_sentence_transformer
from tests.hub_cards.library_calls import expected_calls, library_calls

README = Path(__file__).parents[1] / "README.md"


def _snippets(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    # What a comment marks as another library's needs that library.
    return re.findall(rf"(?<!-->\n)```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_other_libraries_are_given_the_query_prompt() -> None:
    expected = expected_calls("f2llm-v2-330m", DEFAULT_PROMPTS["query"], DEFAULT_PROMPTS["document"])
    assert library_calls(README.read_text(encoding="utf-8")) == expected


def test_python_snippets_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tiny_config: F2LLMConfig,
    tiny_tokenizer: PreTrainedTokenizerBase,
    sentences: list[str],
) -> None:
    config = F2LLMConfig(**{**tiny_config.to_dict(), "hidden_size": 320, "matryoshka_dimensions": None})
    model = build_sentence_transformer(F2LLMModel(config), deepcopy(tiny_tokenizer))
    model.save_pretrained(str(tmp_path / "f2llm-v2-330m"))
    pairs = {"query": sentences[:4], "passage": sentences[4:8], "negative_1": sentences[6:]}
    pq.write_table(pa.table(pairs), tmp_path / "my_pairs.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    namespace: dict = {}
    for snippet in _snippets("python"):
        exec(snippet, namespace)
    assert namespace["queries"].shape == (1, 256)
    # Compared by the inner product.
    assert np.linalg.norm(namespace["full"], axis=1) == pytest.approx(np.ones(3))
    assert (
        not list(Path("my-adapter").glob("model*.safetensors"))
        and Path("my-adapter/adapter_model.safetensors").exists()
    )
    unadapted = SentenceTransformer("f2llm-v2-330m", trust_remote_code=True).encode(sentences)
    assert (namespace["adapted"].encode(sentences) == unadapted).all()
    namespace["adapted"].enable_adapters()
    assert abs(namespace["adapted"].encode(sentences) - unadapted).max() > 1e-5
    assert "tensor" in capsys.readouterr().out


def test_the_search_runs_on_a_model_narrower_than_its_shortlist_takes(
    tiny_model: F2LLMModel, tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("faiss")
    (snippet,) = [text for text in _snippets("python") if "IndexBinaryFlat" in text]
    exec(snippet, {"model": build_sentence_transformer(tiny_model, deepcopy(tiny_tokenizer))})
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_script_for_adapters_is_short() -> None:
    (script,) = [text for text in _snippets("python") if "add_adapter" in text]
    assert len(script.splitlines()) < 40


def test_the_manifest_of_the_readme_is_valid(tmp_path: Path) -> None:
    from training.data.manifest import load_manifest

    (tmp_path / "manifest.yaml").write_text(next(text for text in _snippets("yaml") if "sources:" in text))
    (tmp_path / "webfaq_kor.parquet").touch()
    assert load_manifest(tmp_path / "manifest.yaml")[0].languages == ["kor"]


def test_the_evaluation_of_the_readme_is_valid() -> None:
    import yaml

    from training.config.arguments import StageArguments

    keys = yaml.safe_load(next(text for text in _snippets("yaml") if "evaluation_sample:" in text))
    arguments = StageArguments(output_dir="runs/mine", model="some/model", use_cpu=True, **keys)
    assert arguments.chooses_by_pairs and arguments.greater_is_better


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for text in _snippets("bash") for line in text.splitlines() if line.startswith("make ")}
    assert named and named <= targets


def test_family_table_has_the_published_shapes() -> None:
    rows = re.findall(
        r"^\| (f2llm-v2-\S+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) / (\d+) ", README.read_text(), re.MULTILINE
    )
    assert len(rows) == 8
    for name, *numbers in rows:
        config = F2LLMConfig.from_family(name)
        shape = (config.hidden_size, config.num_hidden_layers, config.intermediate_size)
        assert tuple(map(int, numbers)) == (*shape, config.num_attention_heads, config.num_key_value_heads)
