"""Uses of private names of Megatron-Bridge and Megatron-Core, and work-arounds for their bugs.

Versions: megatron-bridge 0.6.2, megatron-core 0.19.2. A test checks each name and each bug, and fails when a name has
moved or a bug is fixed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron.bridge.peft.lora as bridge_lora
import megatron.bridge.peft.utils as bridge_peft
import megatron.bridge.training.initialize as bridge_initialize
import torch
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.datasets import utils as core_dataset_utils
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ...errors import UserError
from .experts import GroupedLinear

KEEP_IN_FP32 = "_keep_in_float32_parameter_names"
"""Attribute of a module: names of the parameters that the half-precision wrapper keeps in fp32."""


def apply() -> None:
    """Install the work-arounds and allow our classes in Megatron-Bridge's config loader; idempotent."""
    register_allowed_target_prefix("gpt_oss_vision.")
    # Without Transformer Engine, Megatron-Core sets its classes to None. Megatron-Bridge 0.6.2 takes them for classes,
    # and its LoRA calls isinstance with them.
    bridge_peft.HAVE_TE = bridge_peft.HAVE_TE and HAVE_TE
    bridge_lora.get_adapter_attributes_from_linear = _adapter_attributes_with_our_experts
    if not _helpers_can_be_compiled():
        bridge_initialize.compile_helpers = _nothing_to_compile
    if DistributedOptimizer._build_model_and_main_param_groups.__func__ is _build_groups:
        DistributedOptimizer._build_model_and_main_param_groups = classmethod(_build_groups_in_order)
    DistributedOptimizer.state_dict = _state_dict_with_initial_state
    DistributedOptimizer.load_state_dict = _load_state_dict_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_except_step


def as_config_value(value: Any) -> Any:
    """A value as `ConfigContainer.to_yaml` writes it."""
    return ConfigContainer._convert_value_to_dict(value)


adapter_attributes = bridge_peft.get_adapter_attributes_from_linear


def _adapter_attributes_with_our_experts(module, **options) -> bridge_peft.AdapterAttributes:
    """Sizes of a layer for LoRA, for the `torch` back end's experts too.

    Megatron-Bridge 0.6.2 reads a layer's sizes by its class, and refuses every class but Megatron-Core's.

    Raises:
        UserError: with expert tensor parallelism, where its adapters have not been shown to be exact.
    """
    if not isinstance(module, GroupedLinear):
        return adapter_attributes(module, **options)
    if module.tp_group.size() > 1:
        raise UserError(
            f"LoRA on the experts needs expert_tensor_parallel_size=1, got {module.tp_group.size()}; "
            "or leave linear_fc1 and linear_fc2 out of target_modules."
        )
    return bridge_peft.AdapterAttributes(
        input_is_parallel=module.partition_dim == 1,
        in_features=module.in_features,
        out_features=module.out_features,
        disable_tensor_parallel_comm=False,
        disable_sequence_parallel_comm=True,
        base_linear_is_parallel=True,
    )


_state_dict = DistributedOptimizer.state_dict
_load_state_dict = DistributedOptimizer.load_state_dict
_set_states = DistributedOptimizer._set_main_param_and_optimizer_states
_build_groups = DistributedOptimizer._build_model_and_main_param_groups.__func__


def _build_groups_in_order(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config):
    """Keep the parameters of an optimizer group in the order of their indices.

    Megatron-Core 0.19.2 puts fp32 parameters before half-precision ones here, but looks them up by the old indices:
    with both in one group (``vision_bias`` is fp32) each state is taken for another parameter's, and saving fails.
    """
    result = _build_groups(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
    half_models, full_models, half_shards, full_shards, main_shards = result
    halves = half_shards if config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else main_shards
    for index, group in enumerate(opt_group_ranges):
        shards = dict(zip(half_models[index], halves[index], strict=True))
        shards |= dict(zip(full_models[index], full_shards[index], strict=True))
        group["orig_group"]["params"] = [shards[parameter] for parameter in group["params"]]
    return result


# The next three functions make a run with torch's Adam and the distributed optimizer resumable. Megatron-Core 0.19.2
# supports only the Adam of Transformer Engine or Apex, which counts steps per group and not per parameter.


def _state_dict_with_initial_state(self: DistributedOptimizer) -> dict:
    """Give torch's Adam the state that it makes in its first step: loading reads it before."""
    adam = self.optimizer
    if isinstance(adam, torch.optim.Adam | torch.optim.AdamW) and not adam.state:
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return _state_dict(self)


def _load_state_dict_with_own_steps(self: DistributedOptimizer, state_dict: dict) -> None:
    """Give each parameter its own step counter: Megatron-Core sets one shared tensor, which each one increments."""
    _load_state_dict(self, state_dict)
    for state in self.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _set_states_except_step(self: DistributedOptimizer, model_param, tensors: dict) -> None:
    """Load moments and weights; the step has been set from the groups.

    The format ``fully_reshardable`` gives no step here, ``dp_reshardable`` the one from before loading, 0.
    """
    _set_states(self, model_param, tensors | {"step": None})


@contextmanager
def allow_biased_experts(provider) -> Iterator[None]:
    """Let a config with expert tensor parallelism and expert biases be finalized.

    Megatron-Core 0.19.2 refuses it, because its own row-parallel experts add the whole bias on every rank.
    `GroupedExperts` divides the bias by the number of ranks.
    """
    size, provider.expert_tensor_parallel_size = provider.expert_tensor_parallel_size, 1
    try:
        yield
    finally:
        provider.expert_tensor_parallel_size = size


def _helpers_can_be_compiled() -> bool:
    """Whether the dataset helper's Makefile is there.

    The wheel of megatron-core 0.19.2 ships the helper compiled but not its Makefile, and ``compile_helpers()``
    calls ``make`` and ends the process.
    """
    return (Path(core_dataset_utils.__file__).parent / "Makefile").exists()


def _nothing_to_compile() -> None:
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        raise RuntimeError(
            "megatron-core is installed without its compiled dataset helper; reinstall it with "
            "`pip install --force-reinstall megatron-core`."
        )


def global_parameter_names(bridge, megatron_model) -> list[str]:
    """Names of the parameters of all pipeline ranks, with global numbers of layers and experts."""
    names: Callable = bridge._megatron_global_param_names_all_pp_ranks
    return names(megatron_model)
