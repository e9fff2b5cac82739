"""The fields of a transformers config under Megatron's names."""

from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .hf.configuration_gpt_oss_vision import GPTOSSVisionConfig

# Fields with equal values: name in the transformers config, name in Megatron.
HF_TO_MEGATRON = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "moe_ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "attention_bias": "add_bias_linear",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "num_local_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "router_aux_loss_coef": "moe_aux_loss_coeff",
    "swiglu_limit": "activation_func_clamp_value",
    "use_vision": "use_vision",
    "vision_pool_token": "vision_pool_token",
    "image_token_id": "image_token_id",
}

YARN = {
    "factor": "yarn_rotary_scaling_factor",
    "original_max_position_embeddings": "yarn_original_max_position_embeddings",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "truncate": "yarn_correction_range_round_to_int",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}

TRAINING_ONLY = ("vocab_size", "seq_length", "init_method_std", "attention_dropout", "moe_aux_loss_coeff")
"""Fields that may differ between two runs of one model: the same weights give the same logits."""

PER_MODALITY = "modality_aux_loss"
"""Our own value of ``moe_router_load_balancing_type``: ``aux_loss`` for text and for visual tokens separately."""


def load_balancing_fields(config: "GPTOSSVisionConfig") -> dict[str, Any]:
    """Fields of the provider for the auxiliary loss of a config; none where its coefficient is 0."""
    if not config.router_aux_loss_coef:
        return {}
    kind = PER_MODALITY if config.router_aux_loss_per_modality else "aux_loss"
    return {"moe_router_load_balancing_type": kind, "calculate_per_token_loss": False}


def megatron_fields(config: "GPTOSSVisionConfig") -> dict[str, Any]:
    """The provider fields of a config, as plain values.

    Raises:
        UserError: for attention without biases, and for a rotary embedding that Megatron-Core does not have.
    """
    if not config.attention_bias:
        raise UserError("attention_bias=False cannot be expressed in Megatron beside experts that have biases.")
    values: Any = config  # transformers' annotations allow None where there is always a value
    return {megatron: getattr(values, name) for name, megatron in HF_TO_MEGATRON.items()} | {
        **_rotary_fields(values.rope_parameters, values.max_position_embeddings),
        "window_size": (values.sliding_window - 1, 0) if values.sliding_window else None,
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in values.layer_types],
        "no_rope_freq": values.nope_layers,
        "vision_config": values.vision_config.to_dict() if values.use_vision else {},
    }


def _rotary_fields(rope: dict[str, Any], positions: int) -> dict[str, Any]:
    fields: dict[str, Any] = {"rotary_base": rope["rope_theta"]}
    if rope["rope_type"] == "default":
        return fields | {"position_embedding_type": "rope"}
    if rope["rope_type"] != "yarn" or rope.get("attention_factor") is not None:
        raise UserError(f"Megatron-Core has no rotary embedding like {rope}; it takes 'default' and plain 'yarn'.")
    defaults = {"original_max_position_embeddings": positions, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    settings = {megatron: (defaults | rope).get(name) for name, megatron in YARN.items()}
    return fields | settings | {"position_embedding_type": "yarn"}
