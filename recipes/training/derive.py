"""Fields of a configuration that follow from others: set unless the user has set them, refused if they contradict."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from megatron.bridge.training.config import ConfigContainer

from ...errors import UserError


def derive(
    config: ConfigContainer, given: Collection[str] = (), recipe: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Set, in place, what follows from other fields.

    Args:
        config: a recipe's, with the user's settings.
        given: names of the fields that the user has set; these are not changed.
        recipe: the settings of the recipe without the user's.

    Raises:
        UserError: two settings contradict each other.
    """
    derive_sequence_length(config, given)
    derive_weight_decay(config, given)
    check_packing(config)
    derive_learning_rate(config, given, recipe)
    config.tokenizer.vocab_size = config.model.vocab_size - 1  # Megatron-Bridge adds one for the end of a text
    if config.model.calculate_per_token_loss:
        if config.ddp.average_in_collective and "ddp.average_in_collective" in given:
            raise UserError(
                "ddp.average_in_collective=true contradicts model.calculate_per_token_loss=true: the sum of gradients "
                "is divided by all tokens"
            )
        config.ddp.average_in_collective = False  # the sum of gradients is divided by all tokens


def derive_learning_rate(config: ConfigContainer, given: Collection[str], recipe: Mapping[str, Any]) -> None:
    """Let another learning rate end at the share of it at which the recipe's ends.

    Raises:
        UserError: the last learning rate is above the highest.
    """
    optimizer, highest = config.optimizer, recipe.get("optimizer.lr")
    if "optimizer.lr" in given and "optimizer.min_lr" not in given and highest:
        optimizer.min_lr = float(f"{optimizer.lr * recipe.get('optimizer.min_lr', 0.0) / highest:.9g}")
    if optimizer.min_lr is not None and optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr={optimizer.min_lr:g}, at which the schedule ends, is above optimizer.lr={optimizer.lr:g}"
        )


def derive_sequence_length(config: ConfigContainer, given: Collection[str]) -> None:
    """Give model and data one sequence length: the one that the user has set, else the model's.

    Raises:
        UserError: both are set, to two values, or it is longer than the positions that the rotary embedding covers.
    """
    model, dataset = config.model, config.dataset
    of_data, of_model = "dataset.seq_length" in given, "model.seq_length" in given
    if of_data and of_model and dataset.seq_length != model.seq_length:
        raise UserError(
            f"model.seq_length={model.seq_length} and dataset.seq_length={dataset.seq_length} differ; set one of them, "
            "and the other follows"
        )
    model.seq_length = dataset.seq_length = dataset.seq_length if of_data else model.seq_length
    if model.position_embedding_type == "yarn":
        positions = math.floor(model.yarn_rotary_scaling_factor * model.yarn_original_max_position_embeddings)
        if model.seq_length > positions:
            raise UserError(
                f"model.seq_length={model.seq_length} is longer than the {positions} positions that YaRN covers "
                f"({model.yarn_rotary_scaling_factor:g} · {model.yarn_original_max_position_embeddings})"
            )


def derive_weight_decay(config: ConfigContainer, given: Collection[str] = ()) -> None:
    """Give optimizer and scheduler one weight decay: the one that the user has set, else the optimizer's.

    Megatron's scheduler sets the weight decay in every step from its own fields; the optimizer's has no effect.

    Raises:
        UserError: both are set, to two values.
    """
    optimizer, scheduler = config.optimizer, config.scheduler
    of_scheduler = {"scheduler.start_weight_decay", "scheduler.end_weight_decay"} & {*given}
    if "optimizer.weight_decay" in given and not of_scheduler:
        scheduler.start_weight_decay = scheduler.end_weight_decay = None
    elif of_scheduler and "optimizer.weight_decay" not in given:
        optimizer.weight_decay = scheduler.end_weight_decay
    if scheduler.end_weight_decay is None:
        scheduler.end_weight_decay = optimizer.weight_decay
    if scheduler.start_weight_decay is None:
        scheduler.start_weight_decay = scheduler.end_weight_decay
    if scheduler.end_weight_decay != optimizer.weight_decay:
        raise UserError(
            f"optimizer.weight_decay={optimizer.weight_decay} has no effect: the scheduler sets "
            f"scheduler.end_weight_decay={scheduler.end_weight_decay}; set both to the same value, or one of them"
        )


def check_packing(config: ConfigContainer) -> None:
    """Refuse the settings with which packed samples, or weighted losses, would be others than those asked for.

    Raises:
        UserError: with the field to change.
    """
    model, dataset = config.model, config.dataset
    if getattr(dataset, "loss_weights", "token") != "token" and not model.calculate_per_token_loss:
        raise UserError(
            f"dataset.loss_weights={dataset.loss_weights} needs model.calculate_per_token_loss=true: without it each "
            "microbatch has a mean of its own"
        )
    if not getattr(dataset, "packing", False):
        return
    for size, name in (
        (config.train.micro_batch_size, "train.micro_batch_size"),
        (config.validation.eval_micro_batch_size or 1, "validation.eval_micro_batch_size"),
    ):
        if size != 1:
            raise UserError(f"dataset.packing needs {name}=1, as a pack is a whole row; it is {size}")
    if model.context_parallel_size > 1:
        raise UserError(
            f"dataset.packing does not support model.context_parallel_size={model.context_parallel_size}; use 1, or "
            "don't pack"
        )
    balance = model.moe_router_load_balancing_type
    if "seq_aux_loss" in (balance if isinstance(balance, list) else [balance]):
        raise UserError(
            "dataset.packing does not support model.moe_router_load_balancing_type=seq_aux_loss, which would balance "
            "each pack in place of each sample; use aux_loss or modality_aux_loss"
        )
