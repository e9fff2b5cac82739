"""Provider fields that follow from other fields: set where the user has not set them, refused where they contradict."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ...errors import UserError
from .backend import ENGINE, TORCH
from .cpu import cuda_is_real

APEX_GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
"""APEX's extension. Megatron-Core's LM head needs it for `gradient_accumulation_fusion`; Transformer Engine's linear
layers do not."""


@dataclass(frozen=True, slots=True)
class Derived:
    """A field that is derived where it is None.

    Attributes:
        field: field of the provider.
        value: returns its value, given the provider and its back end.
        reason: why another value is refused; second half of the message.
        may_be_off: whether the user may set False where True is derived.
    """

    field: str
    value: Callable[[Any, str], Any]
    reason: str
    may_be_off: bool = False


def _needs_transformer_engine(field: str) -> Derived:
    return Derived(
        field, lambda provider, backend: backend == ENGINE, "it is a kernel of Transformer Engine", may_be_off=True
    )


def _never(field: str, reason: str) -> Derived:
    return Derived(field, lambda provider, backend: False, reason)


DERIVED = (
    Derived(
        "transformer_impl", lambda provider, backend: "local" if backend == TORCH else ENGINE, "`backend` decides it"
    ),
    Derived("moe_grouped_gemm", lambda provider, backend: backend == ENGINE, "`backend` decides it"),
    *map(
        _needs_transformer_engine,
        ("moe_permute_fusion", "bias_activation_fusion", "masked_softmax_fusion", "persist_layer_norm"),
    ),
    Derived(
        "gradient_accumulation_fusion",
        lambda provider, backend: backend == ENGINE and find_spec(APEX_GRADIENT_KERNEL) is not None,
        f"it needs Transformer Engine and APEX with its extension {APEX_GRADIENT_KERNEL}",
        may_be_off=True,
    ),
    Derived(
        "cross_entropy_loss_fusion",
        lambda provider, backend: (
            backend == ENGINE and provider.params_dtype != torch.float32 and not provider.deterministic_mode
        ),
        "Megatron-Core's fusion rounds the gradient of the logits to bf16, and is not deterministic; it is on with "
        "Transformer Engine in half precision",
        may_be_off=True,
    ),
    _never("moe_router_fusion", "the fused router has not been shown to be exact for this model"),
    _never("apply_rope_fusion", "Megatron-Core's fused rotation omits YaRN's factor (Megatron-LM issue 2038)"),
    Derived(
        "sequence_parallel",
        lambda provider, backend: provider.tensor_model_parallel_size > 1,
        "Megatron-Core trains a mixture of experts with tensor parallelism only with sequence parallelism",
    ),
    Derived(
        "cp_comm_type",
        lambda provider, backend: "a2a" if provider.context_parallel_size > 1 else provider.cp_comm_type,
        "it would lose the sinks",
    ),
    Derived(
        "batch_p2p_comm",
        lambda provider, backend: cuda_is_real(),
        "gloo cannot tell batched sends and receives of interleaved stages apart",
        may_be_off=True,
    ),
)


ENGINE_SETTINGS = {"transformer_impl": "local", "moe_grouped_gemm": False}


@contextmanager
def without_kernels(provider: Any) -> Iterator[None]:
    """Take the settings of Transformer Engine and APEX back inside this context.

    Megatron-Core refuses them where the packages are missing, as where a run on another machine is planned.
    """
    off = {rule.field: False for rule in DERIVED if rule.may_be_off} | ENGINE_SETTINGS
    before = {field: getattr(provider, field) for field in off}
    for field, value in off.items():
        setattr(provider, field, value)
    try:
        yield
    finally:
        for field, value in before.items():
            setattr(provider, field, value)


def derive(provider: Any, backend: str) -> None:
    """Set the fields of `DERIVED` that are None, or were derived by an earlier call and not changed since.

    ``provider.derived`` records the derived values, also in ``run_config.yaml``, so that a checkpoint can be loaded
    with another back end or layout.

    Raises:
        UserError: a field is set to a value that contradicts the others.
    """
    for rule in DERIVED:
        current, value = getattr(provider, rule.field), rule.value(provider, backend)
        is_derived = rule.field in provider.derived and provider.derived.pop(rule.field) == current
        if current is None or is_derived:
            setattr(provider, rule.field, value)
            provider.derived[rule.field] = value
        elif current != value and not (rule.may_be_off and current is False):
            raise UserError(
                f"{rule.field}={current!r} is not supported here, only {value!r}: {rule.reason}. Leave it None."
            )
