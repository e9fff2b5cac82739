"""Tokens per expert and modality: the routers' counts, summed over all ranks and written to TensorBoard."""

import torch

from .router import VisionBiasedTopKRouter

MODALITIES = ("text", "visual")


def pop_expert_counts(model: list[torch.nn.Module], num_layers: int, num_experts: int) -> torch.Tensor:
    """Return the counts of all ranks since the last call, ``[layers, 2, experts]``, text before visual, and reset them.

    Layers are disjoint across pipeline ranks and tokens across all others (with tensor parallelism the sequence is
    sharded too), so one world all-reduce counts each choice once.

    Args:
        model: this rank's chunks.
        num_layers: layers of the whole model.
        num_experts: experts of a layer.
    """
    routers = [module for chunk in model for module in chunk.modules() if isinstance(module, VisionBiasedTopKRouter)]
    # A pipeline stage may have the embedding or the head only.
    device = next(model[0].parameters()).device
    counts = torch.zeros(num_layers, len(MODALITIES), num_experts, dtype=torch.int64, device=device)
    for router in routers:
        counts[router.layer_number - 1] = router.tokens_per_expert
        router.tokens_per_expert.zero_()
    torch.distributed.all_reduce(counts)
    return counts


def entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy of the shares along the last axis in nats: 0 for one expert, ln E for equal shares, NaN for none."""
    return torch.special.entr(_shares(counts)).sum(-1)


def overlap(counts: torch.Tensor) -> torch.Tensor:
    """Overlap of the modalities' shares, ``[…, 2, E]`` to ``[…]``: 0 without a common expert, 1 for equal shares."""
    return _shares(counts).amin(-2).sum(-1)


def _shares(counts: torch.Tensor) -> torch.Tensor:
    return counts / counts.sum(-1, keepdim=True)


def write_router_statistics(writer, counts: torch.Tensor, step: int) -> None:
    """Write ``[layers, 2, experts]`` counts to TensorBoard; a modality without tokens is left out.

    Written are the counts as a tensor, entropy and overlap per layer as scalars, and the shares of each modality as an
    image with a row per layer.
    """
    writer.add_tensor("router/tokens_per_expert", counts, step)
    seen = counts.sum((0, 2)) > 0
    for index, modality in enumerate(MODALITIES):
        if seen[index]:
            shares = _shares(counts[:, index])
            writer.add_image(f"router/{modality}", shares / shares.max(), step, dataformats="HW")
            for layer, value in enumerate(entropy(counts[:, index]).tolist()):
                writer.add_scalar(f"router/{modality}_entropy/layer_{layer}", value, step)
    if seen.all():
        for layer, value in enumerate(overlap(counts).tolist()):
            writer.add_scalar(f"router/overlap/layer_{layer}", value, step)
