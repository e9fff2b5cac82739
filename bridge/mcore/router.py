"""The top-k router with a learned bias for visual tokens, a load balance per modality, and a count of what it chose."""

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from ..config_map import PER_MODALITY
from .upstream import KEEP_IN_FP32


class VisionBiasedTopKRouter(TopKRouter):
    """Megatron-Core's `TopKRouter` plus ``vision_bias [experts]`` on the logits of visual tokens.

    The bias comes before the top-k, so it moves both the choice and the weights. It is always part of the graph,
    which keeps its gradient defined on batches without an image and needs no look at the data.

    ``tokens_per_expert [2, experts]`` counts the choices of training for text and for visual tokens, on the device,
    until a reader (`router_statistics.pop_expert_counts`) sets it to zero.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vision_bias = nn.Parameter(torch.zeros(self.config.num_moe_experts, dtype=torch.float32))
        self.vision_bias.sequence_parallel = self.config.sequence_parallel
        setattr(self, KEEP_IN_FP32, ("vision_bias",))
        # Whole numbers, so that the half-precision wrapper leaves them alone.
        counts = torch.zeros(2, self.config.num_moe_experts, dtype=torch.int64, device=self.vision_bias.device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """Add the bias where a token is visual, then route as Megatron does.

        Args:
            logits: ``[s, b, experts]``.
            padding_mask: ``[s, b]`` bool, true where the token is visual. Megatron-Core 0.19 carries exactly one
                per-token argument from the model through blocks, recomputation and CUDA graphs to the router,
                and calls it so; `MCoreGPTOSSVisionModel` sends the modality along this road.

        Returns:
            Routing weights and routing map, each ``[s * b, experts]``.
        """
        is_visual = padding_mask
        # Megatron's chunked MLP (`mlp_chunks_for_training`) drops the argument; a blind router must not pass.
        assert is_visual is not None, "the modality of the tokens did not reach the router"
        # Added in fp32 and cast back: exact for text tokens, so that a zero bias leaves gpt-oss as it is in any dtype.
        biased = (logits + is_visual.unsqueeze(-1) * self.vision_bias).to(logits.dtype)
        probs, routing_map = super().routing(biased)
        # Under recomputation a layer runs twice, the first time without gradients.
        if self.training and torch.is_grad_enabled():
            is_visual = is_visual.flatten()
            if self.routing_type == PER_MODALITY:
                probs = self.balance(probs, biased.flatten(0, 1), is_visual)
            self.count(routing_map, is_visual)
        return probs, routing_map

    def balance(self, probs: torch.Tensor, logits: torch.Tensor, is_visual: torch.Tensor) -> torch.Tensor:
        """Attach a load-balancing loss per modality to the routing weights, all ``[t, experts]`` or ``[t]``.

        The loss is Switch's (arXiv 2101.03961) for the tokens of each modality, weighted by their share of all tokens:
        1 when both are balanced, and that of ``aux_loss`` where there is one modality only.
        """
        coefficient, losses = self.config.moe_aux_loss_coeff, []
        for others in (is_visual, ~is_visual):
            chosen, scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, padding_mask=others
            )
            per_expert, _, tokens = get_tokens_per_expert_and_token_count(
                chosen, self.tp_cp_group, self.topk, with_padding_mask=True
            )
            loss = switch_load_balancing_loss_func(
                scores, per_expert, tokens.clamp(min=1), self.topk, self.num_experts, coefficient
            )
            losses.append(loss * tokens / (len(logits) * self.tp_cp_group.size()))
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, sum(losses), "load_balancing_loss", self.tp_cp_group
        )

    @torch.no_grad()
    def count(self, routing_map: torch.Tensor, is_visual: torch.Tensor) -> None:
        """Add ``[t, experts]`` choices of tokens ``[t]`` to the counts; nothing is read back from the device."""
        visual = (routing_map & is_visual.unsqueeze(-1)).sum(0)
        self.tokens_per_expert += torch.stack([routing_map.sum(0) - visual, visual])
