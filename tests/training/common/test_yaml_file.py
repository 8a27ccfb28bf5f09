"""YAML files: which values arrive as what, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from training.common.errors import UserError
from training.common.yaml_file import load_yaml, unknown_key

Refuses = Callable[..., AbstractContextManager[None]]
FLOATS = {
    **{"1e-5": 1e-5, "1E-5": 1e-5, "-1e-5": -1e-5, "0.00001": 1e-5, "1.0e-5": 1e-5},
    **{"1e5": 1e5, "+1e+5": 1e5, "1e4": 10000.0, "1.e3": 1e3, "1.5e3": 1.5e3},
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "file.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Values


@pytest.mark.parametrize("where", ["{}", "[{}]", "[1, [{}]]", "{{a: [{}]}}", "{{a: {{b: {}}}}}", "\n  - b:\n    - {}"])
@pytest.mark.parametrize(("text", "expected"), FLOATS.items())
def test_number_with_an_exponent_is_a_float_at_any_depth(
    write: Callable[..., Path], where: str, text: str, expected: float
) -> None:
    value: Any = load_yaml(write(f"key: {where.format(text)}\n"))
    while not isinstance(value, int | float | str):
        value = value[-1] if isinstance(value, list) else list(value.values())[-1]
    assert type(value) is float and value == expected


@pytest.mark.parametrize("text", ["'1e-5'", '"1e-5"', "1e", "e5", "1e5x", "v1e5", "1-5", "1e-5 1e-5", "1e5.5"])
def test_other_text_stays_text(write: Callable[..., Path], text: str) -> None:
    assert load_yaml(write(f"a: {text}\n")) == {"a": text.strip("'\"")}


@pytest.mark.parametrize(("text", "expected"), [("1", 1), ("-1", -1), ("1_000", 1000), ("0x1e5", 0x1E5)])
def test_integers_stay_integers(write: Callable[..., Path], text: str, expected: int) -> None:
    value = load_yaml(write(f"a: {text}\n"))["a"]
    assert type(value) is int and value == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a: größer\nb: [1, 2.5, true, null]\nc: {d: '1', e: [x, {f: no}]}\n",
            {"a": "größer", "b": [1, 2.5, True, None], "c": {"d": "1", "e": ["x", {"f": False}]}},
        ),
        ("a: &x {b: 1e-5}\nc: *x\nd: [*x]\n", {"a": {"b": 1e-5}, "c": {"b": 1e-5}, "d": [{"b": 1e-5}]}),
        # One key in several mappings.
        ("a: {a: 1, b: {a: 2}}\nb: [{a: 3}, {a: 4}]\n", {"a": {"a": 1, "b": {"a": 2}}, "b": [{"a": 3}, {"a": 4}]}),
        # Dates are text.
        (
            "a: 2024-01-01\nb: 2024-13-45\nc: 2001-12-14t21:59:43Z\n",
            {"a": "2024-01-01", "b": "2024-13-45", "c": "2001-12-14t21:59:43Z"},
        ),
    ],
)
def test_values_arrive(write: Callable[..., Path], text: str, expected: dict[str, Any]) -> None:
    assert load_yaml(write(text)) == expected


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ("{<<: *x, c: 3}", {"a": 1, "b": 2, "c": 3}),
        ("{<<: *x, b: 3}", {"a": 1, "b": 3}),
        ("{b: 3, <<: *x}", {"a": 1, "b": 3}),
        ("{<<: [*x, *y]}", {"a": 1, "b": 2, "d": 5}),
    ],
)
def test_merge_key_takes_over_the_keys_of_another_mapping(
    write: Callable[..., Path], merge: str, expected: dict[str, int]
) -> None:
    # A key that is taken over may be replaced: it stands once.
    text = f"x: &x {{a: 1, b: 2}}\ny: &y {{b: 4, d: 5}}\nz: {merge}\n"
    assert load_yaml(write(text))["z"] == expected


# Refused


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a'", 3),
        ("a: 1\na: 1\n", "'a'", 2),
        ("a: 1\n'a': 2\n", "'a'", 2),
        ("1: a\n1: b\n", "'1'", 2),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "'b'", 4),
        ("a:\n  - b: 1\n    b: 3\n", "'b'", 3),
        ("a: {b: {c: 1, c: 2}}\n", "'c'", 1),
    ],
)
def test_key_that_stands_twice(write: Callable[..., Path], refuses: Refuses, text: str, key: str, line: int) -> None:
    path = write(text)
    with refuses(path, f"key {key} stands twice", f"line {line}, ", "correct that line"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        *((content, ("not valid YAML",)) for content in (b"sources: [\n", b"a: b: c\n", b"\tx: 1\n", b"\0")),
        *((content, ("not valid YAML",)) for content in (b"x: !!python/name:os.system\n", b"? [a]\n: 1\n")),
        ("sources: größer".encode("latin-1"), ("cannot be read",)),
        *((content, ("expected a mapping", kind)) for content, kind in ((b"", "NoneType"), (b"- a\n", "list"))),
        *((content, ("expected a mapping", kind)) for content, kind in ((b"text\n", "str"), (b"1e-5\n", "float"))),
    ],
)
def test_content_that_is_not_a_mapping(
    write: Callable[..., Path], refuses: Refuses, content: bytes, parts: tuple[str, ...]
) -> None:
    path = write(content)
    with refuses(path, *parts):
        load_yaml(path)


def test_paths_that_are_not_files(tmp_path: Path, refuses: Refuses) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")
    for path, fault in (("none.yaml", "no such file"), ("", "cannot be read"), ("a.yaml", "cannot be read")):
        with refuses(tmp_path / path, fault):
            load_yaml(tmp_path / path)


def _bomb(item: str) -> str:
    lines = ["a0: &a0 {x: [1, 2, 3]}"]
    lines += [f"a{i}: &a{i} {item.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 40)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: !!timestamp 2024-99-99", "timestamp"),
        ("a: !!int abc", "abc"),
        ("a: !!float abc", "abc"),
        ("a: !!set {b, c}", "set"),
        ("a: !!binary aGk=", "binary"),
        ("a: !!python/object/apply:os.system [ls]", "python/object/apply"),
        ("a: !own 3", "!own"),
        ("a: " + "9" * 5000, "4300 digits"),
        ('a: "x\\0y"', "NUL"),
        ('a: {"x\\0y": 1}', "NUL"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a {b: {c: *a}}", "holds itself"),
        *((_bomb(item), "aliases") for item in ("[{}]", "{{x: [{}]}}", "{{<<: [{}]}}")),
        ("a: " + "[" * 1_000_000, "levels deep"),
        ("a: " + "{a: " * 200_000, "levels deep"),
        ("".join(" " * depth + "a:\n" for depth in range(3000)), "levels deep"),
        ("a: =", "value"),
    ],
)
def test_what_cannot_or_must_not_be_built_is_refused_at_once(
    write: Callable[..., Path], refuses: Refuses, text: str, fault: str
) -> None:
    path = write(text)
    start = time.perf_counter()
    with refuses(path, "not valid YAML", fault):
        load_yaml(path)
    assert time.perf_counter() - start < 5


def test_a_long_chain_of_aliases_is_read(write: Callable[..., Path]) -> None:
    # Deeper than Python could recurse, if an alias were followed.
    text = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 1000))
    assert len(load_yaml(write(text))) == 1000


@pytest.mark.parametrize(
    ("key", "known", "remedy"),
    [
        ("sead", ["seed", "cap"], "did you mean 'seed'?"),
        ("zzz", ["seed", "cap"], "known keys are cap, seed"),
        (1, ["seed", "cap"], "known keys are cap, seed"),
        ("zzz", [f"key_{i}" for i in range(30)], "--help lists the known ones"),
        ("key29", [f"key_{i}" for i in range(30)], "did you mean 'key_29'?"),
    ],
)
def test_unknown_key(key: Any, known: list[str], remedy: str) -> None:
    error = unknown_key("recipe.yaml", key, known)
    assert isinstance(error, UserError)
    assert str(error) == f"recipe.yaml: unknown key {key!r}; {remedy}"
