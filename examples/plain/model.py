"""GPT-OSS-Vision in plain PyTorch: the whole model, from token ids and pixels to logits, on one page.

Parameters have the names of a checkpoint (checkpoint.py loads one); logits are those of the transformers model, bit for
bit. Shapes: b rows, s positions, t = b * s tokens, h hidden size, n query heads, g key/value heads, d head size,
e experts, k chosen experts, f inner size of an expert, i images, p tokens of an image, v hidden size of the ViT.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:  # named as in config.json; the defaults are gpt-oss-20b with a ViT-L/14
    vocab_size: int = 201088
    hidden_size: int = 2880
    num_hidden_layers: int = 24
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 64
    sliding_window: int = 128  # of layers 0, 2, 4, …; the others attend to all earlier positions
    num_local_experts: int = 32
    num_experts_per_tok: int = 4
    intermediate_size: int = 2880
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    factor: float = 32.0  # of YaRN: how many times longer than the original context
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    use_nope: bool = False
    nope_stride: int = 4  # with use_nope, layers 3, 7, 11, … have no rotation
    use_vision: bool = True
    image_token_id: int = 200013
    vision_hidden_size: int = 1024
    vision_num_hidden_layers: int = 24
    vision_num_attention_heads: int = 16
    vision_image_size: int = 224
    vision_patch_size: int = 14
    vision_num_channels: int = 3


GPT_OSS_20B = Config()
GPT_OSS_120B = Config(num_hidden_layers=36, num_local_experts=128)
GPT_OSS_SMALL = replace(GPT_OSS_20B, vocab_size=32, image_token_id=31, hidden_size=64, intermediate_size=96)
GPT_OSS_SMALL = replace(GPT_OSS_SMALL, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
GPT_OSS_SMALL = replace(GPT_OSS_SMALL, num_local_experts=8, num_experts_per_tok=2, sliding_window=8, use_nope=True)
GPT_OSS_SMALL = replace(GPT_OSS_SMALL, original_max_position_embeddings=16, vision_image_size=8, vision_patch_size=4)
GPT_OSS_SMALL = replace(GPT_OSS_SMALL, vision_hidden_size=64, vision_num_hidden_layers=2, vision_num_channels=1)


class RMSNorm(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def rotation(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (s, d / 2) at positions (s,), by YaRN: low frequencies are divided by its factor, high ones kept."""
    d, theta, wide = config.head_dim, config.rope_theta, torch.promote_types(dtype, torch.float32)
    period = theta ** (torch.arange(0, d, 2, dtype=wide) / d)
    # The pairs of dimensions that turn beta_fast and beta_slow times within the original context.
    turns = (config.original_max_position_embeddings / (2 * math.pi * x) for x in (config.beta_fast, config.beta_slow))
    low, high = (d * math.log(x) / (2 * math.log(theta)) for x in turns)
    low, high = max(low, 0), min(high, d - 1)
    kept = 1 - ((torch.arange(d // 2, dtype=wide) - low) / (high - low)).clamp(0, 1)
    frequency = 1 / (config.factor * period) * (1 - kept) + 1 / period * kept
    angle, concentration = positions[:, None] * frequency.to(positions.device), 0.1 * math.log(config.factor) + 1
    return (angle.cos() * concentration).to(dtype), (angle.sin() * concentration).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of the first and the second half of d by its angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        h, n, g, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(h, n * d), nn.Linear(h, g * d), nn.Linear(h, g * d)
        self.o_proj, self.sinks = nn.Linear(n * d, h), nn.Parameter(torch.zeros(n))
        self.layer, self.d, self.window = layer, d, config.sliding_window if layer % 2 == 0 else math.inf
        self.rotates = not config.use_nope or (layer + 1) % config.nope_stride != 0

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: dict | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (proj(x).view(b, s, -1, self.d).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rotates:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            past = cache.get(self.layer, (k[:, :, :0], v[:, :, :0]))
            k, v = cache[self.layer] = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        keys = torch.arange(k.shape[2], device=x.device)
        distance = keys[-s:, None] - keys
        visible = (distance >= 0) & (distance < self.window)  # (s, keys)
        if mask is not None:
            visible = visible & mask[:, None, None].bool()
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        logits = (q @ k.transpose(2, 3) * self.d**-0.5).masked_fill(~visible, -math.inf)  # (b, n, s, keys)
        # The sink is one more logit per head: it takes a share of the softmax, and has no value.
        logits = torch.cat((logits, self.sinks.view(1, -1, 1, 1).expand(b, -1, s, 1)), dim=-1)
        probabilities = (logits - logits.amax(-1, keepdim=True)).softmax(-1)[..., :-1]
        return self.o_proj((probabilities @ v).transpose(1, 2).reshape(b, s, -1))


class TopKRouter(nn.Module):
    """Chooses the experts of each token. `GPTOSSVision(config, router=…)` takes any class with these two methods."""

    def __init__(self, config: Config):
        super().__init__()
        self.k, e = config.num_experts_per_tok, config.num_local_experts
        self.weight, self.bias = nn.Parameter(torch.zeros(e, config.hidden_size)), nn.Parameter(torch.zeros(e))
        self.vision_bias = nn.Parameter(torch.zeros(e))  # images may prefer other experts than text does

    def forward(self, x: Tensor, is_visual: Tensor) -> tuple[Tensor, Tensor]:
        """From tokens (t, h) and (t,) to the weights (t, k) and the indices (t, k) of their experts."""
        logits = nn.functional.linear(x, self.weight, self.bias)
        top, chosen = (logits + is_visual[:, None] * self.vision_bias).to(logits.dtype).topk(self.k)
        return top.softmax(-1), chosen


class Experts(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        e, h, f = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(e, h, 2 * f)), nn.Parameter(torch.zeros(e, f, h))
        self.gate_up_proj_bias, self.down_proj_bias = (nn.Parameter(torch.zeros(e, size)) for size in (2 * f, h))
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            choice, token = torch.where(expert == chosen.T)
            gate_up = x[token] @ self.gate_up_proj[expert] + self.gate_up_proj_bias[expert]
            gate, up = gate_up[:, 0::2].clamp(max=self.limit), gate_up[:, 1::2].clamp(-self.limit, self.limit)
            inner = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
            y = inner @ self.down_proj[expert] + self.down_proj_bias[expert]
            out.index_add_(0, token, y * weights[token, choice, None])
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: Config, layer: int, router: type[nn.Module] = TopKRouter):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config), Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = nn.ModuleDict({"router": router(config), "experts": Experts(config)})

    def forward(self, x: Tensor, is_visual: Tensor, *context) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), *context)
        tokens = self.post_attention_layernorm(x).flatten(0, 1)
        return x + self.mlp["experts"](tokens, *self.mlp["router"](tokens, is_visual.flatten())).view(x.shape)


class VitLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        v, self.heads = config.vision_hidden_size, config.vision_num_attention_heads
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(v, eps=1e-12), nn.LayerNorm(v, eps=1e-12)
        self.attention = nn.ModuleDict({f"{name}_proj": nn.Linear(v, v) for name in "qkvo"})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(v, 4 * v), "fc2": nn.Linear(4 * v, v)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layernorm_before(x)
        q, k, v = (self.attention[f"{n}_proj"](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        probabilities = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        x = self.attention["o_proj"]((probabilities @ v).transpose(1, 2).flatten(2)) + x
        return self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.layernorm_after(x)))) + x


class Vit(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        v, image, size = config.vision_hidden_size, config.vision_image_size, config.vision_patch_size
        patches = nn.Conv2d(config.vision_num_channels, v, kernel_size=size, stride=size)
        self.embeddings = nn.Module()
        self.embeddings.patch_embeddings = nn.ModuleDict({"projection": patches})
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, v))
        self.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, 1 + (image // size) ** 2, v))
        self.layers = nn.Sequential(*(VitLayer(config) for _ in range(config.vision_num_hidden_layers)))
        self.layernorm = nn.LayerNorm(v, eps=1e-12)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.embeddings.patch_embeddings["projection"](pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.embeddings.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return self.layernorm(self.layers(x + self.embeddings.position_embeddings))


class VisionAdapter(nn.Module):  # from images (i, channels, height, width) to tokens (i, p, h): pool, CLS, patches
    def __init__(self, config: Config):
        super().__init__()
        self.vit, self.pool_token = Vit(config), nn.Parameter(torch.zeros(1, 1, config.vision_hidden_size))
        self.norm = nn.LayerNorm(config.vision_hidden_size)
        self.proj = nn.Linear(config.vision_hidden_size, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.vit(pixel_values.to(self.pool_token.dtype))
        return self.proj(self.norm(torch.cat((self.pool_token.expand(len(x), -1, -1), x), dim=1)))


class Decoder(nn.Module):
    def __init__(self, config: Config, router: type[nn.Module]):
        super().__init__()
        self.config, self.embed_tokens = config, nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, router) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.vision_adapter = VisionAdapter(config) if config.use_vision else None

    def forward(self, input_ids, pixel_values=None, attention_mask=None, cache=None) -> Tensor:
        x = self.embed_tokens(input_ids)
        is_visual = (input_ids == self.config.image_token_id) & self.config.use_vision
        if pixel_values is not None:
            features = self.vision_adapter(pixel_values).flatten(0, 1)
            if len(features) != is_visual.sum():
                raise ValueError(f"{len(features)} image tokens, but {is_visual.sum()} placeholders")
            x = x.masked_scatter(is_visual[..., None], features)
        past = cache[0][0].shape[2] if cache else 0
        angles = rotation(self.config, torch.arange(past, past + input_ids.shape[1], device=x.device), x.dtype)
        for layer in self.layers:
            x = layer(x, is_visual, angles, attention_mask, cache)
        return self.norm(x)


class GPTOSSVision(nn.Module):
    """The decoder with its head: logits (b, s, vocab_size) of token ids (b, s).

    Images (i, channels, height, width) go to the placeholders, `image_token_id`, in their order; an attention mask
    (b, keys) is 0 at padding. A cache is a dict, empty at first: with it, the next call has the next token only.
    """

    def __init__(self, config: Config, router: type[nn.Module] = TopKRouter):
        super().__init__()
        self.model = Decoder(config, router)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name and "bias" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: Tensor, *args, **kwargs) -> Tensor:
        return self.lm_head(self.model(input_ids, *args, **kwargs))
