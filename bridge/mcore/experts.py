"""Grouped experts of the `torch` back end, with the parameter names of Transformer Engine's grouped linears."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import divide
from torch import nn

from ..ops.experts import clamped_gate, grouped_linear
from .parameters import parameter_device


class GroupedLinear(nn.Module):
    """One linear layer per local expert: parameters ``weight{i} [out, in]`` and ``bias{i} [out]``.

    Has the signature of Transformer Engine's, so that Megatron-Bridge's LoRA can wrap it.

    Args:
        config: the TransformerConfig, for precision and initialisation.
        num_gemms: experts on this rank, by Transformer Engine's name.
        shape: ``(out, in)`` of this rank's shard.
        partition_dim: the axis of the weight that expert tensor parallelism shards; with 0 it shards the bias too.
        init_method: fills a weight in place.
        pg_collection: the groups of expert, expert tensor and expert data parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_gemms: int,
        shape: tuple[int, int],
        partition_dim: int,
        init_method: Callable[[torch.Tensor], object],
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__()
        self.config = config
        self.num_gemms = num_gemms
        self.partition_dim = partition_dim
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.expert_dp_group = pg_collection.expt_dp
        sizes = list(shape)
        sizes[partition_dim] *= self.tp_group.size()
        self.out_features, self.in_features = sizes
        """Sizes of the whole layer, not of this rank's shard."""
        for expert in range(num_gemms):
            made = {"dtype": config.params_dtype, "device": parameter_device(config)}
            weight, bias = nn.Parameter(torch.empty(shape, **made)), nn.Parameter(torch.zeros(shape[0], **made))
            set_tensor_model_parallel_attributes(weight, True, partition_dim, 1)
            set_tensor_model_parallel_attributes(bias, partition_dim == 0, 0, 1)
            self.register_parameter(f"weight{expert}", weight)
            self.register_parameter(f"bias{expert}", bias)
            if config.perform_initialization:
                with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                    init_method(weight)

    def forward(self, tokens: torch.Tensor, tokens_per_expert: Sequence[int]) -> tuple[torch.Tensor, None]:
        """Tokens ``[t, in]`` sorted by local expert and counts to ``[t, out]`` and None: the bias is added already."""
        pairs = [(weight, self._share(bias)) for weight, bias in self.pairs()]
        return grouped_linear(tokens, tokens_per_expert, pairs), None

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(weight, bias)`` of each local expert, in order."""
        return [(getattr(self, f"weight{i}"), getattr(self, f"bias{i}")) for i in range(self.num_gemms)]

    def _share(self, bias: torch.Tensor) -> torch.Tensor:
        """This rank's shard of a bias; where ranks sum their outputs, the bias divided by their number."""
        size = self.tp_group.size()
        if size == 1 or self.partition_dim == 0:
            return bias
        return copy_to_tensor_model_parallel_region(bias, group=self.tp_group) / size

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Entries ``{prefix}{weight,bias,_extra_state}`` with an axis for experts, gate and up as two chunks."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        entries = {}
        for expert in range(self.num_gemms):
            entries |= self._sharded_expert(expert, prefix, sharded_offsets, metadata)
        return entries

    def _sharded_expert(self, expert: int, prefix: str, sharded_offsets: tuple, metadata: dict) -> ShardedStateDict:
        singleton = metadata.get("singleton_local_shards", False)
        index = self.ep_group.rank() * self.num_gemms + expert
        count = self.ep_group.size() * self.num_gemms
        key = f"{index}.{prefix}" if singleton else prefix
        offsets = sharded_offsets if singleton else (*sharded_offsets, (len(sharded_offsets), index, count))
        weight, bias = self.pairs()[expert]
        split = {"weight": self.partition_dim} | ({"bias": 0} if self.partition_dim == 0 else {})
        tensors = make_sharded_tensors_for_checkpoint(
            {"weight": weight, "bias": bias, "_extra_state": None},  # as `ExtraState`, one per expert
            key,
            split,
            offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        entries = {}
        for kind, tensor in ((k.removeprefix(key), t) for k, t in tensors.items()):
            # Copies of an expert live on its expert data-parallel ranks; rank 0 of those writes.
            tensor.replica_id = (*tensor.replica_id[:2], self.expert_dp_group.rank())
            if self.partition_dim == 0 and kind != "_extra_state":
                tensor = apply_swiglu_sharded_factory(
                    tensor, offsets, singleton, tp_group=self.tp_group, dp_group=metadata["dp_cp_group"]
                )
            number = "" if kind == "_extra_state" and expert == 0 else expert  # as Transformer Engine counts
            entries[f"{prefix}{kind}{number}"] = tensor
        return entries

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(f"{prefix}_extra_state")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


class GroupedExperts(MegatronModule):
    """The experts of one MoE layer on one rank, in place of Megatron-Core's ``TEGroupedMLP``.

    Constructor, parameter names (``linear_fc1.weight0``, …) and checkpoint keys are the same.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        super().__init__(config=config)
        assert pg_collection is not None and config.add_bias_linear and config.gated_linear_unit
        ffn = divide(config.moe_ffn_hidden_size, pg_collection.expt_tp.size())
        linear = partial(GroupedLinear, config, num_local_experts, pg_collection=pg_collection)
        self.linear_fc1 = linear((2 * ffn, config.hidden_size), partition_dim=0, init_method=config.init_method)
        self.linear_fc2 = linear(
            (config.hidden_size, ffn), partition_dim=1, init_method=config.output_layer_init_method
        )

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Tokens ``[t, h]`` sorted by local expert, counts ``[E]``, routing weights ``[t]`` to ``[t, h]`` and None."""
        counts = tokens_per_expert.tolist()
        gate_up, _ = self.linear_fc1(permuted_local_hidden_states, counts)
        limit, offset = self.config.activation_func_clamp_value, self.config.glu_linear_offset
        output, _ = self.linear_fc2(clamped_gate(gate_up, limit=limit, offset=offset), counts)
        return output * permuted_probs.unsqueeze(-1).to(output.dtype), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Entries ``{prefix}experts.linear_fc{1,2}.…``: weights, biases, and LoRA adapters."""
        entries = {}
        for name, linear in self.named_children():
            part = linear.sharded_state_dict(f"{name}.", sharded_offsets, metadata)
            add_prefix_for_sharding(part, f"{prefix}experts.")
            entries |= {f"{prefix}{key}": entry for key, entry in part.items()}
        return entries
