"""A configuration as a YAML file of settings, which `@FILE` reads."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import dataclasses
import enum
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import yaml
from megatron.bridge.training.config import ConfigContainer

from . import schema

MISSING = dataclasses.MISSING


def settings_of(config: ConfigContainer, also: Collection[str] = ()) -> dict[str, Any]:
    """The settings, by key, whose values are not the defaults of their classes, as plain values of YAML.

    The architecture is left out: a recipe fixes it, or the weights do.

    Args:
        config: a recipe's, with or without the user's settings.
        also: settings that are in the file whatever their value: those of the recipe, and those that the user has set.
    """
    found = {}
    for key, field in schema.load().fields.items():
        section, _, name = key.partition(".")
        holder = getattr(config, section, None) if name else config
        is_left_out = field.refused or key in schema.OWN or (field.architecture and key not in also)
        if is_left_out or not dataclasses.is_dataclass(holder):
            continue
        value, default = getattr(holder, name or section, MISSING), _default(holder, name or section)
        if value is not MISSING and not dataclasses.is_dataclass(value) and (value != default or key in also):
            found[key] = _plain(value)
    return found


def text_of(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Settings as YAML by sections; behind each that differs from the recipe's is what the recipe has."""
    lines, section = [], ""
    for key in sorted({*settings, *recipe}, key=lambda key: (key.partition(".")[0], key)):
        head, _, name = key.partition(".")
        if name and head != section:
            lines.append(f"{head}:")
        section = head
        lines.append(("  " if name else "") + _line(name or head, key, settings, recipe))
    return "\n".join(lines) + "\n"


def _line(name: str, key: str, settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    if key not in settings:
        return f"# {name} is not set, in the recipe {_written(recipe[key])}"  # a section that has become None
    line = f"{name}: {_written(settings[key])}"
    if key not in recipe:
        return f"{line}  # not in the recipe"
    return line if settings[key] == recipe[key] else f"{line}  # in the recipe {_written(recipe[key])}"


def _written(value: Any) -> str:
    """A value in one line of YAML."""
    written = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return written.removesuffix("\n").removesuffix("\n...")


def _default(holder: Any, name: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(holder)}
    if name not in fields:
        return MISSING
    factory = fields[name].default_factory
    return fields[name].default if factory is MISSING else factory()


def _plain(value: Any) -> Any:
    """A value without classes of Python."""
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value


def differences(settings: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The keys whose values differ."""
    return (key for key in sorted({*settings, *recipe}) if settings.get(key, MISSING) != recipe.get(key, MISSING))
