"""Plain data from YAML and JSON: what would be read other than it was meant is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import refused

from lltk.files.reading import parse_yaml, read_plain
from lltk.graph.recipe import load_recipe, read_recipe
from lltk.stream.script import load_script

pytestmark = pytest.mark.cpu


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "- a: 1\n  b: 2\n  a: 3\n", "the key 'a' is there twice, in lines 1 and 3; "),
        ("a.yaml", "x: {a: 1, 'a': 3}\n", "the key 'a' is there twice, in lines 1 and 1; "),
        ("a.json", '[{"a": 1,\n\t"b": {"c": 1,\n\n"c": 2}}]', "'c' is there twice, in lines 2 and"),
        ("a.JSON", '{"a": "\x7f\U0001f534", "a": 2}', "'a' is there twice, in lines 1 and 1"),
        ("a.yaml", "a:\n  b: 010\n", "line 2: 010 is an octal number in YAML; write it without"),
        ("a.yaml", "[-0_7]", "-0_7 is an octal number"),
        ("a.yaml", "caption: Player #7 runs\n", "line 1: caption ends before '#7 runs', which"),
        ("a.yaml", "a: {caption: it\n  is # here\n  }", "line 2: caption ends before '# here'"),
        ("a.yaml", "stream:\n  negative_prompt: dull #1\n", "negative_prompt ends before '#1'"),
        ("a.yaml", "caption: Scene: a cat\n", "is not YAML: line 1: mapping values are not allowed "
         "here; quote a text that holds a colon"),
        ("a.yaml", "a: \x00", "is not YAML: unacceptable character"),
        ("a.json", "- a: 1", "damaged JSON (Expecting value: line 1 column 1"),
        ("a.json", '[{"a": 1},]', "damaged JSON ("),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    path = written(tmp_path, name, text)
    said = refused(read_plain, path)
    assert said.startswith(f"{path}: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("name", "text", "data"),
    [
        ("a.yaml", "a: 1  # one\nb: '#7'\nc: x#y\n", {"a": 1, "b": "#7", "c": "x#y"}),
        ("a.yaml", 'caption: "Player #7"  # the captain\n', {"caption": "Player #7"}),
        ("a.yaml", "\ufeffpipeline: tiny # shipped\n", {"pipeline": "tiny"}),
        ("a.yaml", "a: 0\nb: 0.5\nc: 0x10\nd: '010'\n", {"a": 0, "b": 0.5, "c": 16, "d": "010"}),
        ("a.yaml", "a: &x {b: 1}\nc: {<<: *x, b: 2}\n", {"a": {"b": 1}, "c": {"b": 2}}),
        ("a.yaml", r'a: "\ud83d\udd34"', {"a": "\U0001f534"}),
        ("a.json", '\ufeff{\r\n\t"a": "\\ud83d\\udd34 #1"}', {"a": "\U0001f534 #1"}),
        ("a.json", '[{"a": 1}, {"a": 1}]', [{"a": 1}, {"a": 1}]),
    ],
)
def test_the_rest_is_read_as_it_is(tmp_path: Path, name: str, text: str, data: object) -> None:
    assert read_plain(written(tmp_path, name, text)) == data


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("a: é".encode("utf-16"))
    assert "is no text in UTF-8" in refused(read_plain, path)


def test_a_lone_surrogate_is_refused_in_a_script(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", r'[{"caption": "\ud83d", "seconds": 1}]')
    assert "is no Unicode text" in refused(load_script, path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("stream.negative_prompt=dull #1", "the value ends before '#1'"),
        ("stream.seed=007", "007 is an octal number"),
        ("geometry={height: 64, height: 32}", "the key 'height' is there twice"),
    ],
)
def test_overrides_are_read_with_the_same_care(value: str, message: str) -> None:
    from lltk.graph.recipe_files import shipped

    said = refused(read_recipe, shipped()["tiny_stream"], [value])
    assert said.startswith(f"--set {value}: ") and message in said


def test_a_script_for_a_recipe_and_a_recipe_for_a_script(tmp_path: Path) -> None:
    script = written(tmp_path, "s.json", json.dumps([{"caption": "a", "seconds": 1}]))
    assert "is a shot script, not a recipe; name a recipe first" in refused(load_recipe, script)
    recipe = written(tmp_path, "r.yaml", "extends: tiny_stream\n")
    assert "is a recipe, not a shot script" in refused(load_script, recipe)


def test_yaml_text_may_be_a_single_value() -> None:
    assert parse_yaml("a #b", "x") == "a" and parse_yaml("", "x") is None
