"""Counts of the microbatches that a model has trained on: images, and losses of text with and without images before.

Shapes: b rows, s positions, cp ranks of context parallelism.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from .packing import sample_boundaries

KINDS = ("without_image", "after_image")
"""A token is after an image if its sample has one before it, which attention can reach."""


@dataclass
class BatchStatistics:
    """What one chunk of a model has counted since it was last read. Nothing is read from the device.

    Attributes:
        images: images that the vision stage has encoded, on this rank.
        losses: ``[2, 2]``: by `KINDS`, the sum of the losses and the number of the tokens that are learned.
    """

    images: int = 0
    losses: torch.Tensor | None = None

    def add_losses(self, losses: torch.Tensor, mask: torch.Tensor, is_after_image: torch.Tensor) -> None:
        """Add a microbatch; all arguments are ``[b, s / cp]``, the mask 1 where a token is learned."""
        weights = torch.stack([mask * ~is_after_image, mask * is_after_image]).flatten(1).double()
        found = torch.stack([weights @ losses.detach().flatten().double(), weights.sum(1)], dim=1)
        self.losses = found if self.losses is None else self.losses + found

    def pop_images(self) -> int:
        """Return the number of images, and begin again at 0."""
        images, self.images = self.images, 0
        return images


def after_image(is_visual: torch.Tensor, packed: PackedSeqParams | None) -> torch.Tensor:
    """``[b, s]`` bool, of a visual mask: true at and after the first image token of a sample.

    Args:
        is_visual: ``[b, s]`` bool.
        packed: boundaries of the samples where there are several in the row.
    """
    seen = is_visual.cumsum(1)
    if packed is not None:
        starts = sample_boundaries(packed)[:-1]
        sample = torch.bucketize(torch.arange(is_visual.shape[1], device=starts.device), starts, right=True) - 1
        seen = seen - (seen - is_visual.long())[:, starts.long()][:, sample]
    return seen > 0


def pop_losses(model: list[torch.nn.Module], tensor_parallel: int) -> dict[str, float]:
    """The mean losses since the last call by `KINDS`, over all ranks; a kind without tokens is left out.

    Args:
        model: this rank's chunks.
        tensor_parallel: ranks that have the same losses.
    """
    device = next(model[0].parameters()).device
    total = torch.zeros(len(KINDS), 2, dtype=torch.float64, device=device)
    for statistics in statistics_of(model):
        if statistics.losses is not None:
            total += statistics.losses
            statistics.losses = None
    torch.distributed.all_reduce(total)
    sums, counts = (total / tensor_parallel).unbind(1)
    means = zip(KINDS, sums.tolist(), counts.tolist(), strict=True)
    return {f"loss_{kind}": loss / tokens for kind, loss, tokens in means if tokens}


def statistics_of(model: list[torch.nn.Module]) -> list[BatchStatistics]:
    """The statistics of this rank's chunks."""
    modules = (module for chunk in model for module in chunk.modules())
    return [module.batch_statistics for module in modules if hasattr(module, "batch_statistics")]
