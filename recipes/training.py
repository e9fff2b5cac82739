"""The training entry: Megatron-Bridge's own loop, on whatever this machine has."""

from ..bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from collections.abc import Sequence

from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.vlm_step import forward_step

from ..bridge.megatron import cpu
from .training_log import TrainingLog


def train(config: ConfigContainer, callbacks: Sequence[Callback] = ()) -> None:
    """Train as ``config`` says, from ``checkpoint.pretrained_checkpoint`` or from random weights.

    Args:
        config: complete; on a machine without CUDA its communication settings are adapted (`cpu.settle`).
        callbacks: told of every step by Megatron-Bridge, before our own.
    """
    cpu.settle(config)
    with cpu.runtime():
        pretrain(config, forward_step, callbacks=[*callbacks, TrainingLog()])
