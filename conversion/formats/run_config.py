"""What a Megatron checkpoint says of itself: `run_config.yaml`, with the model's fields and how it was trained."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...bridge.config_map import TRAINING_ONLY, megatron_fields
from ...errors import UserError
from ..messages import listed

if TYPE_CHECKING:
    from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

NAME = "run_config.yaml"
TOWER_FIELDS = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size")
"""What the numbers of a tower depend on, beyond what shapes tell."""


def read_run_config(folder: Path) -> dict[str, Any]:
    """The configuration in the folder of an iteration; empty where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / NAME
    try:
        found = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError of characters, and of dates like 2026-99-99
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged; copy it again")
    return found


def section(folder: Path, found: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields of a part of the configuration; none where it has no such part.

    Args:
        folder: of the iteration.
        found: its configuration.
        name: of the part.

    Raises:
        ValueError: it holds something else.
    """
    fields = found.get(name, {})
    if not isinstance(fields, dict):
        raise UserError(f"{folder / NAME} has {fields!r} for {name}, not its fields; copy it again")
    return fields


def model_fields(folder: Path) -> dict[str, Any]:
    """What the configuration in the folder of an iteration says of the model; nothing where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    return section(folder, read_run_config(folder), "model")


def check_config(folder: Path, config: "GPTOSSVisionConfig") -> None:
    """Whether the weights of a checkpoint were trained with the numbers of a transformers config.

    Shapes do not tell: another rotary base, window or epsilon makes another model of the same tensors.

    Args:
        folder: of one iteration. What its ``run_config.yaml`` does not say is not asked.
        config: what a conversion goes by.

    Raises:
        ValueError: listing the fields that differ.
    """
    trained = model_fields(folder)
    wanted = json.loads(json.dumps(megatron_fields(config)))  # lists for tuples, as a file gives them back
    towers = [section(folder, fields, "vision_config") for fields in (trained, wanted)]
    asked = wanted.keys() & trained.keys() - {*TRAINING_ONLY, "vision_config"}
    pairs = {name: (trained[name], wanted[name]) for name in asked}
    of_tower = towers[0].keys() & towers[1].keys() & {*TOWER_FIELDS}
    pairs |= {f"vision_config.{name}": (towers[0][name], towers[1][name]) for name in of_tower}
    differing = [f"{name} is {mine}, not {theirs}" for name, (mine, theirs) in sorted(pairs.items()) if mine != theirs]
    if differing:
        raise UserError(f"{folder / NAME} does not match the config: {listed(differing)}; name one that does with --hf")
