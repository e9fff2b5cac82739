"""The settings of a training run: their names and types, read from `schema.json` without importing Megatron.

`schema_generator.py` writes that file from the classes of a `ConfigContainer`.
"""

import difflib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("schema.json")

TASKS = ("pretrain", "align", "sft", "lora", "long_context")
"""Names of stages, in front of a setting that holds for one stage alone: ``align.optimizer.lr=1e-3``."""


@dataclass(frozen=True, slots=True)
class Field:
    """A setting.

    Args:
        key: its name, as in ``train.train_iters``.
        types: names of the types that it takes (`values.TYPES`), such as ``int`` or ``list[str]``, the strictest first.
        choices: the values of ``choice``.
        enum: for choices that are members of an enum: its class, as ``module:Class``.
        none: whether it can be None.
        infinite: whether a number may be infinite.
        architecture: whether it belongs to the weights and not to a run.
        refused: why it cannot be set, as the end of a sentence that begins with the key.
    """

    key: str
    types: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    enum: str | None = None
    none: bool = False
    infinite: bool = False
    architecture: bool = False
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A group of settings: a dataclass that is a field of a `ConfigContainer`.

    Args:
        class_name: of the dataclass, as ``module:Class``.
        none: whether the section can be None.
        required: fields without a default.
        from_name: the function that makes the dataclass of a name, as ``module:function``.
    """

    class_name: str
    none: bool = False
    required: tuple[str, ...] = ()
    from_name: str | None = None


@dataclass(frozen=True, slots=True)
class Schema:
    """All settings by key, and all sections by name."""

    sections: dict[str, Section]
    fields: dict[str, Field]


OWN = {
    field.key: field
    for field in (
        Field("out", ("path",)),
        Field("weights", ("path",)),
        Field("gpus", ("size",)),
        Field("gpu", ("choice",), choices=("h100", "h200")),
        Field("time", ("duration",)),
        Field("hang", ("duration",)),
        Field("train.tokens", ("count",)),
        Field("train.epochs", ("positive",)),
    )
}
"""The settings of the command itself, which are no fields of a `ConfigContainer`."""

FOR_ALL_STAGES = ("out", "weights", "gpus", "gpu", "time", "hang")
"""Settings that no stage has for itself."""


@cache
def load() -> Schema:
    """The schema of the file, and the settings of the command itself."""
    content = json.loads(FILE.read_text())
    sections = {name: Section(**_tuples(entry)) for name, entry in content["sections"].items()}
    groups = {name: Field(name, ("group",), none=section.none) for name, section in sections.items()}
    named = {key: Field(key, **_tuples(entry)) for key, entry in content["fields"].items()}
    for name in groups.keys() & named.keys():
        named[name] = replace(named[name], types=(*named[name].types, "group"))
    return Schema(sections, OWN | groups | named)


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


def find(key: str) -> Field | None:
    """The setting of this name, which may also be an item of a dictionary (``env_vars.NCCL_DEBUG``)."""
    fields = load().fields
    if key in fields:
        return fields[key]
    parent, _, item = key.rpartition(".")
    field = find(parent) if parent and item else None
    types = field.types if field else ()
    if field is None or field.refused or not any(kind.startswith("dict[") or kind == "item" for kind in types):
        return None
    inner = next((kind[len("dict[") : -1] for kind in types if kind.startswith("dict[")), "any")
    item_types = ("item", "any") if inner == "any" else (inner,)
    return Field(key, item_types, none=inner == "any", architecture=field.architecture)


def nearest(key: str, count: int = 3) -> list[str]:
    """The settings whose names are most like `key`, the likeliest first; the part after the last dot counts most."""
    section, _, name = key.rpartition(".")
    names, sections = (difflib.SequenceMatcher(b=part, autojunk=False) for part in (name, section))
    of_section = {known: _ratio(sections, known) for known in ("", *load().sections)} if section else {}
    scores = {}
    for known, field in load().fields.items():
        known_section, _, known_name = known.rpartition(".")
        if not field.refused and (ratio := _ratio(names, known_name, 0.5)):
            scores[known] = 0.75 * ratio + 0.25 * of_section[known_section] if section else ratio
    best = sorted(scores, key=lambda known: (-scores[known], known))[:count]
    return [known for known in best if scores[known] >= max(0.6, scores[best[0]] - 0.25)]


def _ratio(matcher: difflib.SequenceMatcher, text: str, least: float = 0.0) -> float:
    """The similarity of two texts, 0 where it is below `least`."""
    matcher.set_seq1(text)
    if matcher.real_quick_ratio() < least or matcher.quick_ratio() < least:
        return 0.0
    return matcher.ratio()
