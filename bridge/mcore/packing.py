"""Packed sequences: several samples in one row, Megatron's ``thd`` format."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ...errors import UserError
from .. import cudnn
from .backend import ENGINE, cudnn_problem


def sample_boundaries(packed: PackedSeqParams) -> torch.Tensor:
    """Starts of the samples in the row, and its end, ``[samples + 1]``; padding belongs to the sample before it."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded


def samples_of(packed: PackedSeqParams, length: int) -> torch.Tensor:
    """Which sample each position of the row is in, ``[t]``, from 0; that of padding is the sample before it."""
    starts = sample_boundaries(packed)[:-1]
    return torch.bucketize(torch.arange(length, device=starts.device), starts, right=True) - 1


def padding_of(packed: PackedSeqParams, length: int) -> torch.Tensor:
    """``[1, t]`` bool, true at the positions behind the end of a sample."""
    ends = sample_boundaries(packed)[:-1] + packed.cu_seqlens_q.diff()
    return (torch.arange(length, device=ends.device) >= ends[samples_of(packed, length)]).unsqueeze(0)


def check_packing(input_ids: torch.Tensor, packed: PackedSeqParams, context_parallel: int, backend: str) -> None:
    """Refuse packed samples that would not be exact; reads nothing from the device.

    Args:
        input_ids: ``[1, t]``.
        packed: Megatron's description of the row.
        context_parallel: ranks that share the row.
        backend: ``transformer_impl`` of the config.

    Raises:
        UserError: for more than one row, context parallelism, or a cuDNN that would drop the sinks.
    """
    if packed.qkv_format != "thd" or len(input_ids) != 1:
        raise UserError(
            f"Packed samples come as one row in the format 'thd'; got {len(input_ids)} rows, {packed.qkv_format!r}."
        )
    if context_parallel > 1:
        raise UserError(
            f"Packed samples do not support context_parallel_size={context_parallel}; use 1, or don't pack."
        )
    if backend == ENGINE and (problem := cudnn_problem(cudnn.WITH_PACKED_SINKS, "learnable sinks of packed samples")):
        raise UserError(f"Packed samples cannot run on Transformer Engine: {problem}, or set backend='torch'.")
