"""The top-k router with a learned bias for visual tokens, a load-balancing loss per modality, and counters."""

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    router_gating_linear,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn
from torch.nn import functional as F

from ..config_map import PER_MODALITY
from ..weight_map import KEPT_IN_FP32
from .upstream import KEEP_IN_FP32


class VisionBiasedTopKRouter(TopKRouter):
    """Megatron-Core's `TopKRouter` plus ``vision_bias [experts]`` on the logits of visual tokens.

    The bias is added before the top-k, so it changes both the chosen experts and their weights. It is always part of
    the graph: its gradient is defined on batches without an image, and nothing is read from the device.

    ``tokens_per_expert [2, experts]`` counts on the device for how many text and visual tokens each expert was chosen
    in training; `router_statistics.pop_expert_counts` resets it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vision_bias = nn.Parameter(torch.zeros(self.config.num_moe_experts, dtype=torch.float32))
        self.vision_bias.sequence_parallel = self.config.sequence_parallel
        setattr(self, KEEP_IN_FP32, KEPT_IN_FP32)
        # Integers, which the half-precision wrapper does not cast.
        counts = torch.zeros(2, self.config.num_moe_experts, dtype=torch.int64, device=self.vision_bias.device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def gating(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - Megatron-Core's name
        """Logits ``[s, b, experts]`` of hidden states ``[s, b, h]``, in ``moe_router_dtype`` or the input's dtype.

        Megatron-Core 0.19.2 calls Transformer Engine's GEMM wherever that package can be imported. With an fp32 output
        it reads the 16-bit bias as fp32 (Transformer Engine issue 3562), so the bias is added here.
        """
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype or "", input.dtype)
        if dtype == input.dtype:
            return F.linear(input, self.weight, self.bias)
        return router_gating_linear(input, self.weight, None, dtype) + self.bias.to(dtype)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Add the bias to the logits of visual tokens, then route as Megatron does.

        Args:
            logits: ``[s, b, experts]``.
            padding_mask: ``[s, b]`` bool, true where the token is visual. Megatron-Core 0.19 carries exactly one
                per-token argument from the model through blocks, recomputation and CUDA graphs to the router, under
                this name; `MCoreGPTOSSVisionModel` passes the visual mask in it. Where padding is known ``[s, 2b]``:
                the second half is true at padding, which losses and counts leave out.

        Returns:
            Routing weights and routing map, each ``[s * b, experts]``.
        """
        # Megatron's chunked MLP (`mlp_chunks_for_training`) drops the argument.
        assert padding_mask is not None, "the visual mask was not passed to the router"
        rows = logits.shape[1]
        is_visual, is_padding = padding_mask[:, :rows], padding_mask[:, rows:]
        is_padding = is_padding if is_padding.shape[1] else None
        # Added in fp32 and cast back: exact for text tokens, and with a zero bias equal to gpt-oss in any dtype.
        biased = (logits + is_visual.unsqueeze(-1) * self.vision_bias).to(logits.dtype)
        probs, routing_map = super().routing(biased, padding_mask=is_padding)
        # With recomputation a layer runs twice, the first time without gradients.
        if self.training and torch.is_grad_enabled():
            is_token = torch.ones_like(is_visual) if is_padding is None else ~is_padding
            modalities = (is_token & ~is_visual).flatten(), (is_token & is_visual).flatten()
            if self.routing_type == PER_MODALITY:
                probs = self.balance(probs, biased.flatten(0, 1), modalities)
            self.count(routing_map, modalities)
        return probs, routing_map

    def balance(
        self, probs: torch.Tensor, logits: torch.Tensor, modalities: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Attach a load-balancing loss per modality to the routing weights, all ``[t, experts]`` or ``[t]``.

        The loss is that of Switch Transformer (arXiv 2101.03961) for each modality, weighted by its share of the
        tokens. It is 1 when both are balanced, and equal to ``aux_loss`` when there is one modality only.
        """
        coefficient, losses, counts = self.config.moe_aux_loss_coeff, [], []
        for is_one in modalities:
            chosen, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=~is_one
            )
            per_expert, _, tokens = get_tokens_per_expert_and_token_count(
                chosen, self.tp_cp_group, self.topk, with_padding_mask=True
            )
            loss = switch_load_balancing_loss_func(
                scores, per_expert, tokens.clamp(min=1), self.topk, self.num_experts, coefficient
            )
            losses.append(loss * tokens)
            counts.append(tokens)
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, sum(losses) / sum(counts), "load_balancing_loss", self.tp_cp_group
        )

    @torch.no_grad()
    def count(self, routing_map: torch.Tensor, modalities: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add a routing map ``[t, experts]`` of tokens ``[t]`` to the counts, without a device synchronization."""
        self.tokens_per_expert += torch.stack([(routing_map & is_one.unsqueeze(-1)).sum(0) for is_one in modalities])
