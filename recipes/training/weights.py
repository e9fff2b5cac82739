"""The weights that a run starts from: their architecture replaces the recipe's, their processor is the default."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists

from ...bridge.config_map import TRAINING_ONLY, megatron_fields
from ...bridge.hf.configuration_gpt_oss_vision import GPTOSSVisionConfig
from ...conversion.formats.hf_files import KEPT_IN, folder_of_files
from ...errors import UserError

SIZES = ("num_layers", "hidden_size", "num_moe_experts")
"""Fields by which weights of another size than the recipe's are recognised."""


def start_from(config: ConfigContainer, weights: Path) -> None:
    """Let a run start from a Megatron checkpoint, in place.

    Args:
        config: of a recipe. Its architecture becomes that of the weights, its processor theirs unless one is named.
        weights: root or iteration folder of the checkpoint.

    Raises:
        UserError: it is no Megatron checkpoint, keeps no config, or is of another size than the recipe's model.
    """
    _check_checkpoint(weights)
    config.checkpoint.pretrained_checkpoint = str(weights)
    folder = folder_of_files(place / KEPT_IN for place in (weights, weights.parent, *sorted(weights.glob("iter_*"))))
    if folder is None:
        raise UserError(f"{weights} keeps no config of its model; import it again by `gpt-oss-vision convert import`")
    take_architecture(config, _architecture(folder), str(weights))
    if config.dataset.processor_path is None:
        config.dataset.processor_path = str(folder)


def take_architecture(config: ConfigContainer, architecture: Mapping[str, Any], where: str) -> None:
    """Replace the architecture of a recipe, in place.

    Args:
        config: of the recipe.
        architecture: fields of the provider.
        where: it is from, for messages.

    Raises:
        UserError: it is of another size than the recipe's model.
    """
    for name in SIZES:
        mine = getattr(config.model, name)
        if architecture[name] != mine:
            raise UserError(
                f"{where} has {name}={architecture[name]}, the recipe's model {mine}; take the recipe of that size"
            )
    for name, value in architecture.items():
        setattr(config.model, name, value)


def _check_checkpoint(weights: Path) -> None:
    if checkpoint_exists(str(weights)):
        return
    if (weights / "config.json").is_file():
        raise UserError(
            f"{weights} is a Hugging Face checkpoint; make Megatron's of it: "
            f"gpt-oss-vision convert import --hf {weights} --out DIR"
        )
    raise UserError(
        f"{weights} is no Megatron checkpoint; name the folder with latest_train_state.pt, or one of its iterations"
    )


def _architecture(folder: Path) -> dict[str, Any]:
    """The provider's fields that the config of a checkpoint decides."""
    fields = megatron_fields(GPTOSSVisionConfig.from_pretrained(folder))
    return {name: value for name, value in fields.items() if name not in TRAINING_ONLY or name == "vocab_size"}
