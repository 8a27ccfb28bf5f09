"""YAML files: which values arrive as what, and what is refused."""

from __future__ import annotations

import pytest

from training.common.errors import UserError
from training.common.yaml_file import load_yaml, unknown_key

FLOATS = {"1e-5": 1e-5, "1E-5": 1e-5, "-1e-5": -1e-5, "0.00001": 1e-5, "1.0e-5": 1e-5, "1e5": 1e5, "+1e+5": 1e5}
FLOATS |= {"1.e3": 1e3, "1.5e3": 1.5e3}
INTEGERS = {"1": 1, "-1": -1, "1_000": 1000, "0x1e5": 0x1E5}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "file.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("where", ["{}", "[1, [{}]]", "{{a: [{}]}}", "\n  - b:\n    - {}"])
@pytest.mark.parametrize(("text", "expected"), {**FLOATS, **INTEGERS}.items())
def test_numbers_are_numbers_at_any_depth(write, where, text, expected):
    value = load_yaml(write(f"key: {where.format(text)}\n"))
    while isinstance(value, list | dict):
        value = value[-1] if isinstance(value, list) else list(value.values())[-1]
    assert type(value) is type(expected) and value == expected


@pytest.mark.parametrize("text", ["'1e-5'", '"1e-5"', "1e", "e5", "1e5x", "v1e5", "1-5", "1e-5 1e-5", "1e5.5"])
def test_other_text_stays_text(write, text):
    assert load_yaml(write(f"a: {text}\n")) == {"a": text.strip("'\"")}


def test_dates_are_text(write):
    assert load_yaml(write("a: 2024-01-01\nb: 2024-13-45\n")) == {"a": "2024-01-01", "b": "2024-13-45"}


def test_values_arrive(write):
    text = "a: größer\nb: &x [1, 2.5, true, null]\nc: {a: '1', e: [*x, {a: no}]}\n"
    values = [1, 2.5, True, None]
    assert load_yaml(write(text)) == {"a": "größer", "b": values, "c": {"a": "1", "e": [values, {"a": False}]}}


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("{<<: *x, c: 3}", {"a": 1, "b": 2, "c": 3}),
        ("{b: 3, <<: *x}", {"a": 1, "b": 3}),
        ("{<<: [*x, *y]}", {"a": 1, "b": 2, "d": 5}),
    ],
)
def test_merge_key_takes_over_the_keys_of_another_mapping(write, merge, expected):
    # A key that is taken over may be replaced: it stands once.
    text = f"x: &x {{a: 1, b: 2}}\ny: &y {{b: 4, d: 5}}\nz: {merge}\n"
    assert load_yaml(write(text))["z"] == expected


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a'", 3),
        ("a: 1\n'a': 2\n", "'a'", 2),
        ("1: a\n1: b\n", "'1'", 2),
        ("a:\n  - b: 1\n    b: 3\n", "'b'", 3),
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
        *((content, "not valid YAML") for content in ("sources: [\n", "a: b: c\n", "\tx: 1\n", b"\0", "a: !own 3\n")),
        *(
            (content, "not valid YAML")
            for content in ("x: !!python/name:os.system\n", "a: !!int abc\n", "? [a]\n: 1\n")
        ),
        ("sources: größer".encode("latin-1"), "cannot be read"),
        *(("", "NoneType"), ("- a\n", "list"), ("text\n", "str"), ("1e-5\n", "float")),
    ],
)
def test_content_that_is_not_a_mapping(write, refuses, content, fault):
    path = write(content)
    with refuses(path, fault):
        load_yaml(path)


def test_paths_that_are_not_files(tmp_path, refuses):
    for path, fault in (("none.yaml", "no such file"), ("", "cannot be read")):
        with refuses(tmp_path / path, fault):
            load_yaml(tmp_path / path)


MANY = [f"key_{number}" for number in range(30)]


@pytest.mark.parametrize(
    ("key", "known", "remedy"),
    [
        ("sead", ["seed", "cap"], "did you mean 'seed'?"),
        ("lr", ["lora", "seed"], "known keys are lora, seed"),
        ("rate", ["seed", "learning_rate"], "did you mean 'learning_rate'?"),
        (1, ["seed", "cap"], "known keys are cap, seed"),
        ("zzz", MANY, "--help lists the known ones"),
        ("key29", MANY, "did you mean 'key_29'?"),
    ],
)
def test_unknown_key(key, known, remedy):
    error = unknown_key("recipe.yaml", key, known, {"rate": "learning_rate"})
    assert isinstance(error, UserError)
    assert str(error) == f"recipe.yaml: unknown key {key!r}; {remedy}"
