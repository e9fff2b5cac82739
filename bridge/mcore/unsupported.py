"""Megatron settings that this model does not support, each with its reason; docs/parallelism.md lists them."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ...errors import UserError
from .backend import ENGINE, TORCH


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A setting that would be ignored, fail during a run, or change the model.

    Attributes:
        field: field of the provider.
        is_refused: whether a value is not supported.
        reason: second half of the message.
        backends: back ends that do not support it.
    """

    field: str
    is_refused: Callable[[Any], bool]
    reason: str
    backends: tuple[str, ...] = (TORCH, ENGINE)


UNSUPPORTED = (
    Unsupported("enable_cuda_graph", bool, "this is an old name; set cuda_graph_impl"),
    Unsupported("external_cuda_graph", bool, "this is an old name; set cuda_graph_impl"),
    Unsupported("should_pad_vocab", bool, "the vocabulary is not padded; 201,088 entries are a multiple of 128"),
    Unsupported("init_model_with_meta_device", bool, "the vision tower is not built on the meta device"),
    Unsupported(
        "overlap_moe_expert_parallel_comm",
        bool,
        "its schedule does not pass the visual mask to the routers",
    ),
    Unsupported(
        "mlp_chunks_for_training",
        lambda chunks: chunks > 1,
        "Megatron-Core's chunks do not pass the visual mask to the routers",
    ),
    Unsupported(
        "cuda_graph_impl",
        lambda kind: kind != "none",
        "Megatron-Core's captured layers do not pass the visual mask to the routers",
    ),
    Unsupported("fp8", bool, "FP8 matrix products need Transformer Engine", (TORCH,)),
    Unsupported(
        "fp8_recipe",
        lambda recipe: recipe in ("blockwise", "mxfp8"),
        "gpt-oss's hidden size of 2880 is no multiple of the 128 of 'blockwise'; 'mxfp8' needs a Blackwell GPU, where "
        "it has not been tried",
    ),
    Unsupported("fp4", bool, "it needs a Blackwell GPU, on which this has not been tried"),
    Unsupported(
        "deterministic_mode",
        bool,
        "its fused attention with sinks is not deterministic; that of backend='torch' is",
        (ENGINE,),
    ),
    Unsupported(
        "attention_backend",
        lambda backend: getattr(backend, "name", backend) != "auto",
        "it has one implementation of attention with sinks",
        (TORCH,),
    ),
    Unsupported(
        "attention_backend",
        lambda backend: getattr(backend, "name", backend) in ("local", "flash"),
        "only Transformer Engine's fused and unfused attention have learnable sinks",
        (ENGINE,),
    ),
    Unsupported("tp_comm_overlap", bool, "overlapped matrix products need Transformer Engine", (TORCH,)),
    Unsupported(
        "fp32_residual_connection",
        bool,
        "the layers' linear modules need inputs in the dtype of their weights",
    ),
    Unsupported("fine_grained_activation_offloading", bool, "offloading needs Transformer Engine", (TORCH,)),
    Unsupported("cpu_offloading", bool, "offloading needs Transformer Engine", (TORCH,)),
    Unsupported(
        "recompute_modules",
        lambda modules: bool(set(modules or ()) - {"core_attn", "moe"}),
        "it recomputes 'core_attn' and 'moe', or whole layers with recompute_granularity='full'",
        (TORCH,),
    ),
    Unsupported(
        "cross_entropy_fusion_impl", lambda kind: kind == "te", "this implementation needs Transformer Engine", (TORCH,)
    ),
)


FIXED = (
    *("add_bias_linear", "qk_layernorm", "qk_l2_norm", "qk_clip", "layernorm_zero_centered_gamma"),
    *("attention_output_gate", "multi_latent_attention", "experimental_attention_variant", "linear_attention_freq"),
    *("apply_residual_connection_post_layernorm", "softmax_scale", "apply_query_key_layer_scaling"),
    *("rotary_interleaved", "rotary_percent", "rope_scaling", "rotary_scaling_factor", "seq_len_interpolation_factor"),
    *("mrope_section", "fused_single_qkv_rope", "use_te_activation_func", "use_fused_weighted_squared_relu"),
    *("moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_latent_size"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_limited_devices"),
    *("moe_router_topk_scaling_factor", "moe_router_enable_expert_bias", "moe_router_quantile_balancing_ema"),
    *("moe_router_force_load_balancing", "moe_router_force_biased", "moe_input_jitter_eps"),
    *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_dropping"),
    *("moe_apply_probs_on_input", "moe_mlp_glu_interleave_size", "moe_single_grouped_weight"),
    *("moe_single_grouped_bias", "mtp_num_layers", "use_mup", "heterogeneous_block_specs", "is_hybrid_model"),
    *("hybrid_context_parallel", "hierarchical_context_parallel_sizes", "transformer_layer_spec"),
    *("use_transformer_engine_full_layer_spec", "use_transformer_engine_op_fuser", "use_kitchen", "test_mode"),
)
"""Fields of Megatron's that change the model, and have their default in every gpt-oss."""


def check_fixed(provider: Any) -> None:
    """Refuse other values of the fields that gpt-oss fixes: those without constructor argument, and `FIXED`.

    Raises:
        UserError: with the first such field and its value.
    """
    for each in fields(provider):
        if each.init and each.name not in FIXED:
            continue
        default = each.default_factory() if each.default is MISSING else each.default  # pyright: ignore[reportCallIssue]
        value = getattr(provider, each.name)
        if value != default:
            raise UserError(f"{each.name}={value!r} is not supported: it would change the model. Leave {default!r}.")


def check_supported(provider: Any, backend: str) -> None:
    """Refuse settings that the back end does not support.

    Raises:
        UserError: with the first such field, its value and the reason.
    """
    check_fixed(provider)
    for setting in UNSUPPORTED:
        value = getattr(provider, setting.field)
        if backend in setting.backends and setting.is_refused(value):
            where = "" if len(setting.backends) > 1 else f" with backend={backend!r}"
            raise UserError(f"{setting.field}={value!r} is not supported{where}: {setting.reason}.")
