"""Megatron settings that this model does not support, each with its reason; docs/parallelism.md lists them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError

TORCH, ENGINE = "torch", "transformer_engine"


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
    Unsupported("qk_layernorm", bool, "gpt-oss has no norms of queries and keys"),
    Unsupported("layernorm_zero_centered_gamma", bool, "gpt-oss's norms multiply by the weight itself"),
    Unsupported("moe_shared_expert_intermediate_size", bool, "gpt-oss has no shared experts"),
    Unsupported("enable_cuda_graph", bool, "this is an old name; set cuda_graph_impl"),
    Unsupported("external_cuda_graph", bool, "this is an old name; set cuda_graph_impl"),
    Unsupported("mtp_num_layers", bool, "gpt-oss has no layers that predict further tokens"),
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
        lambda kind: kind == "full_iteration",
        "batches differ in their number of images; 'transformer_engine' captures layers",
        (ENGINE,),
    ),
    Unsupported(
        "cuda_graph_impl",
        lambda kind: kind != "none",
        "its experts read the number of their tokens on the host",
        (TORCH,),
    ),
    Unsupported("fp8", bool, "FP8 matrix products need Transformer Engine", (TORCH,)),
    Unsupported("fp4", bool, "FP4 matrix products need Transformer Engine", (TORCH,)),
    Unsupported("tp_comm_overlap", bool, "overlapped matrix products need Transformer Engine", (TORCH,)),
    Unsupported("moe_pad_expert_input_to_capacity", bool, "its experts have no capacity limit", (TORCH,)),
    Unsupported(
        "fp32_residual_connection",
        bool,
        "its norms return their input's dtype, and matrix products need bf16",
        (TORCH,),
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


def check_supported(provider: Any, backend: str) -> None:
    """Refuse settings that the back end does not support.

    Raises:
        UserError: with the first such field, its value and the reason.
    """
    for setting in UNSUPPORTED:
        value = getattr(provider, setting.field)
        if backend in setting.backends and setting.is_refused(value):
            where = "" if len(setting.backends) > 1 else f" with backend={backend!r}"
            raise UserError(f"{setting.field}={value!r} is not supported{where}: {setting.reason}.")
