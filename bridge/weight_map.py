"""The weight-name tables: one row, one tensor. AutoBridge's mappings are made from the rows.

``*`` stands for a number, ``**`` for the rest of a name; they stand for the same on both sides of a row. The two back
ends share all names but one, and all checkpoint keys.
"""

from dataclasses import dataclass
from enum import Enum


class Layout(Enum):
    """How a tensor is laid out in Megatron, and so how it is cut for tensor parallelism."""

    REPLICATED = "the same on every rank"
    COLUMN = "cut along its first axis"
    ROW = "cut along its second axis; a bias is whole"
    QKV = "q, k and v of each key/value group together, cut by groups"
    EXPERT_GATE_UP = "one expert of [E, …, 2f] with gate and up interleaved, as all gates, then all ups"
    EXPERT_DOWN = "one expert of [E, f, h], transposed"


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of Megatron's and where it is found in transformers' checkpoint.

    Attributes:
        megatron: parameter name.
        hf: the name, or one name per part (``q``, ``k``, ``v``).
        layout: what happens to the numbers on the way.
    """

    megatron: str
    hf: str | dict[str, str]
    layout: Layout


def _layer(megatron: str, hf: str | dict[str, str], layout: Layout) -> Row:
    """A row for every decoder layer."""
    prefix = "model.layers.*."
    hf = prefix + hf if isinstance(hf, str) else {part: prefix + name for part, name in hf.items()}
    return Row("decoder.layers.*." + megatron, hf, layout)


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
    _layer("mlp.router.vision_bias", "mlp.router.vision_bias", Layout.REPLICATED),
    _layer("mlp.experts.linear_fc1.weight*", "mlp.experts.gate_up_proj", Layout.EXPERT_GATE_UP),
    _layer("mlp.experts.linear_fc1.bias*", "mlp.experts.gate_up_proj_bias", Layout.EXPERT_GATE_UP),
    _layer("mlp.experts.linear_fc2.weight*", "mlp.experts.down_proj", Layout.EXPERT_DOWN),
    _layer("mlp.experts.linear_fc2.bias*", "mlp.experts.down_proj_bias", Layout.EXPERT_DOWN),
    Row("vision_adapter.**", "model.vision_adapter.**", Layout.REPLICATED),
)
