"""Faults of what sentence-transformers reads."""

from __future__ import annotations

from tests.training.publishing.broken import BrokenRelease

MODULES, POOLING, SENTENCES = "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"


def test_pooling_of_another_width(broken: BrokenRelease) -> None:
    broken.edit(POOLING, word_embedding_dimension=64)
    broken.expect((POOLING, "pools 64 dimensions, but hidden_size is 32"))


def test_pooling_by_the_mean(broken: BrokenRelease) -> None:
    broken.edit(POOLING, pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True)
    broken.expect((POOLING, "pools by mean_tokens"))


def test_pooling_without_the_prompt(broken: BrokenRelease) -> None:
    broken.edit(POOLING, include_prompt=False)
    broken.expect((POOLING, "leaves the prompt out"))


def test_no_normalisation(broken: BrokenRelease) -> None:
    broken.edit(MODULES, lambda modules: modules.pop())
    broken.expect((MODULES, "the modules are Transformer, Pooling, not"))


def test_a_module_of_this_repository(broken: BrokenRelease) -> None:
    broken.edit(MODULES, lambda modules: modules[0].update(type="modeling_f2llm.Transformer"))
    broken.expect((MODULES, "no class of sentence-transformers"), (MODULES, "known since sentence-transformers 5.4"))


def test_a_module_that_does_not_exist(broken: BrokenRelease) -> None:
    broken.edit(MODULES, lambda modules: modules[2].update(type="sentence_transformers.models.nowhere.Normalize"))
    broken.expect((MODULES, "has no class sentence_transformers.models.nowhere.Normalize"))


def test_a_module_without_its_folder(broken: BrokenRelease) -> None:
    broken.edit(MODULES, lambda modules: modules[2].update(path="3_Normalize"))
    broken.expect((MODULES, "there is no folder 3_Normalize"))


def test_no_prompts(broken: BrokenRelease) -> None:
    broken.edit(SENTENCES, prompts={})
    broken.expect((SENTENCES, "has no prompt for queries"))


def test_other_prompts_than_the_record(broken: BrokenRelease) -> None:
    broken.edit("release.json", prompts={"query": "query: ", "document": ""})
    broken.expect(("release.json", "the prompts are not those of"))


def test_a_prompt_before_every_text(broken: BrokenRelease) -> None:
    broken.edit(SENTENCES, default_prompt_name="query", similarity_fn_name="dot")
    broken.expect((SENTENCES, "default_prompt_name 'query'"), (SENTENCES, "similarity_fn_name is 'dot'"))
