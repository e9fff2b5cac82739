"""Freezing of parameter groups, and a learning rate per group.

The names are those of Megatron-Bridge's other vision models (``freeze_language_model``, …), with ``vision_bias`` added.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from megatron.bridge.training.config import OptimizerConfigOverrideProvider, OptimizerConfigOverrideProviderContext
from megatron.core.optimizer import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import nn

from ...errors import UserError
from ..weight_map import PARAM_GROUPS, group_of


def freeze(model: nn.Module, groups: Iterable[str]) -> None:
    """Set ``requires_grad`` of the parameters of some groups to False, in place."""
    groups = set(groups)
    for name, parameter in model.named_parameters():
        if group_of(name) in groups:
            parameter.requires_grad_(False)


def trained_groups(provider: Any, peft: Any) -> set[str]:
    """The groups of parameters that have gradients; ``adapter`` stands for those of adapters.

    Args:
        provider: the model.
        peft: whose adapters are trained in place of weights, beside the groups of its ``full_weights`` if it is a
            `GPTOSSVisionLoRA`; None without adapters.
    """
    groups = {"adapter", *getattr(peft, "full_weights", ())} if peft else {*PARAM_GROUPS}
    return groups - {*provider.frozen_groups}


@dataclass(kw_only=True)
class LearningRateFactors(OptimizerConfigOverrideProvider):
    """Megatron-Bridge's ``optimizer_config_override_provider`` with a learning-rate factor per group.

    A factor multiplies ``lr`` and ``min_lr`` of the optimizer, so warm-up and decay keep their form. Factors are fields
    of a ``ConfigContainer`` and can be set on the command line.
    """

    vision_model: float = 1.0
    vision_projection: float = 1.0
    vision_bias: float = 1.0
    language_model: float = 1.0

    def build_config_overrides(
        self, context: OptimizerConfigOverrideProviderContext
    ) -> dict[ParamKey, ParamGroupOverride] | None:
        """Megatron-Bridge's own overrides (no weight decay on vectors) and one per factor other than 1.

        Raises:
            UserError: for a factor that is not above 0. With 0 gradients would still be computed; freezing avoids that.
        """
        optimizer, overrides = context.optimizer_config, dict(super().build_config_overrides(context) or {})
        for group, factor in asdict(self).items():
            if factor <= 0:
                raise UserError(
                    f"A learning-rate factor must be above 0, {group} has {factor}; to freeze a group "
                    f"set model.freeze_{group}=True."
                )
            if factor != 1:
                predicate = ParamWithNamePredicate(name=f"group {group}", fn=partial(_is_in, group))
                rates = {"max_lr": optimizer.lr * factor, "min_lr": (optimizer.min_lr or 0.0) * factor}
                overrides[ParamKey(with_name_predicate=predicate)] = ParamGroupOverride(**rates)
        return overrides or None


def _is_in(group: str, parameter: nn.Parameter, name: str) -> bool:
    return group_of(name) == group
