"""Reading files that anyone may have written: every bad one is a ValueError that names it."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml

_BYTES = 1 << 26
_YAML = 1 << 18
_DEPTH = 64
_VALUES = 1 << 20
_LARGEST = 1 << 63
"""What is read at most: bytes of a text, bytes of YAML (which takes long), levels, values, and
below which a whole number is."""
_PROSE = ("caption", "negative_prompt", "scene_cut")
"""Keys whose values are prose, of which YAML's comments may cut a part off."""
_COMMENT = re.compile(r"[ \t]+#.*")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open to read.

    Raises:
        ValueError: it is a folder, a pipe, a device or the like, which could be without an end.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path}: is no regular file; name a file")
        yield file


def check_regular(path: Path) -> None:
    """Check that a path is a regular file that can be read.

    Raises:
        ValueError: it is not.
    """
    try:
        with opened(path):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); name a file") from error


def read_text(path: Path, most: int = _BYTES) -> str:
    """The text of a file in UTF-8, of so many bytes at most.

    Raises:
        ValueError: it cannot be read, is no text, or is too large for a text.
    """
    try:
        with opened(path) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > most:
        raise ValueError(f"{path}: is larger than {most >> 20} MiB; name a text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 ({error})") from error


def read_plain(path: Path) -> Any:
    """The plain data of a file: JSON if its suffix is ``.json``, else YAML.

    Errors as `read_text`'s, `parse_json`'s and `parse_yaml`'s.
    """
    parse = parse_json if path.suffix.lower() == ".json" else parse_yaml
    return parse(read_text(path), str(path))


def read_json(path: Path) -> Any:
    """The plain data of a JSON file; errors as `read_text`'s and `parse_json`'s."""
    return parse_json(read_text(path), str(path))


def parse_yaml(text: str, where: str, prose: bool = False) -> Any:
    """The plain data of a YAML text: what JSON could hold too.

    Args:
        text: without tags, which would make other things of values.
        where: what errors call it.
        prose: whether it may be a single text, which no comment may follow.

    Raises:
        ValueError: it is no such text; a key is there twice; YAML would read a number or a caption
            other than it was meant; or as `check_plain`.
    """
    if len(text) > _YAML:
        raise ValueError(f"{where}: is larger than {_YAML >> 10} KiB; make it smaller")
    try:
        _check_tokens(text)
        data = _Loader(text, prose).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{where}: is not YAML: {_one_line(error)}") from error
    except _Misread as error:
        raise ValueError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: is not YAML: {' '.join(str(error).split())}") from error
    check_plain(data, where)
    return data


def parse_json(text: str | bytes, where: str, finite: bool = True) -> Any:
    """The plain data of a JSON text.

    Args:
        text: to read.
        where: what errors call it.
        finite: whether numbers must be finite.

    Raises:
        ValueError: it is not JSON, a name is twice in an object, or as `check_plain`.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except _Misread as error:
        raise ValueError(f"{where}: {_located(text, error)}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: is nested too deeply; {_DEPTH} levels are read") from error
    except ValueError as error:
        raise ValueError(f"{where}: damaged JSON ({error}); restore it") from error
    check_plain(data, where, finite)
    return data


def check_plain(data: Any, where: str, finite: bool = True) -> None:
    """Check that data is plain: what JSON holds, of a size that a person could have written.

    Raises:
        ValueError: another type, too deep or too large, a number that is not finite or beyond 64
            bits, or text that is not Unicode.
    """
    count = 0
    level = [data]
    for _ in range(_DEPTH):
        for value in level:
            _check_value(value, where, finite)
        containers = [value for value in level if isinstance(value, dict | list)]
        count += len(level)
        if count > _VALUES:
            raise ValueError(f"{where}: holds more than {_VALUES} values; make it smaller")
        level = []
        for value in containers:
            level += value if isinstance(value, list) else [*value, *value.values()]
            if len(level) > _VALUES:
                raise ValueError(f"{where}: holds more than {_VALUES} values; make it smaller")
        if not level:
            return
    raise ValueError(f"{where}: is nested too deeply; {_DEPTH} levels are read")


def check_text(text: str, where: str) -> None:
    """Check that a text is Unicode; half of a pair of surrogates is not.

    Raises:
        ValueError: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text!r} is no Unicode text; write it in UTF-8") from error


def _check_tokens(text: str) -> None:
    """Refuse tags, and what is nested too deeply for a reader that calls itself at every level."""
    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        if depth > _DEPTH:
            raise ValueError(f"it is nested too deeply; {_DEPTH} levels are read")
        if isinstance(token, yaml.TagToken):
            raise ValueError(f"line {token.start_mark.line + 1} has a tag; remove it")


def _check_value(value: Any, where: str, finite: bool) -> None:
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, dict):
        other = next((key for key in value if not isinstance(key, str)), None)
        if other is not None or None in value:
            raise ValueError(f"{where}: the key {other!r} is no text; quote it")
    elif isinstance(value, bool):
        pass
    elif isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise ValueError(f"{where}: holds a number beyond 64 bits; write a smaller one")
    elif isinstance(value, float):
        if finite and not math.isfinite(value):
            raise ValueError(f"{where}: holds {value}, which is not finite; write a number")
    elif value is not None and not isinstance(value, list):
        raise ValueError(f"{where}: {value!r} is a {type(value).__name__}; quote it")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Misread(f"the key {twice!r} is twice in an object; remove one")
    return made


def _located(text: str | bytes, error: _Misread) -> str:
    """The error with the lines of the key that is twice in JSON."""
    # JSON is YAML but for white space, and YAML's nodes know their lines.
    plain = (text.decode() if isinstance(text, bytes) else text).replace("\t", " ")
    try:
        root = yaml.compose(yaml.reader.Reader.NON_PRINTABLE.sub(" ", plain), yaml.SafeLoader)
        _refuse_repeated(root)
    except _Misread as found:
        return str(found)
    except yaml.YAMLError:
        pass
    return str(error)


def _refuse_repeated(node: yaml.Node | None) -> None:
    """Refuse a key that is twice in a mapping, at any depth; names both lines."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item)
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
        for _, value in node.value:
            _refuse_repeated(value)


def _refuse_twice(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        name, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if name in lines and key.tag != "tag:yaml.org,2002:merge":
            raise _Misread(
                f"the key {key.value!r} is there twice, in lines {lines[name]} and {line}; remove "
                "one, or begin the second entry with a dash if it is one of a list"
            )
        lines[name] = line


def _one_line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line = "" if mark is None else f"line {mark.line + 1}: "
    colon = "mapping values are not allowed" in (error.problem or "")
    return f"{line}{error.problem}{'; quote a text that holds a colon' if colon else ''}"


class _Misread(ValueError):
    """YAML or JSON that would be read other than it was meant."""


class _Loader(yaml.SafeLoader):
    """Takes ``1e-4`` for a number, and refuses what would be read other than it was meant."""

    def __init__(self, text: str, prose: bool) -> None:
        super().__init__(text)
        self._text = text
        self._prose = prose

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_twice(node)
        for key, value in node.value:
            if key.value in _PROSE:
                self._refuse_cut(key.value, value)
        return super().construct_mapping(node, deep)

    def construct_document(self, node: yaml.Node) -> Any:
        if self._prose:
            self._refuse_cut("the value", node)
        return super().construct_document(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _LEADING_ZERO.fullmatch(node.value):
            raise _Misread(
                f"line {node.start_mark.line + 1}: {node.value} is an octal number in YAML; write "
                "it without the leading 0, or quote it if it is text"
            )
        return super().construct_yaml_int(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        """The text; characters that JSON wrote as two surrogates are joined again."""
        text = super().construct_yaml_str(node)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def _refuse_cut(self, key: str, value: yaml.Node) -> None:
        """Refuse a text after which a comment stands on the same line."""
        plain = isinstance(value, yaml.ScalarNode) and value.style is None
        if plain and (rest := _COMMENT.match(self._text, value.end_mark.index)):
            raise _Misread(
                f"line {value.end_mark.line + 1}: {key} ends before {rest[0].strip()!r}, which "
                "YAML takes for a comment; quote the text, or move the comment to its own line"
            )


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)
