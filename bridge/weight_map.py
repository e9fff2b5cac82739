"""The table of weights: one row, one tensor. AutoBridge's mappings and the streamed converters are made from it.

``*`` is a number, ``**`` the rest of a name, the same on both sides of a row. The two back ends share all parameter
names but one, and all checkpoint keys.
"""

import re
from dataclasses import dataclass
from enum import Enum

LANGUAGE_MODEL = "language_model"
PARAM_GROUPS = ("vision_model", "vision_projection", "vision_bias", LANGUAGE_MODEL)
"""The last one is stock gpt-oss; the others are what this model adds to it."""


class Layout(Enum):
    """The layout of a tensor in Megatron, from which its sharding for tensor parallelism follows."""

    REPLICATED = "the same on every rank"
    COLUMN = "sharded along its first axis"
    ROW = "sharded along its second axis; a bias is whole"
    QKV = "q, k and v of each key/value group together, sharded by groups"
    EXPERT_GATE_UP = "one expert of [E, …, 2f] with gate and up interleaved, as all gates, then all ups"
    EXPERT_DOWN = "one expert of [E, f, h], transposed"


@dataclass(frozen=True, slots=True)
class Row:
    """One Megatron parameter and its tensors in a transformers checkpoint.

    Attributes:
        megatron: name of the parameter.
        hf: name of the tensor, or a name per part (``q``, ``k``, ``v``).
        layout: how values are arranged in Megatron.
        group: one of `PARAM_GROUPS`; groups can be frozen and have their own learning rate.
        keep_fp32: whether the parameter stays fp32 in a half-precision model.
    """

    megatron: str
    hf: str | dict[str, str]
    layout: Layout
    group: str = LANGUAGE_MODEL
    keep_fp32: bool = False


def _layer(megatron: str, hf: str | dict[str, str], layout: Layout, **columns) -> Row:
    """A row for every decoder layer."""
    prefix = "model.layers.*."
    hf = prefix + hf if isinstance(hf, str) else {part: prefix + name for part, name in hf.items()}
    return Row("decoder.layers.*." + megatron, hf, layout, **columns)


def _qkv(kind: str) -> dict[str, str]:
    return {part: f"self_attn.{part}_proj.{kind}" for part in ("q", "k", "v")}


ROWS: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", Layout.COLUMN),
    Row("decoder.final_layernorm.weight", "model.norm.weight", Layout.REPLICATED),
    Row("output_layer.weight", "lm_head.weight", Layout.COLUMN),
    # Transformer Engine fuses the norm into the projection, the `torch` back end has it apart.
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", Layout.REPLICATED),
    _layer("input_layernorm.weight", "input_layernorm.weight", Layout.REPLICATED),
    _layer("self_attention.linear_qkv.weight", _qkv("weight"), Layout.QKV),
    _layer("self_attention.linear_qkv.bias", _qkv("bias"), Layout.QKV),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", Layout.ROW),
    _layer("self_attention.linear_proj.bias", "self_attn.o_proj.bias", Layout.ROW),
    _layer("self_attention.core_attention.softmax_offset", "self_attn.sinks", Layout.COLUMN),
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", Layout.REPLICATED),
    _layer("mlp.router.weight", "mlp.router.weight", Layout.REPLICATED),
    _layer("mlp.router.bias", "mlp.router.bias", Layout.REPLICATED),
    _layer("mlp.router.vision_bias", "mlp.router.vision_bias", Layout.REPLICATED, group="vision_bias", keep_fp32=True),
    _layer("mlp.experts.linear_fc1.weight*", "mlp.experts.gate_up_proj", Layout.EXPERT_GATE_UP),
    _layer("mlp.experts.linear_fc1.bias*", "mlp.experts.gate_up_proj_bias", Layout.EXPERT_GATE_UP),
    _layer("mlp.experts.linear_fc2.weight*", "mlp.experts.down_proj", Layout.EXPERT_DOWN),
    _layer("mlp.experts.linear_fc2.bias*", "mlp.experts.down_proj_bias", Layout.EXPERT_DOWN),
    Row("vision_adapter.vit.**", "model.vision_adapter.vit.**", Layout.REPLICATED, group="vision_model"),
    Row("vision_adapter.**", "model.vision_adapter.**", Layout.REPLICATED, group="vision_projection"),
)

KEPT_IN_FP32 = tuple(row.megatron.rpartition(".")[2] for row in ROWS if row.keep_fp32)
"""Last parts of the names of the parameters that stay fp32."""


def _pattern(name: str) -> str:
    # Checkpoint keys have no layer numbers.
    return re.escape(name).replace(r"\.\*\.", r"\.(?:\d+\.)?").replace(r"\*\*", ".+") + "$"


_ADDED = [
    (re.compile(rf"(?:^|\.)(?:{_pattern(row.megatron)}|{_pattern(str(row.hf))})"), row.group)
    for row in ROWS
    if row.group != LANGUAGE_MODEL
]


def group_of(name: str) -> str:
    """The group of a parameter, by its name in Megatron (wrapped or not), a Megatron checkpoint or transformers.

    >>> group_of("module.decoder.layers.3.mlp.router.vision_bias")
    'vision_bias'
    """
    return next((group for pattern, group in _ADDED if pattern.search(name)), LANGUAGE_MODEL)
