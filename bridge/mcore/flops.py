"""Floating-point operations of the model per token and per image.

A product of ``[m, k]`` and ``[k, n]`` counts 2·m·k·n; a backward pass with weight gradients counts twice its forward.
Norms, activations, softmax and the embedding look-up, under 1 % together, are left out.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

from ..hf.configuration_gpt_oss_vision import image_shape, tower_config, tower_tokens
from .param_groups import trained_groups


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of a forward pass: in products with weights, and in attention."""

    weights: float
    attention: float

    @property
    def forward(self) -> float:
        """The forward pass alone."""
        return self.weights + self.attention

    def training(self, *, weight_gradients: bool = True) -> float:
        """Forward and backward pass; frozen weights (LoRA) have no gradients of their own, attention always does."""
        return (3 if weight_gradients else 2) * self.weights + 3 * self.attention


def decoder_flops(provider, tokens: float, squared: float | None = None) -> Flops:
    """The decoder with its head, on all tokens of some sequences, causal, with the window where a layer has one.

    Args:
        provider: the model; its parallel sizes don't matter.
        tokens: the sum of the lengths of the sequences.
        squared: the sum of their squares; None for sequences of ``seq_length``. For lengths that differ, windows are
            counted as in sequences of the length ``squared / tokens``, which is exact where they don't.
    """
    length = provider.seq_length if squared is None else squared / tokens
    heads = provider.num_attention_heads * provider.kv_channels
    windows = provider.window_attn_skip_freq or [provider.window_size is not None] * provider.num_layers
    keys = sum(_mean_visible_keys(length, provider.window_size[0] + 1 if windowed else None) for windowed in windows)
    products = provider.num_layers * _active_matrix_weights(provider) + provider.hidden_size * provider.vocab_size
    return Flops(weights=2.0 * products * tokens, attention=4.0 * heads * keys * tokens)


def _mean_visible_keys(length: float, window: int | None) -> float:
    """Keys that a query sees on average: all before it and itself, at most ``window``."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def _active_matrix_weights(provider) -> float:
    """Matrix weights of a layer that a token is multiplied with: of the experts, the chosen ones."""
    hidden, head = provider.hidden_size, provider.kv_channels
    attention = hidden * head * 2 * (provider.num_attention_heads + provider.num_query_groups)
    expert = 3 * hidden * provider.moe_ffn_hidden_size
    return attention + hidden * provider.num_moe_experts + provider.moe_router_topk * expert


def image_flops(provider) -> Flops:
    """One image through tower and projection."""
    vision = tower_config(provider.vision_config)
    width, layers, tokens = vision.hidden_size, vision.num_hidden_layers, tower_tokens(vision)
    blocks = tokens * layers * (4 * width**2 + 2 * width * vision.intermediate_size)
    ends = prod(image_shape(vision)) * width + provider.num_image_tokens * width * provider.hidden_size
    return Flops(weights=2.0 * (blocks + ends), attention=4.0 * layers * tokens**2 * width)


def image_training_flops(provider, peft: Any) -> float:
    """Operations of one image in a training step: without a backward pass where the tower is frozen.

    Args:
        provider: the model.
        peft: the adapters that are trained, None without.
    """
    flops = image_flops(provider)
    return flops.training() if "vision_model" in trained_groups(provider, peft) else flops.forward
