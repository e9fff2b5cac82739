"""What Megatron can switch on and this model cannot take, each with its reason; the user's page lists them all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import UserError

TORCH, ENGINE = "torch", "transformer_engine"


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A setting that would not do what it says.

    Attributes:
        field: of the provider.
        is_refused: whether a value of it is.
        reason: the rest of a sentence.
        backends: where it is.
    """

    field: str
    is_refused: Callable[[Any], bool]
    reason: str
    backends: tuple[str, ...] = (TORCH, ENGINE)


def _is_recomputed_elsewhere(modules: list[str] | None) -> bool:
    return bool(set(modules or ()) - {"core_attn", "moe"})


UNSUPPORTED = (
    Unsupported("qk_layernorm", bool, "gpt-oss has no norms of queries and keys"),
    Unsupported("layernorm_zero_centered_gamma", bool, "gpt-oss's norms multiply by their weight as it is"),
    Unsupported("moe_shared_expert_intermediate_size", bool, "gpt-oss has no shared experts"),
    Unsupported("enable_cuda_graph", bool, "this is an old name; set cuda_graph_impl"),
    Unsupported("external_cuda_graph", bool, "this is an old name; set cuda_graph_impl"),
    Unsupported("mtp_num_layers", bool, "gpt-oss has no layers that predict further tokens"),
    Unsupported("should_pad_vocab", bool, "the vocabulary stays as it is; 201,088 entries are a multiple of 128"),
    Unsupported("init_model_with_meta_device", bool, "the vision tower is built with its values"),
    Unsupported(
        "overlap_moe_expert_parallel_comm",
        bool,
        "its schedule runs the layers without telling the routers which tokens are visual",
    ),
    Unsupported(
        "mlp_chunks_for_training",
        lambda chunks: chunks > 1,
        "Megatron-Core's chunks don't tell the routers which tokens are visual",
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
    Unsupported("fp8", bool, "8-bit products are Transformer Engine's", (TORCH,)),
    Unsupported("fp4", bool, "4-bit products are Transformer Engine's", (TORCH,)),
    Unsupported("tp_comm_overlap", bool, "overlapped products are Transformer Engine's", (TORCH,)),
    Unsupported("moe_pad_expert_input_to_capacity", bool, "its experts take as many tokens as there are", (TORCH,)),
    Unsupported(
        "fp32_residual_connection", bool, "its norms give what they are given, and products want bf16", (TORCH,)
    ),
    Unsupported("fine_grained_activation_offloading", bool, "offloading is Transformer Engine's", (TORCH,)),
    Unsupported("cpu_offloading", bool, "offloading is Transformer Engine's", (TORCH,)),
    Unsupported(
        "recompute_modules",
        _is_recomputed_elsewhere,
        "it recomputes 'core_attn' and 'moe', or whole layers with recompute_granularity='full'",
        (TORCH,),
    ),
    Unsupported("cross_entropy_fusion_impl", lambda kind: kind == "te", "this kind is Transformer Engine's", (TORCH,)),
)


def check_supported(provider: Any, backend: str) -> None:
    """Refuse settings that would be ignored, fail in the middle of a run, or change the model.

    Raises:
        ValueError: naming the first one, its value and the reason.
    """
    for setting in UNSUPPORTED:
        value = getattr(provider, setting.field)
        if backend in setting.backends and setting.is_refused(value):
            where = "" if len(setting.backends) > 1 else f" with backend={backend!r}"
            raise UserError(f"{setting.field}={value!r} is not supported{where}: {setting.reason}.")
