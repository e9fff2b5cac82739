"""Core attention of the `transformer_engine` back end. Importing this module needs Transformer Engine."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig


class TESinkAttention(TEDotProductAttention):
    """Megatron-Core's wrapper of Transformer Engine's attention, with three mends for learnable sinks.

    In Megatron-Core 0.19.2 with Transformer Engine 2.12, the sinks are uninitialised memory (Transformer Engine pull
    request 2694); they are not marked as sharded, so the gradient norm counts those of one tensor-parallel rank only
    (Megatron-LM issue 7452); with context parallelism every rank has their whole gradient, and data parallelism, which
    spans the context-parallel ranks, sums it.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        sinks = self.softmax_offset
        set_tensor_model_parallel_attributes(sinks, True, 0, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                config.init_method(sinks)
        if config.context_parallel_size > 1:
            sinks.register_hook(lambda gradient: gradient / config.context_parallel_size)
