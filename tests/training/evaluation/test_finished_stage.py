"""The report of a finished stage says what its table says."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from modeling_f2llm.sentence_transformer import build_sentence_transformer
from training.evaluation.finished_stage import narrowest_width, pairs_scores, table, usage
from training.evaluation.pairs import EncodedPairs, Pairs, encode_pairs, evaluate_pairs


@pytest.fixture
def encoded(tiny_model, tiny_tokenizer, sentences) -> EncodedPairs:
    queries = [*sentences, *(text[: len(text) // 2] for text in sentences)]
    languages = ["en", "en", "de", "fr", "zh", "ja", "ru", "ar", "hi", "ko"] * 2
    scripts = ["Latn"] * 4 + ["Hans", "Jpan", "Cyrl", "Arab", "Deva", "Hang"]
    pairs = Pairs(queries, list(sentences), [(row % 10,) for row in range(20)], languages, scripts * 2)
    return encode_pairs(build_sentence_transformer(tiny_model, tiny_tokenizer), pairs)


@pytest.mark.parametrize("dim", [32, 8])
def test_the_scores_of_languages_average_to_the_accuracy_over_pairs(encoded, dim):
    expected = evaluate_pairs(encoded, np.zeros(20, bool), [32, 8])["accuracy"][str(dim)]
    scores, examples = pairs_scores("model", encoded, dim, "float32")
    assert {score.subset for score in scores} >= {"eng-Latn", "zho-Hans", "kor-Hang"} and len(scores) == 9
    assert sum(score.value * score.examples for score in scores) / 20 == pytest.approx(expected, abs=1e-4)
    for score in scores:
        assert examples[score.key].mean() == pytest.approx(score.value, abs=1e-6)
        assert len(examples[score.key]) == score.examples == (4 if score.subset == "eng-Latn" else 2)


def test_fewer_bits_are_other_scores_of_the_same_pairs(encoded):
    found = {precision: pairs_scores("model", encoded, 32, precision)[0] for precision in ("float32", "int8", "binary")}
    keys = {precision: {score.key for score in scores} for precision, scores in found.items()}
    assert not keys["float32"] & keys["int8"] and not keys["int8"] & keys["binary"]
    for full, stored in zip(found["float32"], found["int8"], strict=True):
        # Queries are compared with what the codes of the candidates stand for: a thousandth is no other rank here.
        assert (full.subset, full.value) == (stored.subset, stored.value)


def test_a_language_of_the_users_own_keeps_its_name(encoded):
    languages = ["Klingon!", *encoded.pairs.languages[1:]]
    scores, _ = pairs_scores(
        "model", replace(encoded, pairs=replace(encoded.pairs, languages=languages)), 32, "float32"
    )
    assert "Klingon!-Latn" in {score.subset for score in scores}


def test_without_languages_there_is_one_subset_of_no_language(encoded):
    untold = replace(encoded, pairs=replace(encoded.pairs, languages=None, scripts=None))
    [score], examples = pairs_scores("model", untold, 32, "float32")
    result = evaluate_pairs(untold, np.zeros(20, bool), [32, 8])
    assert (score.subset, score.languages, score.examples) == ("default", (), 20) and len(examples[score.key]) == 20
    assert score.value == pytest.approx(result["accuracy"]["32"], abs=1e-4)
    assert result["languages"] == result["scripts"] == {} and "script" not in table(result)


def test_the_rate_counts_all_texts(encoded):
    assert encoded.texts_per_second > 0 and encoded.queries.shape == (20, 32) and encoded.candidates.shape == (10, 32)


def test_the_table_names_widths_baseline_and_the_largest_scripts(encoded):
    baseline = np.arange(20) % 2 == 0
    shown = table(evaluate_pairs(encoded, baseline, [32, 8]), most_scripts=2)
    assert "TF-IDF             0.500" in shown and "Latn" in shown and "and 5 more scripts" in shown


@pytest.mark.parametrize(
    ("accuracy", "width"),
    [
        ({"64": 0.213, "16": 0.203, "8": 0.045}, 16),
        ({"64": 0.213, "16": 0.202, "8": 0.045}, 64),
        ({"64": 0.2, "16": 0.1, "8": 0.3}, 8),
        ({"64": 0.0, "8": 0.0}, 64),
        ({"64": 0.5}, 64),
    ],
)
def test_the_narrowest_width_that_keeps_nearly_all_is_recommended(accuracy, width):
    assert narrowest_width(accuracy) == width


def test_the_lines_to_use_a_model_rank_by_cosine_at_a_narrow_width(
    encoded, tmp_path, capsys, tiny_model, tiny_tokenizer
):
    model = build_sentence_transformer(tiny_model, tiny_tokenizer)
    model.save_pretrained(str(tmp_path / "model"))
    pairs = encoded.pairs
    code = usage(tmp_path / "model", pairs, {"32": 0.2, "8": 0.2})
    assert "truncate_dim=8)" in code
    exec(code, {})
    shown = [pairs.candidates[place] for place in (0, 1, 2)]
    query, passages = model.encode_query(pairs.queries[0])[:8], model.encode_document(shown)[:, :8]
    cosines = passages @ query / np.linalg.norm(passages, axis=1) / np.linalg.norm(query)
    printed = [float(number) for number in re.findall(r"-?\d\.\d+", capsys.readouterr().out)]
    assert printed == pytest.approx(cosines.tolist(), abs=1e-3)
    assert (np.abs(passages @ query - cosines) > 1e-2).any()


def test_the_lines_to_use_a_model_are_short_and_show_a_right_passage(tmp_path):
    pairs = Pairs(["q" * 500], ["a" * 500, "b", "c", "d"], [(3,)])
    code = usage(tmp_path / "it's", pairs, {"32": 0.2, "8": 0.0})
    compile(code, "usage", "exec")
    assert "truncate_dim" not in code and max(map(len, code.splitlines())) < 200
    assert "['d', '" in code and f"{'a' * 59}…" in code
