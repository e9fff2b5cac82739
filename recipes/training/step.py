"""The training step: Megatron-Bridge's own for models with vision, with losses that have fractional weights."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from megatron.bridge.training import vlm_step
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.state import GlobalState

LARGEST_COUNT = 2**31 - 1
"""Megatron-Core counts the tokens of a global batch, by which it divides gradients, in int32."""


def forward_step(
    state: GlobalState, data_iterator: Iterable[Any], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, partial[Any]]:
    """As `megatron.bridge.training.vlm_step.forward_step`; with `loss_weights`, gradients are those of a weighted mean.

    The loss mask of the batch has the weights. Megatron-Bridge 0.6.2 truncates their sum in each microbatch to a whole
    number.
    """
    output, loss_function = vlm_step.forward_step(state, data_iterator, model, return_schedule_plan)
    assert state.cfg is not None
    if getattr(state.cfg.dataset, "loss_weights", "token") == "token":
        return output, loss_function
    return output, partial(weighted_loss, loss_function, weight_scale(state.cfg))


def weighted_loss(
    loss_function: partial[Any], scale: float, output: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a microbatch and sum of its weights, both multiplied by `scale`, the sum rounded; and both as they are.

    Args:
        loss_function: Megatron-Bridge's `masked_next_token_loss` with the loss mask as its first argument.
        scale: see `weight_scale`.
        output: of the model.
    """
    loss, _, _ = loss_function(output)
    weight = loss_function.args[0].float().sum()
    report = torch.stack([loss.detach(), weight])
    return loss * scale, (weight * scale).round().to(torch.int), {"lm loss": report}


def weight_scale(config: ConfigContainer) -> float:
    """The largest power of two for which the weights of a global batch do not exceed `LARGEST_COUNT`.

    Fractions of a weight are counted too: with context parallelism a rank has a part of each sample. The weights of a
    sample sum to 1 with "sample" and to √n with "square_root", so those of a row of s tokens in k samples to at most k
    and √(k·s).
    """
    length = config.model.seq_length
    samples = length / 2 if config.dataset.packing else 1  # a sample has a token that is learned, and one before it
    weights = samples if config.dataset.loss_weights == "sample" else math.sqrt(samples * length)
    return 2.0 ** math.floor(math.log2(LARGEST_COUNT / (config.train.global_batch_size * weights)))
