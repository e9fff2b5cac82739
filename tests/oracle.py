"""
A second implementation of GPT-OSS-Vision: plain functions in fp64, written from the description of the model alone.

It shares no code with the package, and is slow and short on purpose. Shapes: b rows, s positions, h hidden,
n query heads, g key-value heads, d head size, e experts, t = b * s tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm

Weights = dict[str, Tensor]
Config = dict[str, Any]


def forward(state_dict: Weights, config: Config, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
    """
    Logits `(b, s, vocab)` in fp64.

    `state_dict` has the names of a saved checkpoint; `config` is its `config.json`, or `config.to_dict()`;
    `pixel_values (images, channels, height, width)` go to the placeholders of `input_ids (b, s)` in order.
    """
    weights = {name: tensor.double() for name, tensor in state_dict.items()}
    is_visual = (input_ids == config["image_token_id"]) & config["use_vision"]
    x = weights["model.embed_tokens.weight"][input_ids]
    if pixel_values is not None:
        x[is_visual] = image_tokens(under(weights, "model.vision_adapter."), config, pixel_values.double())
    cos, sin = rotation(config, input_ids.shape[1])
    for index in range(config["num_hidden_layers"]):
        layer = under(weights, f"model.layers.{index}.")
        without_rotation = config["use_nope"] and (index + 1) % config["nope_stride"] == 0
        angles = (torch.ones_like(cos), torch.zeros_like(sin)) if without_rotation else (cos, sin)
        window = config["sliding_window"] if config["layer_types"][index] == "sliding_attention" else None
        normed = rms_norm(x, layer["input_layernorm.weight"], config["rms_norm_eps"])
        x = x + attention(under(layer, "self_attn."), config, normed, angles, window)
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], config["rms_norm_eps"])
        x = x + experts(under(layer, "mlp."), config, normed, is_visual)
    return rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"]) @ weights["lm_head.weight"].T


def under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotation(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin `(s, d / 2)`, both multiplied by YaRN's attention factor."""
    rope = config.get("rope_parameters") or {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    dim, theta = config["head_dim"], rope["rope_theta"]
    half = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * half / dim)
    concentration = 1.0
    if rope["rope_type"] == "yarn":
        original, factor = rope["original_max_position_embeddings"], rope["factor"]

        def dimension_that_turns(times: float) -> float:
            return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension_that_turns(rope["beta_fast"]), dimension_that_turns(rope["beta_slow"])
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        interpolated = ((half - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (1 - interpolated) + frequency / factor * interpolated
        concentration = 0.1 * math.log(factor) + 1
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos() * concentration, angle.sin() * concentration


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x (b, n, s, d)`; the first half of d is paired with the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(weights: Weights, config: Config, x: Tensor, angles: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    b, s, _ = x.shape
    d, n = config["head_dim"], config["num_attention_heads"]
    q, k, v = (linear(weights, f"{name}_proj", x).view(b, s, -1, d).transpose(1, 2) for name in "qkv")
    q, k = rotate(q, *angles), rotate(k, *angles)
    k, v = (tensor.repeat_interleave(n // config["num_key_value_heads"], dim=1) for tensor in (k, v))
    distance = torch.arange(s)[:, None] - torch.arange(s)
    visible = (distance >= 0) & (distance < (window or s))
    scores = (q @ k.transpose(2, 3) / math.sqrt(d)).masked_fill(~visible, -math.inf)
    sink = weights["sinks"].view(1, n, 1, 1)
    highest = scores.amax(-1, keepdim=True).maximum(sink)
    exp = (scores - highest).exp()
    probabilities = exp / ((sink - highest).exp() + exp.sum(-1, keepdim=True))
    return linear(weights, "o_proj", (probabilities @ v).transpose(1, 2).reshape(b, s, n * d))


def experts(weights: Weights, config: Config, x: Tensor, is_visual: Tensor) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    logits = linear(weights, "router", tokens)
    logits = logits + is_visual.reshape(-1, 1) * weights["router.vision_bias"]
    top, chosen = logits.topk(config["num_experts_per_tok"])
    share = torch.zeros_like(logits).scatter(1, chosen, top.softmax(-1))  # (t, e)
    out, limit = torch.zeros_like(tokens), config["swiglu_limit"]
    for expert in range(config["num_local_experts"]):
        gate_up = tokens @ weights["experts.gate_up_proj"][expert] + weights["experts.gate_up_proj_bias"][expert]
        gate, up = gate_up[:, 0::2].clamp(max=limit), gate_up[:, 1::2].clamp(-limit, limit)
        inner = (up + 1) * gate * (1.702 * gate).sigmoid()
        y = inner @ weights["experts.down_proj"][expert] + weights["experts.down_proj_bias"][expert]
        out += share[:, expert, None] * y
    return out.view(x.shape)


def image_tokens(weights: Weights, config: Config, pixel_values: Tensor) -> Tensor:
    """All tokens of all images, `(images * tokens, h)`: pool, CLS, patches row by row."""
    tower = TOWERS[config["vision_config"]["model_type"]]
    x = tower(under(weights, "vit."), config["vision_config"], pixel_values)
    if config["vision_pool_token"]:
        x = torch.cat((weights["pool_token"].expand(len(x), -1, -1), x), dim=1)
    return linear(weights, "proj", norm(weights, "norm", x, 1e-5)).flatten(0, 1)


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def vit(weights: Weights, config: Config, pixel_values: Tensor) -> Tensor:
    stem = under(weights, "embeddings.")
    patches = conv2d(
        pixel_values,
        stem["patch_embeddings.projection.weight"],
        stem["patch_embeddings.projection.bias"],
        stride=config["patch_size"],
    )
    patches = patches.flatten(2).transpose(1, 2)
    x = torch.cat((stem["cls_token"].expand(len(patches), -1, -1), patches), dim=1) + stem["position_embeddings"]
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attention": "attention", "o_proj": "o_proj"}
    x = encoder(weights, config, x, "layers", names, gelu)
    return norm(weights, "layernorm", x, config["layer_norm_eps"])


def clip(weights: Weights, config: Config, pixel_values: Tensor) -> Tensor:
    stem = under(weights, "embeddings.")
    patches = conv2d(pixel_values, stem["patch_embedding.weight"], stride=config["patch_size"])
    patches = patches.flatten(2).transpose(1, 2)
    cls = stem["class_embedding"].expand(len(patches), 1, -1)
    x = torch.cat((cls, patches), dim=1) + stem["position_embedding.weight"]
    x = norm(weights, "pre_layrnorm", x, config["layer_norm_eps"])
    return encoder(weights, config, x, "encoder.layers", CLIP_NAMES, lambda y: y * (1.702 * y).sigmoid())


def siglip(weights: Weights, config: Config, pixel_values: Tensor) -> Tensor:
    stem = under(weights, "embeddings.")
    patches = conv2d(
        pixel_values, stem["patch_embedding.weight"], stem["patch_embedding.bias"], stride=config["patch_size"]
    )
    x = patches.flatten(2).transpose(1, 2) + stem["position_embedding.weight"]
    x = encoder(weights, config, x, "encoder.layers", CLIP_NAMES, lambda y: gelu(y, approximate="tanh"))
    return norm(weights, "post_layernorm", x, config["layer_norm_eps"])


CLIP_NAMES = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attention": "self_attn", "o_proj": "out_proj"}
TOWERS = {"vit": vit, "clip_vision_model": clip, "siglip_vision_model": siglip}


def encoder(weights: Weights, config: Config, x: Tensor, layers: str, names: dict[str, str], activation: Any) -> Tensor:
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    for index in range(config["num_hidden_layers"]):
        layer = under(weights, f"{layers}.{index}.")
        y = norm(layer, names["norm1"], x, eps)
        q, k, v = (
            linear(layer, f"{names['attention']}.{name}_proj", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name in "qkv"
        )
        mixed = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = x + linear(layer, f"{names['attention']}.{names['o_proj']}", mixed.transpose(1, 2).flatten(2))
        y = norm(layer, names["norm2"], x, eps)
        x = x + linear(layer, "mlp.fc2", activation(linear(layer, "mlp.fc1", y)))
    return x
