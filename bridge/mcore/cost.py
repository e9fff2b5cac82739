"""What a model costs before it runs: floating-point operations per token and image, bytes per rank.

A product of ``[m, k]`` and ``[k, n]`` counts 2·m·k·n; a backward pass with weight gradients counts twice its forward.
Norms, activations, softmax and the embedding look-up, under 1 % together, are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from .vision import build_tower

GIB = 2**30


# --- operations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations of a forward pass: in products with weights, and in attention."""

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        """Of a forward pass."""
        return self.weights + self.attention

    def training(self, *, weight_gradients: bool = True) -> float:
        """Of forward and backward; frozen weights (LoRA) have no gradients of their own, attention always does."""
        return (3 if weight_gradients else 2) * self.weights + 3 * self.attention


def text_operations(provider, tokens: float, squared: float | None = None) -> Operations:
    """The decoder with its head, on all tokens of some sequences, causal and with the window where there is one.

    Args:
        provider: the model; its parallel sizes don't matter.
        tokens: the sum of the lengths of the sequences.
        squared: the sum of their squares; None for sequences of ``seq_length``. For lengths that differ, windows are
            counted as in sequences of the length ``squared / tokens``, which is exact where they don't.
    """
    length = provider.seq_length if squared is None else squared / tokens
    heads = provider.num_attention_heads * provider.kv_channels
    windows = provider.window_attn_skip_freq or [provider.window_size is not None] * provider.num_layers
    seen = sum(_keys_seen(length, provider.window_size[0] + 1 if windowed else None) for windowed in windows)
    products = provider.num_layers * _matrix_weights_of_layer(provider) + provider.hidden_size * provider.vocab_size
    return Operations(weights=2.0 * products * tokens, attention=4.0 * heads * seen * tokens)


def _keys_seen(length: float, window: int | None) -> float:
    """By a query on average: all before it and itself, at most ``window``."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def _matrix_weights_of_layer(provider) -> float:
    """That a token meets: of the experts, those that it is sent to."""
    hidden, head = provider.hidden_size, provider.kv_channels
    attention = hidden * head * 2 * (provider.num_attention_heads + provider.num_query_groups)
    expert = 3 * hidden * provider.moe_ffn_hidden_size
    return attention + hidden * provider.num_moe_experts + provider.moe_router_topk * expert


def image_operations(provider) -> Operations:
    """One image through tower and projection."""
    vision = provider.vision_config
    width, layers, channels = vision["hidden_size"], vision["num_hidden_layers"], vision["num_channels"]
    tokens = provider.num_image_tokens - provider.vision_pool_token
    patches = tokens - (vision["model_type"] != "siglip_vision_model")  # the others put a CLS token in front
    blocks = tokens * layers * (4 * width**2 + 2 * width * vision["intermediate_size"])
    ends = patches * width * channels * vision["patch_size"] ** 2
    ends += provider.num_image_tokens * width * provider.hidden_size
    return Operations(weights=2.0 * (blocks + ends), attention=4.0 * layers * tokens**2 * width)


# --- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """Parameters of one kind on a rank."""

    group: str
    is_expert: bool
    count: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.2f}" for field in fields(self))
        return f"{self.total / GIB:.2f} GiB ({parts})"


def parameters_of_stage(provider, stage: int) -> Iterator[Part]:
    """The parameters of a rank of a pipeline stage, exactly.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``.
    """
    hidden, tp = provider.hidden_size, provider.tensor_model_parallel_size
    layers = _layers_of_stage(provider, stage)
    yield Part("language_model", False, layers * _dense_parameters_of_layer(provider))
    yield Part("language_model", True, layers * _expert_parameters_of_layer(provider))
    yield Part("vision_bias", False, layers * provider.num_moe_experts)
    ends = (stage == 0) + (stage == provider.pipeline_model_parallel_size - 1)
    yield Part("language_model", False, ends * hidden * provider.vocab_size // tp)
    if stage == provider.pipeline_model_parallel_size - 1:
        yield Part("language_model", False, hidden)
    if stage == 0 and provider.use_vision:
        with torch.device("meta"):
            tower = build_tower(provider.vision_config)
        width = provider.vision_config["hidden_size"]
        yield Part("vision_model", False, sum(parameter.numel() for parameter in tower.parameters()))
        yield Part("vision_projection", False, (2 + provider.vision_pool_token) * width + (width + 1) * hidden)


def _layers_of_stage(provider, stage: int) -> int:
    if provider.pipeline_model_parallel_layout is not None:
        # Megatron-Core 0.19.2 counts those of the calling rank, whatever stage it is asked about.
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


def memory_of_stage(
    provider,
    stage: int,
    *,
    world_size: int,
    micro_batch_size: int,
    microbatches: int,
    is_distributed: bool = True,
    is_adapted: bool = False,
) -> Memory:
    """Bytes on a rank of a pipeline stage in training with Adam.

    Weights are of ``params_dtype``, gradients and Adam's two moments of fp32, with an fp32 copy of half-precision
    weights; the distributed optimizer cuts the last three among the ranks that share a parameter.

    Args:
        provider: the model at its layout, finalized.
        stage: of ``pipeline_model_parallel_size``; the first holds the most microbatches at once.
        world_size: ranks in all.
        micro_batch_size: rows of a microbatch.
        microbatches: of a step on a data-parallel rank.
        is_distributed: whether the optimizer is.
        is_adapted: whether only adapters (LoRA) are trained; they themselves, about 1 %, are left out.
    """
    width = provider.params_dtype.itemsize
    pp, tp = provider.pipeline_model_parallel_size, provider.tensor_model_parallel_size
    expert_ranks = provider.expert_model_parallel_size * (provider.expert_tensor_parallel_size or 1)
    parameters = gradients = optimizer = 0.0
    for part in parameters_of_stage(provider, stage):
        parameters += part.count * width
        if part.group not in provider.frozen_groups and not is_adapted:
            ranks = world_size // pp // (expert_ranks if part.is_expert else tp)
            gradients += part.count * 4
            optimizer += part.count * (8 + (4 if width < 4 else 0)) / (ranks if is_distributed else 1)
    tokens = micro_batch_size * provider.seq_length / (tp * provider.context_parallel_size)
    held = min(pp - stage, microbatches)
    return Memory(parameters, gradients, optimizer, tokens * width * held * _activations_of_stage(provider, stage))


def _activations_of_stage(provider, stage: int) -> float:
    """Numbers that a token leaves behind for the backward pass, without what a fused kernel computes again: about."""
    hidden, head, chosen = provider.hidden_size, provider.kv_channels, provider.moe_router_topk
    layers = _layers_of_stage(provider, stage)
    # Inputs of two norms, of qkv, of the router; q, k, v and the context; per chosen expert its input, its gate and up,
    # their product, and its output, which the gradient of the routing weight wants.
    attention = (2 * provider.num_attention_heads + 2 * provider.num_query_groups) * head
    layer = 4 * hidden + attention + chosen * (2 * hidden + 3 * provider.moe_ffn_hidden_size)
    if provider.recompute_granularity == "full":
        layer = hidden + layer / max(layers, 1)  # the input of each, and the one that is being computed again
    is_last = stage == provider.pipeline_model_parallel_size - 1
    # Logits, and their fp32 copy in the loss.
    return layers * layer + (provider.vocab_size * (1 + 4 / provider.params_dtype.itemsize) if is_last else 0)


def memory_per_rank(provider, **sizes) -> Memory:
    """Of the rank that needs most; arguments as of `memory_of_stage`, without the stage."""
    stages = range(provider.pipeline_model_parallel_size)
    return max((memory_of_stage(provider, stage, **sizes) for stage in stages), key=lambda memory: memory.total)
