"""The top-k router with a learned bias for visual tokens."""

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from .upstream import KEEP_IN_FP32


class VisionBiasedTopKRouter(TopKRouter):
    """Megatron-Core's `TopKRouter` plus ``vision_bias [experts]`` on the logits of visual tokens.

    The bias comes before the top-k, so it moves both the choice and the weights. It is always part of the graph,
    which keeps its gradient defined on batches without an image and needs no look at the data.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vision_bias = nn.Parameter(torch.zeros(self.config.num_moe_experts, dtype=torch.float32))
        self.vision_bias.sequence_parallel = self.config.sequence_parallel
        setattr(self, KEEP_IN_FP32, ("vision_bias",))

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Add the bias where a token is visual, then route as Megatron does.

        Args:
            logits: ``[s, b, experts]``.
            padding_mask: ``[s, b]`` bool, true where the token is visual. Megatron-Core 0.19 carries exactly one
                per-token argument from the model through blocks, recomputation and CUDA graphs to the router,
                and calls it so; `GPTOSSVisionModel` sends the modality along this road.

        Returns:
            Routing weights and routing map, each ``[s * b, experts]``.
        """
        is_visual = padding_mask
        # Megatron's chunked MLP (`mlp_chunks_for_training`) drops the argument; a blind router must not pass.
        assert is_visual is not None, "the modality of the tokens did not reach the router"
        # Added in fp32 and cast back: exact for text tokens, so that a zero bias leaves gpt-oss as it is in any dtype.
        biased = logits + is_visual.unsqueeze(-1) * self.vision_bias
        return super().routing(biased.to(logits.dtype))
