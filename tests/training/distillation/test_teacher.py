"""Frozen teachers: over the student's own tokens, and any SentenceTransformer, with texts in its own format."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers.processors import TemplateProcessing
from transformers import BertModel, PreTrainedTokenizerFast

from modeling_f2llm.prompts import instruct
from modeling_f2llm.sentence_transformer import build_sentence_transformer
from tests.training.distributed_recipe import save_model
from tests.training.foreign_teacher import save_foreign_teacher
from training.config.arguments import StageArguments
from training.data.instructions import TextFormat
from training.data.preparation.pipeline import prepare
from training.distillation.teacher import KEY, Teacher, TextTeacher, load_teacher, load_text_teacher, reads_tokens_of
from training.models.encoding import embed_batch, embed_chunk, packed_texts
from training.models.model_ref import ModelRef, resolve
from training.trainer.batches import PackedCollator, PreparedRows, RowKey


@pytest.fixture
def teacher_folder(tmp_path, tiny_config, small_tokenizer):
    save_model(tmp_path / "teacher", tiny_config, small_tokenizer, hidden_size=48, vocab_size=400)
    return tmp_path / "teacher"


def reads_tokens(folder, tokenizer):
    return reads_tokens_of(ModelRef(str(folder), str(folder)), tokenizer)


def test_it_gives_the_leading_dimensions_of_its_embeddings(
    teacher_folder, tiny_config, small_tokenizer, prepared_sources, num_hard_negatives
):
    model = save_model(teacher_folder, tiny_config, small_tokenizer, hidden_size=48, vocab_size=400)
    rows = [PreparedRows(prepared_sources)[RowKey(0, 1, row)] for row in range(5)]
    batch = PackedCollator(prepared_sources, num_hard_negatives, max_tokens_per_forward=60)(rows)
    teacher = Teacher(load_teacher(resolve(str(teacher_folder), KEY)), max_tokens=100)
    assert not teacher.model.training and not any(weights.requires_grad for weights in teacher.model.parameters())
    found = teacher.embed(batch, 32)
    assert found.shape[1] == 32 and not found.requires_grad and found.dtype == torch.float32
    torch.testing.assert_close(found, embed_batch(model.eval(), batch)[:, :32])
    # Texts of a source are embedded in the order asked for.
    batch = PackedCollator(prepared_sources, num_hard_negatives)(rows)
    positions = np.sort(batch["own_texts"])
    found = teacher.embed_texts(prepared_sources[1], positions)
    torch.testing.assert_close(found[np.searchsorted(positions, batch["own_texts"])], teacher.embed(batch))


def test_it_reads_the_tokens_of_a_student_with_the_same_vocabulary(
    teacher_folder, small_tokenizer, tiny_tokenizer, refuses
):
    assert reads_tokens(teacher_folder, small_tokenizer)
    assert not reads_tokens(teacher_folder, tiny_tokenizer)
    elsewhere = f"{teacher_folder}-elsewhere"
    assert not reads_tokens(elsewhere, small_tokenizer)
    with refuses("key 'teacher'", elsewhere):
        load_teacher(ModelRef(elsewhere, elsewhere))


@pytest.mark.parametrize("change", ["eos", "pooling", "plain", "other kind"])
def test_it_reads_tokens_only_with_last_token_pooling_and_eos(teacher_folder, small_tokenizer, change):
    if change == "eos":
        tokenizer = deepcopy(small_tokenizer)
        pad = (tokenizer.pad_token, tokenizer.pad_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {pad[0]}", special_tokens=[pad])
        tokenizer.save_pretrained(teacher_folder)
    elif change == "plain":
        (teacher_folder / "modules.json").unlink()
    else:
        file, key, value = {
            "pooling": ("1_Pooling/config.json", "pooling_mode", "mean"),
            "other kind": ("config.json", "model_type", "llama"),
        }[change]
        path = teacher_folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert reads_tokens(teacher_folder, small_tokenizer) == (change == "plain")


TEXTS = ["red river", instruct("question the lake .", "city river question"), "answer", "the green city negative . ."]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Mean pooling, unit length, and a default prompt."""
    folder = save_foreign_teacher(tmp_path_factory.mktemp("saved"), width=24)
    path = folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"own": "negative negative "}, "default_prompt_name": "own"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **prompts}))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "teacher"))


def by_hand(folder, texts):
    """Mean of the last hidden states, text by text, without padding."""
    bert = folder / "bert"
    model, tokenizer = BertModel.from_pretrained(bert).eval(), PreTrainedTokenizerFast.from_pretrained(bert)
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt", return_token_type_ids=False) for text in texts]
        return torch.cat([model(**each).last_hidden_state.mean(dim=1) for each in inputs])


def test_it_gives_what_its_modules_give_before_they_normalise(saved, tmp_path):
    found = load_text_teacher(str(saved)).encode(TEXTS)
    assert found.shape == (4, 24) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, by_hand(saved, TEXTS))
    assert (found.norm(dim=1) - 1).abs().min() > 0.1
    assert torch.pdist(found).min() > 0.1, "the example does not tell texts apart"
    # Neither half precision on disk, nor the modules that a plain model lacks change it.
    torch.testing.assert_close(load_text_teacher(str(saved / "bert")).encode(TEXTS), found)
    SentenceTransformer(str(saved), device="cpu").bfloat16().save(str(tmp_path / "half"))
    half = load_text_teacher(str(tmp_path / "half"))
    assert {weights.dtype for weights in half.model.parameters()} == {torch.float32}
    assert half.encode([]).shape == (0, 24)
    # It is frozen, and a loss can use what it gives.
    assert not any(weights.requires_grad for weights in half.model.parameters())
    assert not any(module.training for module in half.model.modules())
    student = torch.zeros(4, 24, requires_grad=True)
    torch.nn.functional.mse_loss(student, found).backward()
    assert student.grad.abs().sum() > 0


def test_only_the_normalisation_at_the_end_is_dropped(saved):
    torch.manual_seed(0)
    bert = saved / "bert"
    dense = Dense(24, 6, activation_function=torch.nn.Identity())
    parts = [Transformer(str(bert)), Pooling(24, pooling_mode="cls"), Normalize(), dense, Normalize(), Normalize()]
    teacher = TextTeacher(SentenceTransformer(modules=parts, device="cpu"))
    assert teacher.width == 6 and len(teacher.model) == 4
    with torch.no_grad():
        first = BertModel.from_pretrained(bert).eval()
        ids = PreTrainedTokenizerFast.from_pretrained(bert)(TEXTS[0], return_tensors="pt")
        expected = dense.linear(torch.nn.functional.normalize(first(**ids).last_hidden_state[:, 0]))
    torch.testing.assert_close(teacher.encode(TEXTS[:1]), expected)


def test_over_the_same_tokens_it_is_the_teacher_of_tokens(
    write_source, tmp_path, tiny_config, small_tokenizer, options, prepared_sources, refuses
):
    options = replace(options, keep_texts=True, max_length=2048)
    (source,) = prepare([write_source(rows=30)], small_tokenizer, tmp_path / "prepared", options)
    model = save_model(tmp_path / "model", tiny_config, small_tokenizer, vocab_size=400).eval()
    build_sentence_transformer(model, small_tokenizer).save(str(tmp_path / "released"))
    positions = np.arange(source.description["texts"])
    teacher = load_text_teacher(str(tmp_path / "released"), device="cpu")
    found = teacher.embed_texts(source, positions)
    for texts in packed_texts(source, positions, 300):
        with torch.no_grad():
            expected = embed_chunk(model, texts.input_ids, texts.lengths)
        torch.testing.assert_close(found[texts.positions], expected)
    with refuses(prepared_sources[0].folder, "not kept", "--keep-texts"):
        teacher.embed_texts(prepared_sources[0], np.arange(3))


def test_templates(saved):
    form = TextFormat("query : {text} . {instruction}", "passage : {text}")
    formed = [f"passage : {text}" for text in TEXTS]
    formed[1] = "query : city river question . question the lake ."
    assert [form.apply(text) for text in TEXTS] == formed
    torch.testing.assert_close(load_text_teacher(str(saved), form).encode(TEXTS), by_hand(saved, formed))
    form = TextFormat("{{q}} {text}", "{text} {text}")
    assert form.apply(instruct("Find {x}.", "{y} {text}")) == "{q} {y} {text}" and form.apply("{y}") == "{y} {y}"
    # By default, texts do not change.
    odd = ("{text} {", "Instruct: no query", "", "Instruct: a\nQuery: b\nQuery: c", "Instruct: a\nQuery:b")
    assert all(TextFormat().apply(text) == text for text in (*TEXTS, *odd))


@pytest.mark.parametrize("key", ["query_template", "document_template"])
@pytest.mark.parametrize(
    ("template", "part"),
    [
        ("query: ", "lacks {text}"),
        ("{instruction}", "{text}"),
        ("{0} {text}", "{0}"),
        ("{text!r}", "{text!r}"),
        ("{text.__class__}", "{text.__class__}"),
        ("{text", "no template"),
        ("text}", "no template"),
    ],
)
def test_bad_template(refuses, key, template, part):
    keys = {"output_dir": "x", "use_cpu": True, "model": "m", "teacher": "t"}
    with refuses(f"key 'teacher_{key}'", part):
        StageArguments(**keys, **{f"teacher_{key}": template})
    assert StageArguments(**keys).text_format == TextFormat()
    assert StageArguments(**keys, **{f"teacher_{key}": "q: {text}"}).text_format == TextFormat(**{key: "q: {text}"})
    with refuses("key 'teacher_document_template'", "{instruction}", "{text} only"):
        TextFormat(document_template="{instruction} {text}")


def test_identity_is_that_of_model_and_templates(saved, folder):
    identity = load_text_teacher(str(saved)).identity
    assert load_text_teacher(str(folder)).identity == identity
    assert load_text_teacher(str(folder), TextFormat("{text}")).identity != identity
    settings = json.loads((folder / "1_Pooling/config.json").read_text())
    (folder / "1_Pooling/config.json").write_text(json.dumps({**settings, "pooling_mode": "max"}))
    assert load_text_teacher(str(folder)).identity != identity


def test_a_tokenizer_that_cannot_pad(folder, refuses):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "pad_token"}))
    with refuses("key 'teacher'", folder, "pad"):
        load_text_teacher(str(folder))


@pytest.mark.parametrize(("lost", "matters"), [("encoder.layer.0.output.dense.weight", True), ("pooler.", False)])
def test_weights_that_are_missing_are_refused_where_they_matter(saved, folder, refuses, lost, matters):
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    if matters:
        with refuses("key 'teacher'", folder, f"lack 0.{lost}"):
            load_text_teacher(str(folder))
    else:
        torch.testing.assert_close(load_text_teacher(str(folder)).encode(TEXTS), by_hand(saved, TEXTS))


def test_embeddings_that_are_not_finite_are_refused(saved, refuses):
    teacher = load_text_teacher(str(saved))
    teacher.encode(TEXTS)
    words = dict(teacher.model.named_parameters())
    (name,) = [name for name in words if name.endswith("word_embeddings.weight")]
    words[name][teacher.model.tokenizer.convert_tokens_to_ids("answer")] = torch.nan
    teacher.encode(TEXTS[:2])
    with refuses("key 'teacher'", "'answer'", "not finite"):
        teacher.encode(TEXTS)
