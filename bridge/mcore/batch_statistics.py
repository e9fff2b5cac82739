"""Counts of the microbatches that a model has trained on: images, losses, lengths of samples.

Shapes: b rows, s positions, cp ranks of context parallelism.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from .packing import sample_boundaries, samples_of

KINDS = ("without_image", "after_image")
"""A token is after an image if its sample has one before it, which attention can reach."""

MAX_SOURCES = 64
"""Sources of the data whose losses are counted apart."""


@dataclass
class BatchStatistics:
    """What one chunk of a model has counted since it was last read. Nothing is read from the device.

    Attributes:
        images: images that the vision stage has encoded, on this rank.
        losses: ``[2, 2]``: by `KINDS`, the weighted sum of the losses, and the sum of the weights.
        source_losses: ``[MAX_SOURCES, 2]``: by source, likewise; None where there is one source.
        squared_lengths: sum of the squared lengths of samples, without padding, on the stage that computes losses.
    """

    images: int = 0
    losses: torch.Tensor | None = None
    source_losses: torch.Tensor | None = None
    squared_lengths: torch.Tensor | None = None

    def add_losses(
        self,
        losses: torch.Tensor,
        mask: torch.Tensor,
        is_after_image: torch.Tensor,
        lengths: torch.Tensor,
        source_ids: torch.Tensor | None = None,
    ) -> None:
        """Add a microbatch; tensors are ``[b, s / cp]``, the mask has the weights of the losses.

        Args:
            lengths: ``[samples]`` int, of the whole samples.
        """
        if source_ids is not None:
            weighted = torch.stack([mask * losses.detach(), mask], dim=-1).flatten(0, 1).double()
            if self.source_losses is None:
                self.source_losses = weighted.new_zeros(MAX_SOURCES, 2)
            self.source_losses.index_add_(0, source_ids.flatten(), weighted)
        weights = torch.stack([mask * ~is_after_image, mask * is_after_image]).flatten(1).double()
        found = torch.stack([weights @ losses.detach().flatten().double(), weights.sum(1)], dim=1)
        self.losses = found if self.losses is None else self.losses + found
        squared = lengths.double().square().sum()
        self.squared_lengths = squared if self.squared_lengths is None else self.squared_lengths + squared

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
        before = (seen - is_visual.long())[:, sample_boundaries(packed)[:-1].long()]
        seen = seen - before[:, samples_of(packed, is_visual.shape[1])]
    return seen > 0


def sample_lengths(
    is_visual: torch.Tensor, packed: PackedSeqParams | None, is_padding: torch.Tensor | None
) -> torch.Tensor:
    """``[samples]`` int: the lengths of the samples of a microbatch, without padding.

    Args:
        is_visual: ``[b, s]``, for its shape.
        packed: boundaries of the samples where there are several in the row.
        is_padding: ``[b, s]`` bool, where known.
    """
    if packed is not None:
        return packed.cu_seqlens_q.diff()
    is_token = torch.ones_like(is_visual) if is_padding is None else ~is_padding.bool()
    return is_token.sum(1)


def pop_losses(model: list[torch.nn.Module], tensor_parallel: int) -> dict[str, float]:
    """The mean losses since the last call by `KINDS`, over all ranks; a kind without tokens is left out.

    Args:
        model: this rank's chunks.
        tensor_parallel: ranks that have the same losses.
    """
    means = _means(_popped(model, "losses", (len(KINDS), 2)) / tensor_parallel)
    return {f"loss_{KINDS[kind]}": loss for kind, loss in means.items()}


def pop_source_losses(model: list[torch.nn.Module], tensor_parallel: int) -> dict[int, float]:
    """The mean losses by the number of the source, as `pop_losses`."""
    return _means(_popped(model, "source_losses", (MAX_SOURCES, 2)) / tensor_parallel)


def pop_squared_lengths(model: list[torch.nn.Module], tensor_parallel: int) -> float:
    """The sum of the squared lengths of all samples since the last call, over all ranks; as `pop_losses`."""
    return float(_popped(model, "squared_lengths", ())) / tensor_parallel


def _popped(model: list[torch.nn.Module], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The sum over all ranks and chunks of one of the statistics, which begins again."""
    total = torch.zeros(shape, dtype=torch.float64, device=next(model[0].parameters()).device)
    for statistics in statistics_of(model):
        if (value := getattr(statistics, name)) is not None:
            total += value
            setattr(statistics, name, None)
    torch.distributed.all_reduce(total)
    return total


def _means(sums: torch.Tensor) -> dict[int, float]:
    """Of ``[n, 2]`` sums of losses and of weights, the quotients where there is a weight."""
    return {number: loss / weight for number, (loss, weight) in enumerate(sums.tolist()) if weight}


def statistics_of(model: list[torch.nn.Module]) -> list[BatchStatistics]:
    """The statistics of this rank's chunks."""
    modules = (module for chunk in model for module in chunk.modules())
    return [module.batch_statistics for module in modules if hasattr(module, "batch_statistics")]
