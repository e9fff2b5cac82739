"""Settings in files: a YAML file of sections, and a file that holds one value."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from .schema import Field
from .values import Node, Scalar, scalar

YAML_NUMBERS = {".inf": "inf", "-.inf": "-inf", "+.inf": "inf", ".nan": "nan"}


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a YAML file, with the line of its value."""

    key: str
    node: Node
    line: int


def settings(file: str, is_group: Callable[[str], bool]) -> Iterator[Setting]:
    """The settings of a YAML file.

    Args:
        file: its path.
        is_group: whether the mapping of a key holds settings; that of any other key is a value.

    Raises:
        UsageError: the file cannot be read, or is no YAML mapping of sections.
    """
    root = _compose(_text(file), file)
    if root is not None:
        with _refusing_loops(file):
            yield from _settings(root, "", file, is_group)


def _settings(node: Any, prefix: str, file: str, is_group: Callable[[str], bool]) -> Iterator[Setting]:
    if node.id != "mapping":
        raise UsageError(f"{file}, line {_line(node)}: a mapping of settings is expected here, such as `lr: 1e-4`")
    for name, value in _items(node, file):
        key = f"{prefix}{name}"
        if value.id == "mapping" and is_group(key):
            yield from _settings(value, f"{key}.", file, is_group)
        else:
            yield Setting(key, _node(value, file), _line(value))


def _items(node: Any, file: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.value:
        if name.id != "scalar":
            raise UsageError(f"{file}, line {_line(name)}: a name is expected in place of a list or a mapping")
        yield name.value, value


def value_of(field: Field, file: str) -> Node:
    """The value in a file: YAML or JSON for a list or a mapping, else text without the white space around it.

    Raises:
        UsageError: the file cannot be read.
    """
    text = _text(file).strip()
    if any("[" in name or name in {"group", "item"} for name in field.types):
        root = _compose(text, file)
        with _refusing_loops(file):
            return scalar("") if root is None else _node(root, file)
    return text if {"str", "path"} & {*field.types} else scalar(text)


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file or 'a file without a name'} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not text in UTF-8") from error


def _compose(text: str, file: str) -> Any:
    import yaml

    try:
        return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{where}: not valid YAML ({getattr(error, 'problem', error)})") from error


@contextmanager
def _refusing_loops(file: str) -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise UsageError(f"{file}: an alias in it stands for what it is in") from error


def _line(node: Any) -> int:
    return node.start_mark.line + 1


def _node(node: Any, file: str) -> Node:
    """A value of YAML. A scalar without quotes is read as on the command line: `1e-4` is a number, `yes` is text."""
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UsageError(f"{file}, line {_line(node)}: the tag {node.tag} is not read; write a plain value")
    if node.id == "sequence":
        return [_node(item, file) for item in node.value]
    if node.id == "mapping":
        return {name: _node(value, file) for name, value in _items(node, file)}
    if node.style:  # quotes, or a block of text
        return node.value
    if node.value in {"", "~"}:
        return Scalar(None, "null")
    return scalar(YAML_NUMBERS.get(node.value.lower(), node.value))
