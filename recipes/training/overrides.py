"""Overrides: what `KEY=VALUE` arguments and files of settings change in the configuration of a recipe.

`parse` needs neither torch nor Megatron: a wrong name or value is reported at once. `apply` sets the fields.
"""

import dataclasses
import importlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from . import schema, settings_file, values
from .schema import FOR_ALL_STAGES, OWN, TASKS, Field
from .values import Node, Scalar

LENGTHS = ("train.train_iters", "train.tokens", "train.epochs")
"""Settings of which one decides the length of a run."""

SHORT = {"data": "dataset"}
"""Short names of sections."""

RECIPE = re.compile(r"gpt_oss_vision_\w+")
LONGEST_VALUE = 80
"""Characters of a value in a message."""


@dataclass(frozen=True, slots=True)
class Override:
    """A setting with a value.

    Args:
        key: the name of the setting.
        value: of the type that the field takes; a member of an enum and a dtype by its name.
        text: the value as typed.
        stage: the task or the recipe for which alone it holds; None: for all.
    """

    key: str
    value: Any
    text: str
    stage: str | None = None


def parse(arguments: Sequence[str]) -> list[Override]:
    """The overrides of a command line, those for all stages first.

    An argument ``@FILE`` stands for the settings of a YAML file; other arguments win over files.

    Raises:
        UsageError: for everything that is wrong, in one message.
    """
    reader = _Reader()
    assignments = [argument for argument in reader.assignments(arguments) if not argument.startswith("@")]
    files = [argument[1:] for argument in arguments if argument.startswith("@")]
    typed = [override for argument in assignments for override in reader.of_argument(argument)]
    from_files = [override for file in files for override in reader.of_file(file)]
    if problems := [*reader.problems, *_contradictions(from_files), *_contradictions(typed)]:
        raise UsageError("; ".join(problems))
    found = {(override.stage, override.key): override for override in _left_by(typed, from_files) + typed}
    return sorted(found.values(), key=lambda override: override.stage is not None)


def run_folder(recipe: str, options: Mapping[str, Any], runs: str | Path = "runs") -> Path:
    """The folder of a run: `out=`, or else one in `runs` with the name of its recipe or recipes.

    Raises:
        UsageError: there is a file in its place.
    """
    folder = Path(options.get("out") or Path(runs, recipe.replace(",", "+"))).absolute()
    if not (place := next(place for place in (folder, *folder.parents) if place.exists())).is_dir():
        raise UsageError(f"out={folder} cannot be the folder of a run, as {place} is a file")
    return folder


def for_stage(overrides: Iterable[Override], names: Collection[str]) -> list[Override]:
    """The overrides of one stage: those for its names (task, recipe), and those for all stages that these leave.

    Raises:
        UsageError: two of its names have different values for one setting.
    """
    overrides = list(overrides)
    own = [dataclasses.replace(override, stage=None) for override in overrides if override.stage in names]
    if problems := list(_contradictions(own)):
        raise UsageError("; ".join(problems))
    return _left_by(own, [override for override in overrides if override.stage is None]) + own


def refuse_other_stages(overrides: Iterable[Override], names: Collection[str]) -> None:
    """Refuse overrides for a stage that a run does not have.

    Raises:
        UsageError: with the names (tasks, recipes) of the stages that it has.
    """
    if others := [override for override in overrides if override.stage and override.stage not in names]:
        written, stage = " and ".join(map(_written, others)), others[0].stage
        raise UsageError(f"{written}: this run has no stage {stage}; it has {', '.join(names)}")


def refuse_architecture(overrides: Iterable[Override]) -> None:
    """Refuse overrides of fields that belong to the weights.

    Raises:
        UsageError: with the fields.
    """
    fields = [(override.key, schema.find(override.key)) for override in overrides]
    if keys := [key for key, field in fields if field and field.architecture]:
        raise UsageError(
            f"{' and '.join(keys)} cannot be set, as the architecture comes from the weights; leave it out, or train "
            "without weights"
        )


LENGTH = "the length of the run"


def _slots(override: Override) -> list[str]:
    """The key; and for the settings that decide the length of a run, one name for all of them."""
    return [override.key, LENGTH] if override.key in LENGTHS and override.value is not None else [override.key]


def _prefixes(key: str) -> list[str]:
    return [key[:position] for position, character in enumerate(key) if character == "."]


def _left_by(winners: Iterable[Override], others: Iterable[Override]) -> list[Override]:
    """The others without those whose setting, or whose section, the winners set."""
    winners = list(winners)
    taken = {(override.stage, slot) for override in winners for slot in _slots(override)}
    removed = {(override.stage, override.key) for override in winners if override.value is None}
    return [
        each
        for each in others
        if not taken & {(each.stage, slot) for slot in _slots(each)}
        and not removed & {(each.stage, prefix) for prefix in _prefixes(each.key)}
    ]


def _contradictions(overrides: Sequence[Override]) -> Iterator[str]:
    """Sentences about overrides for the same stage that exclude each other."""
    seen: dict[tuple[str | None, str], Override] = {}
    for override in overrides:
        for slot in _slots(override):
            earlier = seen.setdefault((override.stage, slot), override)
            both = f"{_written(earlier)} and {_written(override)}"
            if earlier.key != override.key:
                yield f"{both} both say how long the run is; give one"
            elif slot != LENGTH and earlier.value != override.value:
                yield f"{both} are two values of one setting; give one"
    for override in overrides:
        for prefix in _prefixes(override.key):
            section = seen.get((override.stage, prefix))
            if section and section.value is None:
                yield f"{_written(section)} and {_written(override)} contradict each other; give one"


def _written(override: Override) -> str:
    return f"{f'{override.stage}.' if override.stage else ''}{override.key}={_short(override.text)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


class _Reader:
    """Reads arguments and files, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @contextmanager
    def _collecting(self, where: str = "") -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            self.problems.append(f"{where}{error}")

    def assignments(self, arguments: Sequence[str]) -> Iterator[str]:
        """The arguments that set or remove a value, or name a file of settings; others are explained."""
        left = list(arguments)
        while left:
            argument = left.pop(0)
            if argument[:1] in {"@", "~"} or ("=" in argument and argument[0] != "-"):
                yield argument
                continue
            name, _, value = argument.partition("=")
            if not value and left and left[0].startswith("="):
                value = left.pop(0)[1:]
            if not value and left and _is_value_of(name, left[0]):
                value = left.pop(0)
            self.problems.append(_explained(name, value))

    def of_argument(self, argument: str) -> list[Override]:
        """The overrides of one argument: several for a mapping."""
        typed, _, text = argument.partition("=")
        with self._collecting():
            stage, key = _split(typed.lstrip("~+"))
            field = _field(stage, key)
            if typed.startswith("~"):
                return [_removal(field, stage, argument)]
            with _about(typed, text):
                node = _read(field, text)
            return self._of_node(stage, key, node, text)
        return []

    def of_file(self, file: str) -> list[Override]:
        """The overrides of a YAML file."""
        found: list[Override] = []
        with self._collecting():
            for setting in settings_file.settings(file, _is_section):
                where = f"{file}, line {setting.line}: "
                found += self._of_node(*_split(setting.key), setting.node, _shown(setting.node), where)
        return found

    def _of_node(self, stage: str | None, key: str, node: Node, text: str, where: str = "") -> list[Override]:
        with self._collecting(where):
            field = _field(stage, key)
            if isinstance(node, dict) and _is_divided(field, node):
                items = ((f"{key}.{name}", item) for name, item in node.items())
                return [each for name, item in items for each in self._of_node(stage, name, item, _shown(item), where)]
            with _about(f"{f'{stage}.' if stage else ''}{key}", text):
                _refuse_value_of_section(field, node)
                return [Override(key, values.convert(field, node), text, stage)]
        return []


@contextmanager
def _about(typed: str, text: str) -> Iterator[None]:
    """Begin the message about a value with the setting and the value."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{typed}={_short(text)}: {error}") from error


def _split(typed: str) -> tuple[str | None, str]:
    """The stage, if any, and the key without short names."""
    stage, _, key = typed.partition(".")
    if not key or not (stage in TASKS or RECIPE.fullmatch(stage)):
        stage, key = None, typed
    section, dot, rest = key.partition(".")
    return stage and stage.removesuffix("_config"), SHORT.get(section, section) + dot + rest


def _is_section(typed: str) -> bool:
    """Whether a mapping in a file holds settings of a section or of a stage."""
    _, key = _split(typed)
    return key in schema.load().sections or typed in TASKS or bool(RECIPE.fullmatch(typed))


def _is_divided(field: Field, node: dict[str, Node]) -> bool:
    """Whether a mapping is set item by item, as Hydra does: the other items of the setting stay."""
    if "group" in field.types:
        return True
    is_mapping = any(name.startswith("dict[") or name == "item" for name in field.types)
    return is_mapping and bool(node) and all(name and "." not in name for name in node)


def _field(stage: str | None, key: str) -> Field:
    field = schema.find(key)
    if field is None:
        raise UsageError(_unknown(key))
    if field.refused:
        raise UsageError(f"{key} {field.refused}")
    if stage and key in FOR_ALL_STAGES:
        raise UsageError(f"{stage}.{key}: {key} holds for all stages; write {key}=VALUE")
    return field


def _unknown(key: str) -> str:
    if "[" in key:
        return f"{key}: an item of a list cannot be set; set the whole list, as in {key.partition('[')[0]}=[1,2]"
    if not key:
        return "`=` without a name in front of it sets nothing; write KEY=VALUE"
    section, sections = key.partition(".")[0], schema.load().sections
    if found := schema.nearest(key):
        return f"{key} is no setting; the nearest {'is' if len(found) == 1 else 'are'} {', '.join(found)}"
    if section in sections:
        return f"{key} is no setting; the section {section} has none with a similar name"
    return f"{key} is no setting; the sections are {', '.join(sections)}"


def _refuse_value_of_section(field: Field, node: Node) -> None:
    is_null = isinstance(node, Scalar) and node.value is None and field.none
    if field.types == ("group",) and not is_null:
        fields = schema.load().fields
        example = next(key for key in fields if key.startswith(f"{field.key}.") and not fields[key].refused)
        raise UsageError(f"{field.key} is a section; set one of its settings, such as {example}")


def _read(field: Field, text: str) -> Node:
    """The value of an argument, which may be in a file."""
    return settings_file.value_of(field, text[1:]) if text.startswith("@") else values.read(text)


def _removal(field: Field, stage: str | None, typed: str) -> Override:
    if "=" in typed:
        raise UsageError(f"{typed}: `~` takes no value; write {field.key}=null")
    if not field.none or field.key not in schema.load().fields:
        raise UsageError(f"{typed}: {field.key} cannot be removed; it takes {values.describe(field)}")
    return Override(field.key, None, "null", stage)


def _is_value_of(name: str, follower: str) -> bool:
    """Whether two arguments are a setting and its value with a space between them."""
    is_setting = name.startswith("-") or bool(schema.nearest(name))
    return is_setting and "=" not in follower and follower[:1] not in {"@", "~"} and not follower.startswith("--")


def _explained(name: str, value: str) -> str:
    """What was probably meant by an argument without `=`, or with dashes."""
    typed = f"{name} {value}".strip()
    if RECIPE.match(name):
        return f"{typed}: several recipes are one argument, with commas between them: RECIPE,{name}"
    if re.search(r"\.ya?ml$", name):
        return f"{typed}: settings of a file are read by @{name}"
    if name.startswith("-") and name.replace("-", "").replace("_", "") == "dryrun":
        return f"{typed}: the option is --dry-run"
    key = _split(name.lstrip("-").replace("-", "_"))[1]
    meant = [key] if schema.find(key) else schema.nearest(key, 1)
    if not meant:
        return f"{typed} is no setting; write KEY=VALUE"
    return f"{typed}: a setting is written with `=`, without dashes and spaces: {meant[0]}={value or 'VALUE'}"


def _shown(node: Node) -> str:
    """A value of a file as text."""
    if isinstance(node, dict):
        return f"{{{', '.join(f'{name}: {_shown(item)}' for name, item in node.items())}}}"
    if isinstance(node, list):
        return f"[{', '.join(_shown(item) for item in node)}]"
    return node.text if isinstance(node, Scalar) else node


def apply(config: Any, overrides: Iterable[Override]) -> None:
    """Set the fields of a `ConfigContainer`, and make the sections that are None and get a value.

    Overrides of the command itself (`schema.OWN`) are left to it, and stages are not looked at (`for_stage`).

    Raises:
        UsageError: for everything that is wrong, in one message: a section lacks a setting that it needs, or the recipe
            has another class in its place.
    """
    sections: dict[str, list[Override]] = {}
    for override in sorted(overrides, key=lambda override: override.key.count(".")):
        if override.key not in OWN:
            sections.setdefault(override.key.partition(".")[0], []).append(override)
    problems = []
    for section, found in sections.items():
        try:
            _apply_to_section(config, section, found)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))


def _apply_to_section(config: Any, section: str, overrides: Sequence[Override]) -> None:
    for override in overrides:
        if override.key == section:
            setattr(config, section, _merged(getattr(config, section), [], override.value))
    inner = [override for override in overrides if override.key != section]
    if section not in schema.load().sections:
        for override in inner:
            _set(config, override.key.split("."), override)
    elif inner:
        settings = _opened(config, section, inner)
        for override in inner:
            settings = _set(settings, override.key.split(".")[1:], override)
        setattr(config, section, settings)


def _opened(config: Any, section: str, overrides: Sequence[Override]) -> Any:
    """The dataclass of a section; a new one where there is None, a name, or a base class without fields."""
    current, description = getattr(config, section), schema.load().sections[section]
    if isinstance(current, str) and description.from_name:
        return _load(description.from_name)(current)
    if current is not None and dataclasses.fields(current):
        return current
    given = {override.key.partition(".")[2]: _native(override) for override in overrides}
    if missing := [f"{section}.{name}" for name in description.required if name not in given]:
        raise UsageError(f"{_written(overrides[0])}: the section {section} also needs {' and '.join(missing)}")
    return _load(description.class_name)(**{name: given[name] for name in description.required})


def _set(settings: Any, path: Sequence[str], override: Override) -> Any:
    """Set a field, or an item of a mapping in it; returns the settings, which are new ones if they are frozen."""
    name, *items = path
    if not hasattr(settings, name):
        raise UsageError(f"{_written(override)}: this recipe has a {type(settings).__name__} here, without {name}")
    value = _merged(getattr(settings, name), items, _native(override))
    if settings.__dataclass_params__.frozen:
        return dataclasses.replace(settings, **{name: value})
    setattr(settings, name, value)
    return settings


def _merged(old: Any, items: Sequence[str], value: Any) -> Any:
    """A new value of a field; mappings keep their other items."""
    known = old if isinstance(old, dict) else {}
    if items:
        name = next((key for key in known if str(key) == items[0]), items[0])  # a key may be a number
        return {**known, name: _merged(known.get(name), items[1:], value)}
    return {**known, **value} if isinstance(value, dict) else value


def _native(override: Override) -> Any:
    """The value as the field holds it: members of enums and dtypes in place of their names."""
    field = schema.find(override.key)
    if field is None or not isinstance(override.value, str):
        return override.value
    if field.enum:
        return _load(field.enum)[override.value]
    return _load(f"torch:{override.value}") if "dtype" in field.types else override.value


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
