"""Values of settings: read as Hydra's grammar reads them, then converted to the type of a field.

Hydra is imported only for a text that is more than a number, a word or a path, as that takes longer than all else.
"""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...errors import UsageError
from .schema import Field

SYNTAX = frozenset("'\"\\$[]{}(),")
"""Characters with a meaning in Hydra's grammar for values. A text without them is a number, a word or a path."""

# Hydra's lexer, OverrideLexer.g4 of hydra-core 1.3.
UNSIGNED = r"(?:0|[1-9](?:_?\d)*)"
POINT = rf"(?:{UNSIGNED}\.|{UNSIGNED}?\.\d(?:_?\d)*)"
INT = re.compile(rf"[+-]?{UNSIGNED}", re.ASCII)
FLOAT = re.compile(rf"[+-]?(?:{POINT}|(?:{UNSIGNED}|{POINT})e[+-]?\d(?:_?\d)*|inf|nan)", re.ASCII | re.IGNORECASE)
WORDS = {"null": None, "true": True, "false": False}

# `$NAME` and `${NAME}`, which a shell would have replaced; Hydra's interpolations have a resolver: `${oc.env:NAME}`.
SHELL_VARIABLE = re.compile(r"(?<!\\)\$(?:[A-Za-z_]\w*|\{[^}:]*\})")
QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


MOST_CHOICES = 12
"""Of which a message names each."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value without quotes: as Hydra reads it, and the text, which a field that takes text gets."""

    value: bool | float | str | None
    text: str


type Node = Scalar | str | list[Node] | dict[str, Node]
"""A value before its type is known; a str was written in quotes."""


class WrongTypeError(Exception):
    """A value is not of the type; the message, if any, is advice."""


def read(text: str) -> Node:
    """A value as typed on a command line.

    A text that is none in Hydra's grammar, such as ``s3://bucket/key=1``, is text.

    Raises:
        UsageError: for a sweep, and for a variable that the shell or the environment does not have.
    """
    if not SYNTAX & set(text):
        return scalar(text)
    if variable := SHELL_VARIABLE.search(QUOTED.sub("", text)):
        name = variable[0].strip("${}")
        raise UsageError(
            f"the shell has not replaced {variable[0]}; write it in double quotes, or as ${{oc.env:{name}}}, or in "
            "single quotes within double quotes if it is meant as text"
        )
    return _read_by_hydra(text)


def scalar(text: str) -> Scalar:
    """A value without any of Hydra's special characters."""
    text = text.strip()
    if text.lower() in WORDS:
        return Scalar(WORDS[text.lower()], text)
    if INT.fullmatch(text):
        return Scalar(int(text), text)
    return Scalar(float(text) if FLOAT.fullmatch(text) else text, text)


def _read_by_hydra(text: str) -> Node:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"value={text}")
    except HydraException:
        return Scalar(text.strip(), text.strip())
    if parsed.is_sweep_override():
        raise UsageError(
            "it is a sweep over several values, and a run has one; write a list in brackets ([a,b]), and text with a "
            "comma in quotes that the shell leaves in place (\"'a,b'\")"
        )
    value: Any = parsed.value()
    if isinstance(value, str) and text.lstrip()[0] in "'\"" and "${" not in value:
        return value
    return _node(_resolved(value))


def _resolved(value: Any) -> Any:
    """The value with interpolations such as ``${oc.env:HOME}`` replaced."""
    if "${" not in str(value):
        return value
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found: Any = OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rpartition("interpolation: ")[2].strip('"')
        raise UsageError(f"it cannot be resolved: {reason}") from error
    return scalar(found["value"]) if isinstance(found["value"], str) else found["value"]


def _node(value: Any) -> Node:
    """A value that Hydra has read."""
    if isinstance(value, list):
        return [_node(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _node(item) for key, item in value.items()}
    return value if isinstance(value, Scalar) else Scalar(value, "null" if value is None else str(value))


def convert(field: Field, node: Node) -> Any:
    """The value of the type that the field takes.

    Raises:
        UsageError: the field takes another type; with what it takes and an example.
    """
    if isinstance(node, Scalar) and node.value is None and field.none:
        return None
    advice = ""
    for name in field.types:
        try:
            return _convert(name, field, node)
        except WrongTypeError as error:
            advice = advice or str(error)
    raise UsageError(f"it takes {describe(field)}, such as {field.key}={_example(field)}{advice and f'; {advice}'}")


def _convert(name: str, field: Field, node: Node) -> Any:
    outer, _, inner = name.rstrip("]").partition("[")
    if outer == "dict":
        return {key: _convert(inner, field, item) for key, item in _of(dict, node).items()}
    if inner:
        kind = {"list": list, "tuple": tuple, "set": set}[outer]
        return kind(_convert(inner, field, item) for item in _of(list, node))
    return TYPES[name].convert(field, node)


def _of[Kind](kind: type[Kind], node: Any) -> Kind:
    """The node, if it is of this kind. Never a bool as an int."""
    value = node.value if isinstance(node, Scalar) else node
    if type(value) is not kind:
        raise WrongTypeError
    return value


def _to_bool(field: Field, node: Node) -> bool:
    return _of(bool, node)


def _to_int(field: Field, node: Node) -> int:
    if isinstance(node, Scalar) and isinstance(node.value, float) and node.value.is_integer():
        return int(node.value)
    if isinstance(node, Scalar) and re.fullmatch(r"[+-]?0[\dxXoObB]\w*", node.text):
        raise WrongTypeError("write it in decimal digits without leading zeros")
    if isinstance(node, str):
        raise WrongTypeError("write it without quotes")
    return _of(int, node)


def _to_float(field: Field, node: Node) -> float:
    value = node.value if isinstance(node, Scalar) else node
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongTypeError
    try:
        value = float(value)
    except OverflowError as error:
        raise WrongTypeError from error
    if math.isnan(value) or (math.isinf(value) and not field.infinite):
        raise WrongTypeError
    return value


def _text(node: Node) -> str:
    if not isinstance(node, Scalar | str):
        raise WrongTypeError
    return node.text if isinstance(node, Scalar) else node


def _to_str(field: Field, node: Node) -> str:
    if isinstance(node, Scalar) and node.value is None:
        raise WrongTypeError(f"for the word itself write \"'{node.text}'\"")
    if not isinstance(node, Scalar | str):
        raise WrongTypeError("write text with brackets or braces in quotes that the shell leaves in place (\"'[a]'\")")
    return node.text if isinstance(node, Scalar) else node


def _to_path(field: Field, node: Node) -> str:
    if isinstance(node, Scalar | str) and not _text(node):
        raise WrongTypeError("nothing follows the `=`")
    return _to_str(field, node)


def _to_dtype(field: Field, node: Node) -> str:
    name = _text(node).lower().removeprefix("torch.")
    if name not in DTYPES:
        raise WrongTypeError
    return DTYPES[name]


def _to_choice(field: Field, node: Node) -> Any:
    typed = _text(node)
    choices = {str(choice): choice for choice in field.choices}
    if typed in choices:
        return choices[typed]
    found = difflib.get_close_matches(typed, choices) if len(choices) > MOST_CHOICES else []
    raise WrongTypeError(f"the nearest are {', '.join(found)}" if found else "")


def _to_any(field: Field, node: Node) -> Any:
    if isinstance(node, dict):
        return {key: _to_any(field, item) for key, item in node.items()}
    if isinstance(node, list):
        return [_to_any(field, item) for item in node]
    return node.value if isinstance(node, Scalar) else node


def _never(field: Field, node: Node) -> Any:
    raise WrongTypeError


def _to_size(field: Field, node: Node) -> int:
    if (size := _to_int(field, node)) < 1:
        raise WrongTypeError
    return size


def _to_positive(field: Field, node: Node) -> float:
    if (number := _to_float(field, node)) <= 0:
        raise WrongTypeError
    return number


def _to_rate(field: Field, node: Node) -> float:
    if (number := _to_float(field, node)) < 0:
        raise WrongTypeError
    return number


def _to_share(field: Field, node: Node) -> float:
    if (number := _to_float(field, node)) > 1 or number < 0:
        raise WrongTypeError
    return number


def _to_count(field: Field, node: Node) -> int:
    """A number with or without a unit: ``2B``, ``1.5T``, ``500M``, ``64K``, ``1e9``."""
    text = _text(node)
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in COUNTS else (text, "")
    if not (INT.fullmatch(digits) or FLOAT.fullmatch(digits)) or not math.isfinite(float(digits)):
        raise WrongTypeError
    count = Fraction(digits) * COUNTS.get(unit, 1)
    if count <= 0 or count.denominator != 1:
        raise WrongTypeError
    return int(count)


def _to_duration(field: Field, node: Node) -> float:
    """Numbers with units, the longest unit first: ``1d12h``, ``4h``, ``90m``, ``3600s``. In seconds."""
    text = _text(node)
    parts = DURATION.fullmatch(text)
    seconds = (
        sum(float(part or 0) * size for part, size in zip(parts.groups(), UNITS.values(), strict=True))
        if parts
        else 0.0
    )
    if not seconds:
        raise WrongTypeError("a number needs its unit, as in 3600s" if INT.fullmatch(text) else "")
    return seconds


COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in UNITS), re.ASCII)

DTYPES = {
    **{name: name for name in ("bfloat16", "float16", "float32")},
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


@dataclass(frozen=True, slots=True)
class Type:
    """What messages say about a type, an example of it, and the function that converts to it."""

    description: str
    example: str
    convert: Callable[[Field, Node], Any]


TYPES = {
    "bool": Type("true or false", "true", _to_bool),
    "int": Type("a whole number", "100", _to_int),
    "float": Type("a finite number", "1e-4", _to_float),
    "str": Type("text", "text", _to_str),
    "path": Type("a path", "DIR", _to_path),
    "dtype": Type("bfloat16, float16 or float32", "bfloat16", _to_dtype),
    "choice": Type("one of its values", "", _to_choice),
    "any": Type("any value", "1", _to_any),
    "item": Type("a mapping", "{a: 1}", _never),  # of which `schema.find` finds items
    "group": Type("a mapping of its settings", "{a: 1}", _never),  # whose settings are converted one by one
    "size": Type("a whole number from 1 up", "8", _to_size),
    "positive": Type("a number above 0", "2", _to_positive),
    "rate": Type("a number from 0 up", "0.1", _to_rate),
    "share": Type("a number from 0 to 1", "0.1", _to_share),
    "count": Type("a number above 0 with or without K, M, B or T", "2B", _to_count),
    "duration": Type("a time with units d, h, m, s", "4h", _to_duration),
}


def describe(field: Field) -> str:
    """What a field takes, in words."""
    kinds = [_describe(name, field) for name in field.types if name != "item"] + ["null"] * field.none
    return " or ".join(kinds)


def _describe(name: str, field: Field) -> str:
    outer, _, inner = name.rstrip("]").partition("[")
    if outer == "dict":
        return "a mapping"
    if inner:
        return "a list" if inner == "any" else f"a list, each item {TYPES[inner].description}"
    if name == "choice":
        choices = [str(choice) for choice in field.choices]
        return f"one of {', '.join(choices)}" if len(choices) <= MOST_CHOICES else f"one of {len(choices)} names"
    return "a number or inf" if name == "float" and field.infinite else TYPES[name].description


def _example(field: Field) -> str:
    outer, _, inner = next(name for name in field.types if name != "item").rstrip("]").partition("[")
    if outer == "choice":
        return str(field.choices[0])
    if outer == "dict":
        return "{a: 1}"
    return f"[{TYPES[inner].example}]" if inner else TYPES[outer].example
