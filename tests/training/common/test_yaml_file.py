"""YAML files: which values arrive as what, and what is refused."""

from __future__ import annotations

import pytest

from training.common.yaml_file import load_yaml, unknown_key

NUMBERS = {"1e-5": 1e-5, "-1E-5": -1e-5, "0.00001": 1e-5, "1.0e-5": 1e-5, "+1e+5": 1e5, "1.e3": 1e3, "1_000": 1000}
TEXTS = ["'1e-5'", '"1e-5"', "1e", "e5", "1e5x", "v1e5", "1-5", "1e-5 1e-5", "1e5.5", "2024-01-01", "2024-13-45"]


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "file.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_values(write):
    numbers = load_yaml(write("".join(f"a{n}: {{b: [{text}]}}\n" for n, text in enumerate(NUMBERS)))).values()
    assert [(type(value["b"][0]), value["b"][0]) for value in numbers] == [(type(n), n) for n in NUMBERS.values()]
    texts = load_yaml(write("".join(f"a{n}: {text}\n" for n, text in enumerate(TEXTS)))).values()
    assert list(texts) == [text.strip("'\"") for text in TEXTS]
    text = "a: größer\nb: &x [1, 2.5, true, null]\nc: {a: '1', e: [*x, {a: no}]}\n"
    values = [1, 2.5, True, None]
    assert load_yaml(write(text)) == {"a": "größer", "b": values, "c": {"a": "1", "e": [values, {"a": False}]}}


def test_merge_key_takes_over_the_keys_of_another_mapping(write):
    # A key that is taken over may be replaced: it stands once.
    text = "x: &x {a: 1, b: 2}\ny: &y {b: 4, d: 5}\nz: {b: 3, <<: *x}\nboth: {<<: [*x, *y]}\n"
    assert load_yaml(write(text)).items() >= {"z": {"a": 1, "b": 3}, "both": {"a": 1, "b": 2, "d": 5}}.items()


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a'", 3),
        ("1: a\n1: b\n", "'1'", 2),
        ("a: {b: {c: 1, c: 2}}\n", "'c'", 1),
    ],
)
def test_key_that_stands_twice(write, refuses, text, key, line):
    path = write(text)
    with refuses(path, f"key {key} stands twice", f"line {line}, ", "correct that line"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        *((text, "not valid YAML") for text in ("a: [\n", b"\0", "a: !!python/name:os.system\n", "a: !!int x\n")),
        ("sources: größer".encode("latin-1"), "cannot be read"),
        *(("", "NoneType"), ("- a\n", "list")),
    ],
)
def test_content_that_is_not_a_mapping(write, refuses, content, fault):
    path = write(content)
    for each, wrong in ((path, fault), (path.parent, "cannot be read"), (path.with_name("other"), "no such file")):
        with refuses(each, wrong):
            load_yaml(each)


MANY = [f"key_{number}" for number in range(30)]


@pytest.mark.parametrize(
    ("key", "known", "remedy"),
    [
        ("sead", ["seed", "cap"], "did you mean 'seed'?"),
        ("lr", ["lora", "seed"], "known keys are lora, seed"),
        (1, ["seed", "cap"], "known keys are cap, seed"),
        ("zzz", MANY, "--help lists the known ones"),
        ("key29", MANY, "did you mean 'key_29'?"),
    ],
)
def test_unknown_key(key, known, remedy):
    assert str(unknown_key("recipe.yaml", key, known)) == f"recipe.yaml: unknown key {key!r}; {remedy}"
