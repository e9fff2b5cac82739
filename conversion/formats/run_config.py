"""Read `run_config.yaml` of a Megatron checkpoint, and compare its model fields with a transformers config."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...bridge.config_map import TRAINING_ONLY, megatron_fields
from ...errors import UserError
from ..messages import listed

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

RUN_CONFIG = "run_config.yaml"
TOWER_FIELDS = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size")
"""Fields of a tower's config that change its output and not the shapes of its weights."""


def read_run_config(folder: Path) -> dict[str, Any]:
    """Read the configuration in the folder of an iteration; empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / RUN_CONFIG
    try:
        found = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError of characters, and of dates like 2026-99-99
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged; copy it again")
    return found


def section(folder: Path, found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of a section of the configuration; empty if it has no such section.

    Args:
        folder: of the iteration.
        found: its configuration.
        name: of the section.

    Raises:
        ValueError: the section holds another type than fields.
    """
    fields = found.get(name, {})
    if not isinstance(fields, dict):
        raise UserError(f"{folder / RUN_CONFIG} has {fields!r} for {name}, not its fields; copy it again")
    return fields


def model_fields(folder: Path) -> dict[str, Any]:
    """Return the model fields of the configuration in the folder of an iteration; empty if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    return section(folder, read_run_config(folder), "model")


def check_config(folder: Path, config: "GPTOSSVisionConfig") -> None:
    """Refuse a transformers config with other numbers than those that the weights were trained with.

    Shapes do not show it: another rotary base, window or epsilon makes another model of the same tensors.

    Args:
        folder: of one iteration. Fields that its ``run_config.yaml`` does not have are not compared.
        config: the one that a conversion uses.

    Raises:
        ValueError: listing the fields that differ.
    """
    trained = model_fields(folder)
    wanted = json.loads(json.dumps(megatron_fields(config)))  # tuples become lists, as in a file
    towers = [section(folder, fields, "vision_config") for fields in (trained, wanted)]
    compared = wanted.keys() & trained.keys() - {*TRAINING_ONLY, "vision_config"}
    pairs = {name: (trained[name], wanted[name]) for name in compared}
    of_tower = towers[0].keys() & towers[1].keys() & {*TOWER_FIELDS}
    pairs |= {f"vision_config.{name}": (towers[0][name], towers[1][name]) for name in of_tower}
    differing = [f"{name} is {mine}, not {theirs}" for name, (mine, theirs) in sorted(pairs.items()) if mine != theirs]
    if differing:
        raise UserError(
            f"{folder / RUN_CONFIG} does not match the config: {listed(differing)}; name one that does with --hf"
        )
