"""What the modules of the `torch` back end share: the device of their parameters, and the extra state."""

from typing import Any

import torch


def parameter_device(config: Any) -> torch.device | int | None:
    """The device on which parameters are made, as in Megatron-Core's linear layers.

    Megatron-Core seeds only the CUDA generator of each rank differently: initialised on the CPU, the experts of all
    expert-parallel ranks would be equal.
    """
    return None if config.use_cpu_initialization else torch.cuda.current_device()


class ExtraState:
    """Gives a module the ``_extra_state`` that Transformer Engine's has in a checkpoint: None, without FP8 scales.

    A model loads only where all its objects are in the checkpoint; with this, Transformer Engine loads one of `torch`.
    """

    def get_extra_state(self) -> None:
        """None."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore it."""
