"""LoRA beside which some groups of parameters are trained as full weights, such as the projector of a vision model."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it

# isort: split

from dataclasses import dataclass, field, fields
from typing import Any

from megatron.bridge.peft.lora import LoRA

from ...bridge.mcore.upstream import as_config_value
from ...bridge.weight_map import LANGUAGE_MODEL, PARAM_GROUPS, group_of
from ...errors import UserError


@dataclass
class GPTOSSVisionLoRA(LoRA):
    """Megatron-Bridge's LoRA, with `full_weights`: groups of parameters (`PARAM_GROUPS`) that are trained themselves.

    Its checkpoints hold the adapters and these weights. A group that the provider freezes stays frozen.
    """

    full_weights: list[str] = field(default_factory=lambda: ["vision_projection", "vision_bias"])

    def freeze_model(self, model: Any, training: bool = True) -> None:
        """Freeze all parameters but those of `full_weights` that are not frozen already.

        Raises:
            UserError: `full_weights` names what is no group, or the language model, which has the adapters.
        """
        unknown = sorted({*self.full_weights} - {*PARAM_GROUPS} | {*self.full_weights} & {LANGUAGE_MODEL})
        if unknown:
            groups = ", ".join(group for group in PARAM_GROUPS if group != LANGUAGE_MODEL)
            raise UserError(f"peft.full_weights has {', '.join(unknown)}; it takes {groups}.")
        chunks = model if isinstance(model, list) else [model]
        kept = [
            parameter
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
            if training and parameter.requires_grad and group_of(name) in self.full_weights
        ]
        super().freeze_model(model, training)
        for parameter in kept:
            parameter.requires_grad_(True)

    def to_cfg_dict(self) -> dict[str, Any]:
        """The fields for a configuration file.

        Megatron-Bridge 0.6.2 would write what it records while it adapts a model too, in sets, which it cannot read.
        """
        recorded = {"canonical_mapping"} | {each.name for each in fields(self) if not each.init}
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in recorded}
        target = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"_target_": target} | {name: as_config_value(value) for name, value in values.items()}
