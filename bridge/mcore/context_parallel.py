"""Context parallelism by all-to-all over heads, the only kind that is exact with learnable sinks.

Megatron shards a sequence into 2·cp equal pieces, rank r holding pieces r and 2·cp − 1 − r, which balances causal
attention. Here attention runs on whole sequences with a share of the heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Shapes: s positions of the whole sequence, b rows, h heads on this tensor-parallel rank, d head size, cp ranks.
"""

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch.distributed import ProcessGroup

from ...errors import UserError


def slice_for_context_parallel(tensor: torch.Tensor, dim: int, group: ProcessGroup) -> torch.Tensor:
    """This rank's two pieces of a tensor with the whole sequence along ``dim``, as a copy.

    Raises:
        UserError: when the sequence length is no multiple of ``2 · cp``.
    """
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return tensor
    if tensor.shape[dim] % (2 * ranks):
        raise UserError(
            f"context_parallel_size={ranks} needs a multiple of {2 * ranks} tokens a sequence, got {tensor.shape[dim]}."
        )
    pieces = tensor.chunk(2 * ranks, dim=dim)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]], dim=dim)


def sequence_to_heads(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """``[s / cp, b, h, d]``, this rank's pieces of all heads, to ``[s, b, h / cp, d]``, the sequence in order."""
    ranks = group.size()
    if ranks == 1:
        return tensor
    by_rank = tensor.unflatten(2, (ranks, -1)).movedim(2, 0).contiguous()
    pieces = all_to_all(group, by_rank).unflatten(1, (2, -1))  # [cp, 2, s / 2cp, b, h / cp, d]
    return torch.cat([pieces[:, 0], pieces[:, 1].flip(0)]).flatten(0, 1)


def heads_to_sequence(tensor: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """The inverse: ``[s, b, h / cp, d]`` to ``[s / cp, b, h, d]``."""
    ranks = group.size()
    if ranks == 1:
        return tensor
    pieces = tensor.unflatten(0, (2 * ranks, -1))
    by_rank = torch.stack([pieces[:ranks], pieces[ranks:].flip(0)], dim=1).flatten(1, 2).contiguous()
    return all_to_all(group, by_rank).movedim(0, 2).flatten(2, 3)
