"""Settings that change what a rank allocates and that the estimate of memory does not count."""

from typing import Any

OFF: dict[str, tuple[Any, ...]] = {
    "ddp.use_megatron_fsdp": (False,),
    "dist.use_megatron_fsdp": (False,),
    "dist.use_torch_fsdp2": (False,),
    "ddp.num_distributed_optimizer_instances": (1,),
    "ddp.param_name_patterns_for_fp32_local_accumulation": ((), []),
    "model.fp8": (None, False),
    "model.cpu_offloading": (False,),
    "model.fine_grained_activation_offloading": (False,),
    "optimizer.optimizer": ("adam", "sgd", "lion"),
}
"""Each with the values at which the estimate holds."""


def uncounted(config: Any) -> list[str]:
    """The settings of `OFF` that have another value, as ``key=value``; the configuration is validated."""
    found = []
    for key, counted in OFF.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value not in counted:
            found.append(f"{key}={value}")
    return found
