"""RMSNorm for the `torch` back end."""

import torch
from torch import nn

from .parameters import ExtraState, parameter_device


class RMSNorm(nn.Module):
    """RMSNorm of gpt-oss: computed in fp32, multiplied by the weight in fp32, then cast.

    Megatron-Core's ``WrappedTorchNorm`` refuses sequence parallelism. Here the weight has the attribute
    ``sequence_parallel``, so that Megatron sums its gradient over the tensor-parallel ranks.

    Args:
        config: the TransformerConfig; only ``sequence_parallel`` and ``params_dtype`` are read.
        hidden_size: size of the last axis, the one that is normalised.
        eps: added to the mean square.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[…, h]`` to ``[…, h]``, same dtype."""
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * wide).to(hidden_states.dtype)


class RMSNormWithExtraState(ExtraState, RMSNorm):
    """The norm before the experts and the last one, which are modules of their own on Transformer Engine too."""
