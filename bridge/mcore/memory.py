"""Memory of a training step per rank: exact for parameters, gradients and optimizer state, about for activations."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from ..hf.configuration_gpt_oss_vision import build_tower, tower_config
from .backend import ENGINE

GIB = 2**30


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Number of parameters of one kind on a rank."""

    group: str
    is_expert: bool
    count: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """The sum of the four."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.2f}" for field in fields(self))
        return f"{self.total / GIB:.2f} GiB ({parts})"


def parameters_of_stage(provider, stage: int) -> Iterator[ParameterCount]:
    """The parameters of a rank of a pipeline stage, exactly.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``.
    """
    hidden, tp = provider.hidden_size, provider.tensor_model_parallel_size
    layers = _layers_of_stage(provider, stage)
    is_first, is_last = stage == 0, stage == provider.pipeline_model_parallel_size - 1
    yield ParameterCount("language_model", False, layers * _dense_parameters_of_layer(provider))
    yield ParameterCount("language_model", True, layers * _expert_parameters_of_layer(provider))
    yield ParameterCount("vision_bias", False, layers * provider.num_moe_experts)
    vocabularies = [is_first, is_last].count(True)  # the embedding, the head
    yield ParameterCount("language_model", False, vocabularies * hidden * provider.vocab_size // tp)
    if is_last:
        yield ParameterCount("language_model", False, hidden)
    if is_first and provider.use_vision:
        with torch.device("meta"):
            tower = build_tower(tower_config(provider.vision_config))
        width = provider.vision_config["hidden_size"]
        vectors = 3 if provider.vision_pool_token else 2  # the norm's weight and bias, the pool token
        yield ParameterCount("vision_model", False, sum(parameter.numel() for parameter in tower.parameters()))
        yield ParameterCount("vision_projection", False, vectors * width + (width + 1) * hidden)


def _layers_of_stage(provider, stage: int) -> int:
    if provider.pipeline_model_parallel_layout is not None:
        # Megatron-Core 0.19.2 ignores the stage here and counts the layers of the calling rank.
        chunks = provider.pipeline_model_parallel_layout.layout[stage]
        return sum(chunk.count(LayerType.decoder) for chunk in chunks)
    chunks = range(provider.virtual_pipeline_model_parallel_size or 1)
    interleaved = provider.virtual_pipeline_model_parallel_size is not None
    return sum(get_num_layers_to_build(provider, chunk if interleaved else None, stage) for chunk in chunks)


def _dense_parameters_of_layer(provider) -> int:
    hidden, heads, tp = provider.hidden_size, provider.num_attention_heads, provider.tensor_model_parallel_size
    query, groups = heads * provider.kv_channels, provider.num_query_groups * provider.kv_channels
    attention = ((query + 2 * groups) * (hidden + 1) + query * hidden + heads) // tp + hidden
    return attention + 2 * hidden + provider.num_moe_experts * (hidden + 1)


def _expert_parameters_of_layer(provider) -> int:
    hidden, ffn = provider.hidden_size, provider.moe_ffn_hidden_size // (provider.expert_tensor_parallel_size or 1)
    expert = 2 * ffn * (hidden + 1) + (ffn + 1) * hidden
    return provider.num_moe_experts // provider.expert_model_parallel_size * expert


def adapters_of_stage(provider, stage: int, peft: Any) -> Iterator[ParameterCount]:
    """The parameters of LoRA's adapters on a rank of a pipeline stage: two matrices, of rank ``dim``, per product.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``.
        peft: Megatron-Bridge's ``LoRA``.
    """
    hidden, tp = provider.hidden_size, provider.tensor_model_parallel_size
    query, groups = (n * provider.kv_channels for n in (provider.num_attention_heads, provider.num_query_groups))
    ffn = provider.moe_ffn_hidden_size  # experts with adapters are not split by tensor parallelism
    each = (
        1
        if getattr(peft, "share_expert_adapters", True)
        else provider.num_moe_experts // provider.expert_model_parallel_size
    )
    ends = {
        "linear_qkv": (False, (hidden + query + 2 * groups) // tp),
        "linear_proj": (False, (query + hidden) // tp),
        "linear_fc1": (True, each * (hidden + 2 * ffn)),
        "linear_fc2": (True, each * (ffn + hidden)),
    }
    adapted = {target.rpartition(".")[2] for target in peft.target_modules}
    for name in sorted(adapted & ends.keys()):
        is_expert, values = ends[name]
        yield ParameterCount("adapter", is_expert, _layers_of_stage(provider, stage) * peft.dim * values)


def memory_of_stage(
    provider,
    stage: int,
    *,
    world_size: int,
    micro_batch_size: int,
    microbatches: int,
    is_distributed: bool = True,
    peft: Any = None,
) -> MemoryEstimate:
    """Bytes on a rank of a pipeline stage in training with Adam.

    Weights are of ``params_dtype``, gradients and Adam's two moments of fp32, with an fp32 copy of half-precision
    weights; the distributed optimizer shards moments and copy over the ranks that share a parameter.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``; the first holds the most microbatches at once.
        world_size: ranks in all.
        micro_batch_size: rows of a microbatch.
        microbatches: of a step on a data-parallel rank.
        is_distributed: whether the optimizer is.
        peft: whose adapters are trained in place of weights, beside the groups of its ``full_weights`` if it is a
            `GPTOSSVisionLoRA`; None without adapters.
    """
    width = provider.params_dtype.itemsize
    pp, tp = provider.pipeline_model_parallel_size, provider.tensor_model_parallel_size
    expert_ranks = provider.expert_model_parallel_size * (provider.expert_tensor_parallel_size or 1)
    groups = getattr(peft, "full_weights", ())
    trained = {"adapter", *groups} if peft else {part.group for part in parameters_of_stage(provider, stage)}
    adapters = adapters_of_stage(provider, stage, peft) if peft else ()
    parameters = gradients = optimizer = 0.0
    for part in (*parameters_of_stage(provider, stage), *adapters):
        parameters += part.count * width
        if part.group in trained - {*provider.frozen_groups}:
            ranks = world_size // pp // (expert_ranks if part.is_expert else tp)
            gradients += part.count * 4
            optimizer += part.count * (8 + (4 if width < 4 else 0)) / (ranks if is_distributed else 1)
    tokens = micro_batch_size * provider.seq_length / (tp * provider.context_parallel_size)
    learns = peft is not None or not provider.freeze_language_model
    activations = tokens * width * _activations_per_token(provider, stage, microbatches, learns)
    return MemoryEstimate(parameters, gradients, optimizer, activations)


def _activations_per_token(provider, stage: int, microbatches: int, learns: bool) -> float:
    """Values of ``params_dtype`` that a rank holds for the backward pass per token of a microbatch, approximately.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``.
        microbatches: of a step on a data-parallel rank.
        learns: whether the decoder's weights, or adapters on them, are trained. The input of a product with a frozen
            weight is not kept.
    """
    hidden, head, ffn = provider.hidden_size, provider.kv_channels, provider.moe_ffn_hidden_size
    layers = _layers_of_stage(provider, stage)
    # q, k, v and the context.
    attention = (2 * provider.num_attention_heads + 2 * provider.num_query_groups) * head
    if provider.transformer_impl == ENGINE:
        norm = hidden
        # Input, gate and up, both again clamped, their product, which includes the routing weight.
        expert = learns * hidden + 5 * ffn
    else:
        # In fp32: the input and, to train the weight, the input divided by its root mean square.
        norm = (1 + learns) * hidden * 4 / provider.params_dtype.itemsize
        # Gate and up, four factors and products of them, and the output, which the routing weight multiplies; to train
        # the weights, the input before and after sorting, and the product.
        expert = hidden + 6 * ffn + learns * (2 * hidden + ffn)
    # Two norms, the inputs of qkv and of the router, and the chosen experts.
    layer = 2 * norm + learns * 2 * hidden + attention + provider.moe_router_topk * expert
    if provider.recompute_granularity == "full":
        layer = hidden + layer / max(layers, 1)  # the input of each, and all of the one that is being recomputed
    chunks = provider.virtual_pipeline_model_parallel_size or 1
    held = chunks_in_flight(provider, stage, microbatches) * layers / chunks * layer
    if stage == provider.pipeline_model_parallel_size - 1:
        # The logits of one microbatch, and their fp32 copy in the loss; Megatron-Core's fused loss makes a second one.
        copies = 2 if provider.cross_entropy_loss_fusion else 1
        held += provider.vocab_size * (1 + copies * 4 / provider.params_dtype.itemsize)
    return held


def chunks_in_flight(provider, stage: int, microbatches: int) -> int:
    """Forward passes of model chunks whose backward pass is outstanding, at most, on a rank of a pipeline stage.

    One more than the warm-up of Megatron-Core's 1F1B schedules (``get_pp_rank_microbatches``): with and without
    interleaving, where a chunk is the whole stage.
    """
    pp, vpp = provider.pipeline_model_parallel_size, provider.virtual_pipeline_model_parallel_size
    if vpp is None:
        return min(pp - stage, microbatches)
    group = provider.microbatch_group_size_per_vp_stage or pp
    return min(2 * (pp - stage - 1) + (vpp - 1) * group + 1, microbatches * vpp)


def memory_per_rank(provider, **sizes) -> MemoryEstimate:
    """The estimate for the rank with the largest total; arguments as of `memory_of_stage`, without the stage."""
    stages = range(provider.pipeline_model_parallel_size)
    return max((memory_of_stage(provider, stage, **sizes) for stage in stages), key=lambda memory: memory.total)
