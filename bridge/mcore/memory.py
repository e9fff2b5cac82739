"""Memory of a training step per rank: exact for parameters, gradients and optimizer state, about for activations."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..hf.configuration_gpt_oss_vision import build_tower, tower_config
from .activations import activations_of_stage, layers_of_chunks
from .param_groups import trained_groups

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
    layers = sum(layers_of_chunks(provider, stage))
    is_first, is_last = stage == 0, stage == provider.pipeline_model_parallel_size - 1
    yield ParameterCount("language_model", False, layers * _dense_parameters_of_layer(provider))
    yield ParameterCount("language_model", True, layers * _expert_parameters_of_layer(provider))
    yield ParameterCount("vision_bias", False, layers * provider.num_moe_experts)
    # The embedding, the head; with shared weights a head on another stage than the embedding is a copy of it.
    vocabularies = [is_first, is_last and not (is_first and provider.share_embeddings_and_output_weights)].count(True)
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
        yield ParameterCount("adapter", is_expert, sum(layers_of_chunks(provider, stage)) * peft.dim * values)


def memory_of_stage(
    provider,
    stage: int,
    *,
    world_size: int,
    micro_batch_size: int,
    microbatches: int,
    images: int | None = None,
    ddp: Any = None,
    optimizer: Any = None,
    peft: Any = None,
) -> MemoryEstimate:
    """Bytes on a rank of a pipeline stage in training.

    Weights are of ``params_dtype``. The distributed optimizer shards its states over the ranks that share a parameter.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``; the first holds the most microbatches at once.
        world_size: ranks in all.
        micro_batch_size: rows of a microbatch.
        microbatches: of a step on a data-parallel rank.
        images: of a microbatch; None for rows full of images.
        ddp: Megatron's ``DistributedDataParallelConfig``; None for fp32 gradients and the distributed optimizer.
        optimizer: Megatron's ``OptimizerConfig``; None for Adam.
        peft: whose adapters are trained in place of weights, beside the groups of its ``full_weights`` if it is a
            `GPTOSSVisionLoRA`; None without adapters.
    """
    width = provider.params_dtype.itemsize
    pp, tp = provider.pipeline_model_parallel_size, provider.tensor_model_parallel_size
    expert_ranks = provider.expert_model_parallel_size * (provider.expert_tensor_parallel_size or 1)
    trained = trained_groups(provider, peft)
    is_distributed = ddp is None or ddp.use_distributed_optimizer
    gradient = 4 if ddp is None or ddp.grad_reduce_in_fp32 else width
    adapters = adapters_of_stage(provider, stage, peft) if peft else ()
    parameters = gradients = states = 0.0
    for part in (*parameters_of_stage(provider, stage), *adapters):
        parameters += part.count * width
        if part.group in trained:
            ranks = world_size // pp // (expert_ranks if part.is_expert else tp)
            gradients += part.count * gradient
            states += part.count * bytes_of_states(optimizer, width) / (ranks if is_distributed else 1)
    sizes = {"micro_batch_size": micro_batch_size, "microbatches": microbatches, "images": images}
    activations = activations_of_stage(provider, stage, **sizes, trained=trained)
    return MemoryEstimate(parameters, gradients, states, activations)


def bytes_of_states(optimizer: Any, width: int) -> float:
    """Bytes of the optimizer on the GPU for a parameter: moments, and a main copy of half-precision weights.

    Args:
        optimizer: Megatron's ``OptimizerConfig``; None for Adam with all states in fp32.
        width: bytes of a weight.
    """
    main = 4 if width < 4 else 0
    if optimizer is None:
        return main + 8
    if optimizer.optimizer != "adam":
        moments = 4 if optimizer.optimizer == "lion" or optimizer.sgd_momentum else 0
    elif optimizer.use_precision_aware_optimizer and not optimizer.optimizer_cpu_offload:
        moments = optimizer.exp_avg_dtype.itemsize + optimizer.exp_avg_sq_dtype.itemsize
        if main:  # of an fp32 copy the half that the bf16 weight does not have
            is_halved = optimizer.store_param_remainders and optimizer.main_params_dtype == torch.float32
            main = 2 if is_halved else optimizer.main_params_dtype.itemsize
    else:
        moments = 8
    if not optimizer.optimizer_cpu_offload:
        return main + moments
    on_gpu = 1 - optimizer.optimizer_offload_fraction
    # Without the precision-aware optimizer the main copies stay on the GPU, and have copies on the CPU.
    return on_gpu * (main + moments) if optimizer.use_precision_aware_optimizer else main + on_gpu * moments


def memory_per_rank(provider, **sizes) -> MemoryEstimate:
    """The estimate for the rank with the largest total; arguments as of `memory_of_stage`, without the stage."""
    stages = range(provider.pipeline_model_parallel_size)
    return max((memory_of_stage(provider, stage, **sizes) for stage in stages), key=lambda memory: memory.total)
